"""The text encoder without weights, and the identity autoencoder."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sana_jax.autoencoders import PixelAutoencoder, load_autoencoder
from sana_jax.errors import UserError
from sana_jax.text_encoders import WordEncoder, load_text_encoder

WORDS = ("a", "handwritten", "one", "seven")


def encoder(vocabulary=WORDS, **changes) -> WordEncoder:
    return WordEncoder(vocabulary, **{"embedding_dim": 64, "max_length": 5, **changes})


def test_shapes_mask_and_padding():
    embeds, mask = encoder().encode(["a seven", "  A Handwritten\tSEVEN "])
    assert embeds.shape == (2, 5, 64)
    assert embeds.dtype == np.float32
    assert mask.dtype == np.int32
    np.testing.assert_array_equal(mask, [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(embeds[mask == 0], 0.0)
    np.testing.assert_array_equal(embeds[0, 2], embeds[1, 3])  # seven, wherever it stands
    np.testing.assert_array_equal(embeds[0, 0], embeds[1, 0])  # the begin token
    tokens = embeds[mask == 1]
    assert len(np.unique(tokens, axis=0)) == 4


def test_unit_variance():
    embeds, mask = encoder(embedding_dim=4096).encode(["a handwritten one seven"])
    np.testing.assert_allclose(embeds[0].std(axis=-1), 1.0, atol=0.05)
    np.testing.assert_allclose(embeds[0].mean(axis=-1), 0.0, atol=0.06)
    assert mask.all()


def test_vectors_depend_on_seed_and_word_alone():
    embeds, _ = encoder().encode(["a seven"])
    reordered, _ = encoder(("zero", *reversed(WORDS))).encode(["a seven"])
    np.testing.assert_array_equal(embeds, reordered)
    other, _ = encoder(seed=1).encode(["a seven"])
    assert np.abs(embeds - other).max() > 0.1


def test_vectors_are_the_same_for_ever():
    # a checkpoint finds the vectors that it was trained with
    embeds, _ = encoder(embedding_dim=4).encode(["seven"])
    expected = [[-0.0488621, 0.7031289, 0.1157263, 0.7735291], [0.3657362, -0.3943619, 1.1206877, 0.0560492]]
    np.testing.assert_allclose(embeds[0, :2], expected, atol=1e-6)


def test_null_encoding_is_the_begin_token_alone():
    embeds, mask = encoder().null_encoding()
    np.testing.assert_array_equal(mask, [[1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(embeds[0, 0], encoder().encode(["one"])[0][0, 0])
    np.testing.assert_array_equal(embeds, encoder().encode(["  "], negative=True)[0])


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", ("'' is empty", "a, handwritten, one, seven")),
        ("  ", ("is empty",)),
        ("a eight one", ("'eight'", "a, handwritten, one, seven")),
        ("a handwritten one one seven", ("5 words", "at most 4", "'seven'")),
    ],
)
def test_mistakes(prompt, parts):
    with pytest.raises(UserError) as caught:
        encoder().encode([prompt])
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"vocabulary": ()},
        {"vocabulary": ("a", "a")},
        {"vocabulary": ("A",)},
        {"vocabulary": ("two words",)},
        {"embedding_dim": 0},
        {"max_length": 1},
    ],
)
def test_settings_that_are_not_allowed(arguments):
    with pytest.raises(UserError):
        encoder(**arguments)


def test_configurations_round_trip(tmp_path):
    for folder, load, component in (
        ("text_encoder", load_text_encoder, encoder(seed=3)),
        ("vae", load_autoencoder, PixelAutoencoder(3, scaling_factor=1.5)),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(component.to_config()))
        assert load(tmp_path / folder) == component
        with pytest.raises(UserError, match="colour"):
            type(component).from_config({**component.to_config(), "colour": 1})
        (tmp_path / folder / "config.json").write_text(json.dumps({"_class_name": "Nobody"}))
        with pytest.raises(UserError, match="'Nobody'"):
            load(tmp_path / folder)
        (tmp_path / folder / "config.json").write_text("{")
        with pytest.raises(UserError, match=r"config\.json"):
            load(tmp_path / folder)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_text_encoder(tmp_path)


def test_pixels_are_latents():
    images = np.linspace(-1, 1, 2 * 4 * 4).reshape(2, 4, 4, 1).astype(np.float32)
    autoencoder = PixelAutoencoder(1, scaling_factor=2.0)
    assert (autoencoder.spatial_factor, autoencoder.latent_channels, autoencoder.image_channels) == (1, 1, 1)
    np.testing.assert_allclose(autoencoder.encode(images), 2 * images)
    np.testing.assert_allclose(autoencoder.decode(autoencoder.encode(images)), images, atol=1e-7)
    with pytest.raises(UserError, match="channels-last"):
        autoencoder.encode(np.zeros((2, 1, 4, 4), np.float32))
    with pytest.raises(UserError, match="channels 2"):
        PixelAutoencoder(2)
    with pytest.raises(UserError, match="scaling_factor"):
        PixelAutoencoder(1, 0.0)


def test_a_long_prompt_is_not_printed_whole():
    for prompt in ("a " * 2000, "picture " * 2000, " ".join(f"word{i}" for i in range(2000))):
        with pytest.raises(UserError) as raised:
            encoder().encode(prompt)
        assert len(str(raised.value)) < 500
