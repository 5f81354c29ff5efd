"""Making a cache: inputs beside the pictures, and latents that the data has already."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from sana_jax.errors import UserError
from tests.train.data.cache_cases import NUMBERS, gray_model, gray_pictures, prepared, run_config
from tests.train.run_training import cache_directory, in_this_process
from train.data.cached import CachedData
from train.data.conditions import canny_edges


@pytest.fixture(scope="module", autouse=True)
def quickly(tmp_path_factory):
    with in_this_process(cache_directory(tmp_path_factory)):
        yield


@pytest.fixture(scope="module")
def gray(tmp_path_factory):
    """The gray model."""
    return gray_model(tmp_path_factory.mktemp("gray"))


# -- conditions --------------------------------------------------------------------------------------------------------


def manifest(directory: Path, rows: list[str]) -> Path:
    gray_pictures(directory, len(rows))
    lines = [f'{{"file_name": "p{i:03d}.png", "text": "a {NUMBERS[i % 10]}", {row}}}' for i, row in enumerate(rows)]
    (directory / "metadata.jsonl").write_text("\n".join(lines))
    return directory / "metadata.jsonl"


def test_numbers_vectors_and_pictures_go_into_the_cache(gray, tmp_path):
    rows = [f'"zoom": {i / 4}, "object": [{i}, 1, 2], "control": "p{(i + 1) % 6:03d}.png"' for i in range(6)]
    path = manifest(tmp_path / "pictures", rows)
    conditions = ("zoom=scalar", "object=vector", "control=picture")
    config = run_config(path, tmp_path / "cache", conditions=conditions, flip=True)
    prepared(config, gray)
    data = CachedData(tmp_path / "cache", config.data)
    assert data.condition_shapes((8, 8, 1)) == {"zoom": (), "object": (3,), "control": (8, 8, 1)}
    for mirrored in (0, 1):
        batch = data.batch(np.arange(6), np.full((6, 2), mirrored * 0.9))
        np.testing.assert_array_equal(batch.conditions["zoom"], np.arange(6) / 4)
        np.testing.assert_array_equal(batch.conditions["object"], [[i, 1, 2] for i in range(6)])
        np.testing.assert_array_equal(batch.conditions["control"], np.roll(batch.latents, -1, axis=0))


def test_vectors_from_files(gray, tmp_path):
    path = manifest(tmp_path / "pictures", [f'"object": "v{i}.npy"' for i in range(4)])
    vectors = np.random.default_rng(0).standard_normal((4, 7)).astype(np.float32)
    for number, vector in enumerate(vectors):
        np.save(tmp_path / "pictures" / f"v{number}.npy", vector[None] if number == 1 else vector)
    config = run_config(path, tmp_path / "cache", conditions=("object=vector",))
    prepared(config, gray)
    batch = CachedData(tmp_path / "cache", config.data).batch(np.arange(4))
    np.testing.assert_array_equal(batch.conditions["object"], vectors)


def test_vectors_of_pictures_by_siglip(gray, tmp_path):
    from sana_jax.image_encoders import SiglipImageEncoder
    from sana_jax.models.siglip import SiglipVision, SiglipVisionConfig, init_params
    from sana_jax.weights import save_params

    directory = tmp_path / "siglip"
    directory.mkdir()
    shape = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    (directory / "config.json").write_text(json.dumps(shape.to_dict()))
    (directory / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 16}}))
    save_params(directory / "params", init_params(SiglipVision(shape), jax.random.key(0)))
    path = manifest(tmp_path / "pictures", [f'"object": "objects/{i}.png"' for i in range(3)])
    (tmp_path / "pictures" / "objects").mkdir()
    objects = [tmp_path / "pictures" / "objects" / f"{i}.png" for i in range(3)]
    for number, place in enumerate(objects):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30 + number, 3), np.uint8)
        Image.fromarray(pixels).save(place)
    config = run_config(path, tmp_path / "cache", conditions=(f"object=siglip:{directory}",), flip=True)
    prepared(config, gray)
    want = SiglipImageEncoder.from_directory(directory).encode(objects)
    data = CachedData(tmp_path / "cache", config.data)
    for variant in (0.0, 0.9):
        batch = data.batch(np.arange(3), np.full((3, 2), variant))
        np.testing.assert_allclose(batch.conditions["object"], want, rtol=1e-5, atol=1e-6)
    assert data.identity.fields["conditions.object.weights"]
    with pytest.raises(UserError, match="object=siglip names no model"):
        prepared(run_config(path, tmp_path / "other", conditions=("object=siglip",)), gray)


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("x=scalar", '"y": 1', "p002 has no x"),
        ("x=scalar", '"x": null', "p002 has no x"),
        ("x=scalar", '"x": NaN', "p002 has "),
        ("x=scalar", '"x": "wide"', "p002 has x='wide', which is no number"),
        ("x=scalar", '"x": 1e999', "p002 has x=inf"),
        ("x=vector", '"x": [1, 2]', "p002 has x of shape (2,); the other pictures' have (1,)"),
        ("x=vector", '"x": [[1, 2], [3, 4]]', "p002 has x of shape (2, 2)"),
        ("x=vector", '"x": ["a"]', "p002 has x that is no vector of numbers"),
        ("x=vector", '"x": [NaN]', "p002 has x with values that are not finite"),
        ("x=vector", '"x": "none.npy"', "none.npy"),
        ("x=picture", '"x": "none.png"', "none.png"),
    ],
)
def test_inputs_that_are_missing_leave_a_picture_out_by_name(gray, tmp_path, kind, row, reason):
    good = {"scalar": '"x": 1', "vector": '"x": [1]', "picture": '"x": "p001.png"'}[kind.partition("=")[2]]
    path = manifest(tmp_path / "pictures", [good, good, row, good])
    config = run_config(path, tmp_path / "cache", conditions=(kind,), max_bad_share=0.3)
    _, lines = prepared(config, gray)
    named = [line for line in lines if line.startswith("left out: ") and "p002" in line]
    assert len(named) == 1
    assert reason in named[0]
    assert len(CachedData(tmp_path / "cache", config.data)) == 3


def test_an_input_that_ends_the_command_is_named_once(gray, tmp_path):
    path = manifest(tmp_path / "pictures", ['"x": "p001.png"', '"x": "notes.txt"'])
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    config = run_config(path, tmp_path / "cache", conditions=("x=picture",), max_bad_share=0)
    with pytest.raises(UserError, match=r"share of 0: p001 \(x\) is not a picture of a known format: mend") as stop:
        prepared(config, gray)
    assert "inspect_data PATH lists them all, with --conditions those of conditions too" in str(stop.value)


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        (("x=depth",), "there is no kind 'depth'; choose one of scalar"),
        (("x=scalar", "x=vector"), "the name 'x' is taken"),
        (("latents=scalar",), "the name 'latents' is taken"),
        (("x=scalar:3",), "takes nothing after a colon"),
    ],
)
def test_conditions_that_are_not_allowed(gray, tmp_path, conditions, words):
    config = run_config(gray_pictures(tmp_path / "pictures", 2), tmp_path / "cache", conditions=conditions)
    with pytest.raises(UserError, match=words):
        prepared(config, gray)


def test_edges_of_a_square_are_its_outline():
    picture = np.zeros((32, 40, 3), np.uint8)
    picture[8:24, 10:30] = 128  # a border halfway between, so that the edge is one pixel
    picture[9:23, 11:29] = 255
    edges = canny_edges(picture)
    assert edges.shape == picture.shape
    assert set(np.unique(edges)) == {0, 255}
    rows, columns = np.nonzero(edges[..., 0])
    near = np.minimum(abs(rows - 8), abs(rows - 23)) <= 1
    near |= np.minimum(abs(columns - 10), abs(columns - 29)) <= 1
    assert near.all()
    assert 60 <= len(rows) <= 72  # 68 around
    noise = (128 + np.random.default_rng(0).normal(0, 2, picture.shape)).astype(np.uint8)
    assert canny_edges(noise).max() == 0


# -- latents of the data's own -----------------------------------------------------------------------------------------


def stored_features(directory: Path) -> Path:
    """Latents as the original trainer stores them, three good ones and three that are not."""
    directory.mkdir()
    latents = np.random.default_rng(0).standard_normal((6, 1, 8, 12)).astype(np.float16)
    for number in range(6):
        (directory / f"f{number}.txt").write_text(f"a {NUMBERS[number]}")
    np.savez(directory / "f0.npz", z=latents[0][None])
    np.savez(directory / "f1.npz", z=latents[1])
    np.save(directory / "f2.npy", latents[2, :, :, :8])
    np.savez(directory / "f3.npz", caption_feature=latents[3])
    np.savez(directory / "f4.npz", z=np.repeat(latents[4], 2, axis=0))
    np.savez(directory / "f5.npz", z=np.full((1, 8, 8), np.nan, np.float32))
    return directory


def test_latents_of_the_datas_own_are_taken_over(gray, tmp_path):
    config = run_config(
        stored_features(tmp_path / "features"), tmp_path / "cache", format="features", max_bad_share=0.5
    )
    _, lines = prepared(config, gray)
    data = CachedData(tmp_path / "cache", config.data)
    assert {shape: len(own) for shape, own in data.buckets.items()} == {(8, 8, 1): 1, (8, 12, 1): 2}
    with np.load(tmp_path / "features" / "f1.npz") as stored:
        want = stored["z"][0].astype(np.float32)
    np.testing.assert_array_equal(data.batch(np.array([1])).latents[0, :, :, 0], want)
    embeds, _ = gray.text_encoder.encode(["a one"])
    np.testing.assert_array_equal(data.batch(np.array([1])).prompt_embeds, embeds)
    for key, reason in (
        ("f3", "has the arrays caption_feature; latents are called z"),
        ("f4", "has z of shape (2, 8, 12) and float16; latents are (1, h, w)"),
        ("f5", "encodes to latents that are not finite"),
    ):
        assert [line for line in lines if line.startswith(f"left out: {key}") and reason in line]
    _, lines = prepared(config, gray)
    assert any("3 samples have latents" in line or "6 samples have latents" in line for line in lines)
    with pytest.raises(UserError, match="can't be cropped or mirrored"):
        prepared(run_config(tmp_path / "features", tmp_path / "other", format="features", flip=True), gray)
