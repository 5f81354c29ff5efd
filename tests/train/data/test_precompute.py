"""Making a cache: the right numbers, each once, resumable at any moment; what does not fit is said or refused."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image

from sana_jax.errors import CheckpointError, UserError
from tests.train.data.cache_cases import (
    TEXTS,
    colour_pictures,
    contents,
    gray_model,
    gray_pictures,
    prepared,
    published_model,
    run_config,
    stop_request,
)
from tests.train.run_training import cache_directory, in_this_process
from train import precompute as precompute_module
from train.data import encoding, shard_filler
from train.data.cache import LATENTS, PROMPTS, CacheReader
from train.data.cache_plan import view_of
from train.data.cached import CachedData
from train.data.conditions import canny_edges
from train.data.decoding import decode_picture

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def quickly(tmp_path_factory):
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))  # as training has set one
    with in_this_process(cache_directory(tmp_path_factory)), jax.set_mesh(mesh):
        yield


@pytest.fixture(scope="module")
def gray(tmp_path_factory):
    """The gray model."""
    return gray_model(tmp_path_factory.mktemp("gray"))


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    """The tiny published model, with a short prompt so that its compiled programs are small."""
    model = published_model(tmp_path_factory.mktemp("colour"))
    short = dataclasses.replace(model.text_encoder, max_length=12, complex_human_instruction=("make it vivid",))
    return dataclasses.replace(model, text_encoder=short)


@pytest.fixture(scope="module")
def colour_cache(tmp_path_factory, colour):
    """A cache of the published model, its data and its configuration."""
    directory = tmp_path_factory.mktemp("colour-data")
    pictures = colour_pictures(directory / "pictures")
    config = run_config(
        pictures, directory / "cache", resolution=64, latent_dtype="float32", flip=True, conditions=("edges=canny",)
    )
    prepared(config, colour)
    return config


def picture_of(config, key: str) -> np.ndarray:
    path = Path(config.data.path) / f"{key}.png"
    return decode_picture(path.read_bytes(), name=key, channels=3)


def network_range(picture: np.ndarray) -> np.ndarray:
    return picture[None].astype(np.float64) / 255 * 2 - 1


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_latents_are_those_of_the_prepared_pictures(colour, colour_cache):
    reader = CacheReader(colour_cache.data.cache)
    samples = list(reader.samples())
    assert [sample["key"] for sample in samples] == [f"q{i}" for i in range(6)]
    places = reader.places(LATENTS)
    assert len(places) == 12
    for sample in samples[:2]:
        height, width = sample["size"]
        scaled = Image.fromarray(picture_of(colour_cache, sample["key"])).resize((width, height), Image.BICUBIC)
        assert scaled.size != (80, 80)
        want = np.asarray(colour.autoencoder.encode(network_range(np.asarray(scaled)).astype(np.float32)))[0]
        got = reader.read(places[sample["key"], "center"])
        assert got["latents"].dtype == np.float32
        np.testing.assert_allclose(got["latents"], want, rtol=2e-4, atol=2e-4)
        mirrored = network_range(np.asarray(scaled)[:, ::-1]).astype(np.float32)
        want = np.asarray(colour.autoencoder.encode(mirrored))[0]
        got = reader.read(places[sample["key"], "center mirrored"])["latents"]
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)
    assert {tuple(sample["size"]) for sample in samples} == {(64, 64), (32, 96)}


def test_edges_are_those_of_the_prepared_picture(colour, colour_cache):
    reader = CacheReader(colour_cache.data.cache)
    view = view_of("q0", "center", type("Size", (), {"height": 64, "width": 64}))
    edges = canny_edges(view.of(picture_of(colour_cache, "q0")))
    want = np.asarray(colour.autoencoder.encode(network_range(edges).astype(np.float32)))[0]
    got = reader.read(reader.places(LATENTS)["q0", "center"])["edges"]
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_prompts_are_the_text_encoders_without_padding_and_each_once(colour, colour_cache):
    reader = CacheReader(colour_cache.data.cache)
    places = reader.places(PROMPTS)
    assert set(places) == {("null", ""), *(("text", text) for text in TEXTS)}
    for text in TEXTS:
        embeds, mask = colour.text_encoder.encode([text])
        tokens = reader.read(places["text", text])["tokens"]
        assert len(tokens) == mask.sum() < colour.text_encoder.max_length
        np.testing.assert_array_equal(tokens, embeds[0, : len(tokens)].astype(tokens.dtype))
    embeds, mask = colour.text_encoder.null_encoding()
    null = reader.read(places["null", ""])["tokens"]
    np.testing.assert_array_equal(null, embeds[0, : mask.sum()].astype(null.dtype))


def test_networks_are_not_in_memory_afterwards(colour, colour_cache):
    prepared(colour_cache, colour)
    assert not colour.text_encoder.weights.loaded
    assert not colour.autoencoder.weights.loaded


def test_latents_of_networks_are_bfloat16_unless_told(colour, colour_cache, tmp_path):
    config = run_config(Path(colour_cache.data.path), tmp_path / "cache", resolution=64)
    prepared(config, colour)
    half, whole = (CacheReader(path) for path in (config.data.cache, colour_cache.data.cache))
    name = ("q1", "center")
    latents = half.read(half.places(LATENTS)[name])["latents"]
    assert latents.dtype == ml_dtypes.bfloat16
    want = whole.read(whole.places(LATENTS)[name])["latents"]
    np.testing.assert_allclose(latents.astype(np.float32), want, rtol=1e-2, atol=1e-3)


def test_pixels_and_words_are_exact(gray, tmp_path):
    config = run_config(gray_pictures(tmp_path / "pictures"), tmp_path / "cache")
    _, lines = prepared(config, gray)
    reader = CacheReader(tmp_path / "cache")
    for (key, _), place in reader.places(LATENTS).items():
        with Image.open(tmp_path / "pictures" / f"{key}.png") as image:
            want = np.asarray(image)[..., None].astype(np.float32) / 127.5 - 1
        np.testing.assert_array_equal(reader.read(place)["latents"], want)
    assert sum(kind == "text" for kind, _ in reader.places(PROMPTS)) == 10
    assert any("20 pictures, 0 of them there; 10 distinct prompts, 0 of them there" in line for line in lines)
    assert any("without any error" in line for line in lines)
    with Image.open(tmp_path / "cache" / "check.png") as image:
        assert image.width > 6 * 128


def test_preview_prompts_are_encoded_too(gray, tmp_path):
    config = run_config(gray_pictures(tmp_path / "pictures", 4), tmp_path / "cache")
    preview = dataclasses.replace(config.preview, prompts=("a red seven",))
    prepared(dataclasses.replace(config, preview=preview), gray)
    data = CachedData(tmp_path / "cache", config.data)
    assert "a red seven" not in data.captions
    np.testing.assert_array_equal(data.encode(["a red seven"])[0], gray.text_encoder.encode(["a red seven"])[0])


# -- resuming ----------------------------------------------------------------------------------------------------------


def worker(model, pictures: Path, cache: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.train.data.precompute_worker"]
    return subprocess.Popen(
        [*command, str(model.path), str(pictures), str(cache), str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def test_killed_at_random_moments_it_ends_with_the_same_records(gray, tmp_path):
    pictures = gray_pictures(tmp_path / "pictures", 40)
    (pictures / "p007.png").write_bytes(b"")
    straight = worker(gray, pictures, tmp_path / "straight", 0.0)
    moments = np.random.default_rng(0).uniform(0.0, 1.0, 3)
    counts = []
    for moment in [*moments, None]:
        process = worker(gray, pictures, tmp_path / "killed", 0.05)
        for line in process.stdout:
            if "distinct prompts" in line:  # it knows what is there, and begins
                counts.append(int(line.split(" of them there")[0].rpartition(" ")[2]))
                break
        try:
            _, errors = process.communicate(timeout=60 if moment is None else moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            continue
        assert process.returncode == 0, errors
    out, errors = straight.communicate(timeout=60)
    assert straight.returncode == 0, errors
    assert out.splitlines()[-1] == "False", "torch was imported"
    want, got = contents(tmp_path / "straight"), contents(tmp_path / "killed")
    assert len(want) == 39 * 2 + 11
    assert got == want
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[-1], "every process began anew"
    assert [path.name for path in (tmp_path / "killed").glob(".*") if path.name != ".lock"] == []
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("straight", "killed")]
    assert samples[0] == samples[1]


def test_a_request_to_stop_ends_the_shard_and_says_how_to_go_on(gray, tmp_path):
    process = worker(gray, gray_pictures(tmp_path / "pictures", 40), tmp_path / "cache", 0.2)
    for line in process.stdout:
        if "distinct prompts" in line:
            break
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=1.5)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "SIGINT" in out + errors
    lines = prepared(run_config(tmp_path / "pictures", tmp_path / "cache", flip=True), gray)[1]
    assert not any("not finished" in line for line in lines)


def test_what_is_stopped_between_batches_goes_on_to_the_same_bytes(colour, colour_cache, tmp_path, monkeypatch):
    """With a real autoencoder, whose results may depend on how pictures are put into batches."""
    monkeypatch.setattr(shard_filler, "SHARD_SECONDS", 0.0)
    monkeypatch.setattr(encoding, "_MOST_PICTURES", 2)
    straight, stopped = (
        dataclasses.replace(colour_cache, data=dataclasses.replace(colour_cache.data, cache=str(tmp_path / name)))
        for name in ("straight", "stopped")
    )
    prepared(straight, colour)
    stop = stop_request()
    keep = precompute_module.CacheWriter.keep

    def keep_and_ask(cache, shard):
        keep(cache, shard)
        if shard.kind == LATENTS:
            stop.signal = signal.SIGTERM

    monkeypatch.setattr(precompute_module.CacheWriter, "keep", keep_and_ask)
    for _ in range(3):
        directory, lines = prepared(stopped, colour, stop=stop)
        assert directory is None
        assert "stopped by SIGTERM" in lines[-1]
        with pytest.raises(FileNotFoundError, match="not finished"):
            CacheReader(stopped.data.cache)
        stop.signal = None
    monkeypatch.setattr(precompute_module.CacheWriter, "keep", keep)
    prepared(stopped, colour)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")


def test_a_second_time_computes_nothing(gray, tmp_path, monkeypatch):
    config = run_config(gray_pictures(tmp_path / "pictures"), tmp_path / "cache")
    prepared(config, gray)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.arrayrecord")}
    monkeypatch.setattr(type(gray.autoencoder), "encode", None)
    monkeypatch.setattr(type(gray.text_encoder), "encode", None)
    _, lines = prepared(config, gray)
    assert any("20 pictures, 20 of them there; 10 distinct prompts, 10 of them there" in line for line in lines)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.arrayrecord")} == before


def test_a_damaged_shard_is_made_again(gray, tmp_path):
    config = run_config(gray_pictures(tmp_path / "pictures"), tmp_path / "cache")
    prepared(config, gray)
    want = contents(tmp_path / "cache")
    shard = next((tmp_path / "cache").glob("latents-*.arrayrecord"))
    content = bytearray(shard.read_bytes())
    pixels = next(array for (kind, *_), own in want.items() if kind == LATENTS for _, _, array in own.values())
    content[content.index(pixels) + 5] ^= 1
    shard.write_bytes(content)
    _, lines = prepared(config, gray, thorough=True)
    assert any(shard.name in line and "made again" in line for line in lines)
    assert contents(tmp_path / "cache") == want


def test_pictures_come_and_go(gray, tmp_path):
    pictures = gray_pictures(tmp_path / "pictures")
    config = run_config(pictures, tmp_path / "cache")
    prepared(config, gray)
    gray_pictures(pictures, 3, first=20)
    (pictures / "p022.txt").write_text("a red zero")
    (pictures / "p004.png").unlink()
    (pictures / "p004.txt").unlink()
    Image.new("L", (24, 24), 200).save(pictures / "p005.png")
    _, lines = prepared(config, gray)
    text = "\n".join(lines)
    assert "1 pictures in it are no longer in the data and are dropped: p004" in text
    assert "1 pictures have changed" in text
    assert "22 pictures, 18 of them there; 11 distinct prompts, 10 of them there" in text
    data = CachedData(tmp_path / "cache", config.data)
    assert len(data) == 22
    fresh = run_config(pictures, tmp_path / "fresh")
    prepared(fresh, gray)
    want, got = contents(tmp_path / "fresh"), contents(tmp_path / "cache")
    assert {name: got[name] for name in want} == want
    assert (tmp_path / "cache" / "samples.jsonl").read_text() == (tmp_path / "fresh" / "samples.jsonl").read_text()


def test_mirror_images_and_crops_are_added_to_a_cache_without(gray, tmp_path):
    config = run_config(gray_pictures(tmp_path / "pictures"), tmp_path / "cache")
    prepared(config, gray)
    more = run_config(tmp_path / "pictures", tmp_path / "cache", flip=True)
    with pytest.raises(CheckpointError, match="lacks center mirrored of p000"):
        CachedData(tmp_path / "cache", more.data)
    _, lines = prepared(more, gray)
    assert any("40 variants of 20 pictures, 20 of them there" in line for line in lines)
    reader = CacheReader(tmp_path / "cache")
    both = [reader.read(reader.places(LATENTS)["p003", name])["latents"] for name in ("center", "center mirrored")]
    np.testing.assert_array_equal(both[0][:, ::-1], both[1])
    assert len(CachedData(tmp_path / "cache", config.data)) == 20


def test_random_crops_are_parts_of_the_picture_and_the_same_every_time(gray, tmp_path):
    (tmp_path / "pictures").mkdir()
    ramp = np.arange(8 * 32, dtype=np.uint8).reshape(8, 32)
    Image.fromarray(ramp).save(tmp_path / "pictures" / "p.png")
    config = run_config(tmp_path / "pictures", tmp_path / "cache", crop="random", crops=3, caption="a red one")
    prepared(config, gray)
    found = contents(tmp_path / "cache")
    reader = CacheReader(tmp_path / "cache")
    offsets = set()
    for name in ("crop 0", "crop 1", "crop 2"):
        pixels = np.round((reader.read(reader.places(LATENTS)["p", name])["latents"][..., 0] + 1) * 127.5)
        offset = int(pixels[0, 0])
        offsets.add(offset)
        np.testing.assert_array_equal(pixels, ramp[:, offset : offset + 8])
    assert len(offsets) == 3
    shutil.rmtree(tmp_path / "cache")
    prepared(config, gray)
    assert contents(tmp_path / "cache") == found


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_a_cache_of_other_settings_is_refused(colour, colour_cache):
    for changes, field, values in (
        ({"resolution": 32}, "pictures.sizes", ()),
        ({"latent_dtype": "bfloat16"}, "latents.dtype", ('"float32" there', '"bfloat16" here')),
        ({"conditions": ()}, "conditions.edges.kind", ('"canny" there', "null here")),
    ):
        other = dataclasses.replace(colour_cache, data=dataclasses.replace(colour_cache.data, **changes))
        with pytest.raises(CheckpointError) as error:
            prepared(other, colour)
        assert field in str(error.value)
        assert all(value in str(error.value) for value in values)
    longer = dataclasses.replace(colour.text_encoder, max_length=13, complex_human_instruction=None)
    with pytest.raises(CheckpointError) as error:
        prepared(colour_cache, dataclasses.replace(colour, text_encoder=longer))
    assert "text_encoder.max_length is 12 there, 13 here" in str(error.value)
    assert "text_encoder.instruction is " in str(error.value)


def test_another_models_weights_are_another_identity(colour, colour_cache, tmp_path):
    for part in ("vae", "text_encoder"):
        copy = tmp_path / part
        shutil.copytree(colour.path, copy)
        weights = next((copy / part).glob("*.safetensors"))
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{'autoencoder' if part == 'vae' else part}.weights is "):
            prepared(colour_cache, dataclasses.replace(colour, path=copy))


def test_without_a_folder_of_its_own_a_cache_lies_beside_the_run(gray, tmp_path):
    pictures = gray_pictures(tmp_path / "pictures", 4)
    places = set()
    for resolution in (8, 16, 8):
        config = run_config(pictures, None, resolution=resolution)
        config = dataclasses.replace(config, run_dir=str(tmp_path / "runs" / f"run {resolution}"))
        places.add(prepared(config, gray)[0])
    assert len(places) == 2
    assert all(place.parent == tmp_path / "runs" / "cache" for place in places)


def test_a_finished_cache_serves_without_the_pictures(gray, tmp_path):
    config = run_config(gray_pictures(tmp_path / "pictures", 4), tmp_path / "cache")
    prepared(config, gray)
    shutil.rmtree(tmp_path / "pictures")
    directory, lines = prepared(run_config(None, tmp_path / "cache"), gray)
    assert directory == tmp_path / "cache"
    assert "as it is" in lines[0]
    with pytest.raises(CheckpointError, match=r"pictures\.sizes"):
        prepared(run_config(None, tmp_path / "cache", resolution=16), gray)
    with pytest.raises(UserError, match=r"--data\.path is missing"):
        prepared(run_config(None, None), gray)


def test_pictures_that_are_damaged_inside_are_named_once_and_too_many_stop(gray, tmp_path):
    pictures = gray_pictures(tmp_path / "pictures", 12)
    for number in (2, 9):  # the header is good, the pixels end early
        content = (pictures / f"p{number:03d}.png").read_bytes()
        (pictures / f"p{number:03d}.png").write_bytes(content[:50])
    config = run_config(pictures, tmp_path / "cache", max_bad_share=0.2)
    _, lines = prepared(config, gray)
    named = [line for line in lines if line.startswith("left out: p00")]
    assert len(named) == 2
    assert "left out: 2 pictures, each named above" in lines
    assert len(CachedData(tmp_path / "cache", config.data)) == 10
    with pytest.raises(UserError, match="max-bad-share"):
        prepared(run_config(pictures, tmp_path / "other", max_bad_share=0.1), gray)
    # mended, it is taken
    gray_pictures(pictures, 12)
    prepared(config, gray)
    assert len(CachedData(tmp_path / "cache", config.data)) == 12


def test_a_word_that_the_model_does_not_know_is_named(gray, tmp_path):
    pictures = gray_pictures(tmp_path / "pictures", 4)
    (pictures / "p001.txt").write_text("a green one")
    with pytest.raises(UserError, match="'green'"):
        prepared(run_config(pictures, tmp_path / "cache"), gray)


def test_a_disk_that_is_too_small_is_said_before_anything_is_computed(gray, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(type(gray.text_encoder), "encode", None)
    with pytest.raises(UserError, match=r"needs about .* and 1\.0 kB are free"):
        prepared(run_config(gray_pictures(tmp_path / "pictures"), tmp_path / "cache"), gray)


def test_latents_that_are_not_finite_are_left_out(gray, tmp_path, monkeypatch):
    encode = type(gray.autoencoder).encode

    def spoiled(autoencoder, images):
        latents = np.array(encode(autoencoder, images))
        latents[3] = np.nan
        return latents

    monkeypatch.setattr(type(gray.autoencoder), "encode", spoiled)
    config = run_config(gray_pictures(tmp_path / "pictures", 8), tmp_path / "cache", max_bad_share=0.5)
    _, lines = prepared(config, gray)
    assert "left out: p003 encodes to latents that are not finite" in lines
    assert len(CachedData(tmp_path / "cache", config.data)) == 7
