"""Reading a cache as training data: the right samples, captions, variants and padding, at any time from any thread."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from sana_jax.errors import CheckpointError, UserError
from tests.train.data.cache_cases import NUMBERS, gray_model, gray_pictures, image_data, prepared, run_config
from train.data import CachedData, Loader, cache_plan
from train.data.buckets import Bin
from train.data.cache import CacheIdentity


@pytest.fixture(scope="module")
def gray(tmp_path_factory):
    return gray_model(tmp_path_factory.mktemp("gray"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, gray):
    """A cache of 30 gray pictures, mirrored as well, with its configuration."""
    directory = tmp_path_factory.mktemp("data")
    config = run_config(gray_pictures(directory / "pictures", 30), directory / "cache", flip=True)
    prepared(config, gray)
    return config


@pytest.fixture(scope="module")
def captioned(tmp_path_factory, gray):
    """A cache of pictures with several captions each, with kinds and scores."""
    directory = tmp_path_factory.mktemp("captioned")
    pictures = directory / "pictures"
    gray_pictures(pictures, 4)
    rows = []
    for number in range(4):
        captions = f'"prompt": "a {NUMBERS[number]}", "short": "{NUMBERS[number]}"'
        rows.append(f'{{"file_name": "p{number:03d}.png", "captions": {{{captions}}}, "group": "g{number % 2}"}}')
    (pictures / "metadata.jsonl").write_text("\n".join(rows))
    config = run_config(pictures / "metadata.jsonl", directory / "cache")
    return config, gray, directory


def open_data(config, **changes) -> CachedData:
    return CachedData(config.data.cache, dataclasses.replace(config.data, **changes))


def test_a_batch_has_padded_prompts_and_their_masks(made, gray):
    data = open_data(made)
    batch = data.batch(np.array([3, 14, 3]))
    assert batch.latents.shape == (3, 8, 8, 1)
    assert batch.latents.dtype == np.float32
    want = gray.text_encoder.encode(["a handwritten three", "a handwritten four", "a handwritten three"])
    np.testing.assert_array_equal(batch.prompt_embeds, want[0])
    np.testing.assert_array_equal(batch.prompt_attention_mask, want[1])
    assert batch.prompt_attention_mask.dtype == np.int32
    np.testing.assert_array_equal(batch.latents[0], batch.latents[2])
    assert batch.conditions == {}


def test_choices_pick_the_variant(made):
    data = open_data(made)
    choices = np.array([[0.0, 0.49], [0.0, 0.5], [0.0, 0.999999], [0.0, 0.0]])
    latents = data.batch(np.full(4, 5), choices).latents
    np.testing.assert_array_equal(latents[0], latents[3])
    np.testing.assert_array_equal(latents[1], latents[2])
    np.testing.assert_array_equal(latents[0][:, ::-1], latents[1])
    # a configuration without mirror images reads the same cache
    plain = open_data(made, flip=False).batch(np.full(4, 5), choices).latents
    for latent in plain:
        np.testing.assert_array_equal(latent, latents[0])


def test_choices_pick_the_caption_by_rule(captioned):
    config, gray, _ = captioned
    prepared(config, gray)
    choices = np.stack([np.linspace(0, 1, 100, endpoint=False), np.zeros(100)], axis=1)
    words = {}
    for name, changes in {
        "random": {},
        "first": {"caption_choice": "first"},
        "proportion": {"caption_choice": "proportion", "proportions": ("prompt=1", "short=3")},
    }.items():
        mask = open_data(config, **changes).batch(np.zeros(100, int), choices).prompt_attention_mask
        words[name] = np.bincount(mask.sum(1), minlength=4)[2:4].tolist()  # short: 2 tokens, prompt: 3
    assert words == {"random": [50, 50], "first": [0, 100], "proportion": [75, 25]}
    # a caption without a weight is not taken, wherever it stands and whatever rounding does to the shares
    for kind, tokens in {"prompt": 3, "short": 2}.items():
        alone = open_data(config, caption_choice="proportion", proportions=(f"{kind}=1",))
        mask = alone.batch(np.zeros(2, int), np.array([[0.0, 0.0], [1.0, 0.0]])).prompt_attention_mask
        assert mask.sum(1).tolist() == [tokens] * 2


def test_captions_are_listed_by_frequency(made, gray, tmp_path):
    data = open_data(made)
    assert sorted(data.captions) == sorted(f"a handwritten {number}" for number in NUMBERS)
    pictures = gray_pictures(tmp_path / "pictures", 3)
    (pictures / "p000.txt").write_text("a handwritten two")
    (pictures / "p001.txt").write_text("   ")
    config = run_config(pictures, tmp_path / "cache", missing_captions="empty")
    prepared(config, gray)
    data = open_data(config)
    assert data.captions == ["a handwritten two"]
    batch = data.batch(np.arange(3))
    np.testing.assert_array_equal(batch.prompt_embeds[1], gray.text_encoder.null_encoding()[0][0])
    assert batch.prompt_attention_mask.sum(1).tolist() == [4, 1, 4]


def test_texts_that_are_there_and_texts_that_are_not(made, gray):
    data = open_data(made)
    for got, want in zip(data.null_encoding(), gray.text_encoder.null_encoding()):
        np.testing.assert_array_equal(got, want)
    for got, want in zip(data.encode(["a handwritten two"]), gray.text_encoder.encode(["a handwritten two"])):
        np.testing.assert_array_equal(got, want)
    assert data.encode(["a handwritten two", ""])[0].shape == (2, 5, 12)
    with pytest.raises(UserError, match=r"'a red one' is not in the cache .*--preview\.prompts"):
        data.encode(["a red one"])


def test_validation_pictures_are_kept_from_training(made, captioned):
    data = open_data(made, validation_share=0.3)
    held_out = data.validation
    assert len(data) + len(held_out) == 30
    assert 0 < len(held_out) < 20
    training = {latents.tobytes() for latents in data.batch(np.arange(len(data))).latents}
    measured = {latents.tobytes() for latents in held_out.batch(np.arange(len(held_out))).latents}
    assert not training & measured
    assert held_out.validation is None
    assert open_data(made).validation is None
    config, gray, _ = captioned
    prepared(config, gray)
    data = open_data(config, validation_share=0.5)
    assert len(data) == len(data.validation) == 2  # two groups of two


def test_what_it_says_of_itself(made):
    data = open_data(made, validation_share=0.3)
    assert list(data.buckets) == [(8, 8, 1)]
    assert data.preview_shape == (8, 8, 1)
    assert data.prompt_shape == (5, 12)
    assert data.condition_shapes((8, 8, 1)) == {}
    text = data.describe()
    assert f"{len(data)} pictures in 2 variants each and {len(data.validation)} for validation" in text
    assert "8x8x1" in text


def test_buckets_have_one_shape_each(gray, tmp_path):
    """Without a table of its own the gray model has one size, so the shapes come from two resolutions."""
    data = []
    for resolution in (8, 16):
        config = run_config(gray_pictures(tmp_path / "pictures", 5), tmp_path / f"{resolution}", resolution=resolution)
        prepared(config, gray)
        data.append(open_data(config))
    assert [list(each.buckets) for each in data] == [[(8, 8, 1)], [(16, 16, 1)]]
    np.testing.assert_array_equal(data[0].buckets[8, 8, 1], np.arange(5))


def test_another_identity_is_refused(made):
    identity = open_data(made).identity
    CachedData(made.data.cache, made.data, identity=identity)
    other = CacheIdentity({**identity.fields, "text_encoder.max_length": 77})
    with pytest.raises(CheckpointError, match="max_length is 5 there, 77 here"):
        CachedData(made.data.cache, made.data, identity=other)


def test_the_loader_reads_it_from_several_threads_and_resumes(made):
    def loader() -> Loader:
        return Loader(open_data(made), seed=3, batch_size=8, rows=(0, 8))

    first = loader()
    batches = [next(first) for _ in range(6)]
    second = loader()
    for _ in range(3):
        next(second)
    third = loader()
    third.restore(second.position())
    for want, got in zip(batches[3:], (next(third) for _ in range(3))):
        np.testing.assert_array_equal(got.latents, want.latents)
        np.testing.assert_array_equal(got.prompt_embeds, want.prompt_embeds)
    data = open_data(made)
    want = data.batch(np.arange(30)).latents
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: data.batch(np.arange(30)).latents, range(24)):
            np.testing.assert_array_equal(got, want)


def test_samples_of_several_shapes_are_not_one_batch(gray, tmp_path, monkeypatch):
    table = (Bin(0.5, 8, 16), Bin(1.0, 8, 8))
    monkeypatch.setattr(cache_plan, "size_table", lambda *_, **__: table)
    pictures = gray_pictures(tmp_path / "pictures", 4)
    for number in (4, 5):
        Image.new("L", (32, 16), 40 * number).save(pictures / f"p{number:03d}.png")
        (pictures / f"p{number:03d}.txt").write_text("a one")
    config = run_config(pictures, tmp_path / "cache")
    prepared(config, gray)
    data = open_data(config)
    assert {shape: len(own) for shape, own in data.buckets.items()} == {(8, 8, 1): 4, (8, 16, 1): 2}
    assert data.preview_shape == (8, 8, 1)
    with pytest.raises(ValueError, match="one bucket"):
        data.batch(np.array([0, 5]))


def test_data_without_pictures_of_a_split(made):
    with pytest.raises(UserError, match="validation"):
        CachedData(made.data.cache, image_data(validation_share=2.0))
