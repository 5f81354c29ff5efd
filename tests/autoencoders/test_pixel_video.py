"""The autoencoder of small videos that does nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sana_jax.autoencoders import PixelAutoencoder, PixelVideoAutoencoder, load_autoencoder
from sana_jax.errors import UserError


def test_latents_are_the_pixels():
    autoencoder = PixelVideoAutoencoder(1, scaling_factor=2.0)
    videos = np.random.default_rng(0).uniform(-1, 1, (2, 5, 4, 6, 1)).astype(np.float32)
    latents = autoencoder.encode(videos)
    np.testing.assert_array_equal(latents, 2 * videos)
    np.testing.assert_array_equal(autoencoder.decode(latents), videos)
    np.testing.assert_array_equal(autoencoder.decode(10 * latents), np.clip(10 * videos, -1, 1))
    first, state = autoencoder.decode_frames(latents[:, :2])
    later, _ = autoencoder.decode_frames(latents[:, 2:], state)
    np.testing.assert_array_equal(np.concatenate([first, later], 1), videos)
    factors = autoencoder.temporal_factor, autoencoder.spatial_factor
    assert (*factors, autoencoder.latent_channels, autoencoder.image_channels) == (1, 1, 1, 1)


@pytest.mark.parametrize("autoencoder", [PixelVideoAutoencoder(3, 1.5), PixelAutoencoder(3, 1.5)], ids=repr)
def test_configurations(tmp_path, autoencoder):
    (tmp_path / "config.json").write_text(json.dumps(autoencoder.to_config()))
    loaded = load_autoencoder(tmp_path)
    assert loaded == autoencoder
    assert type(loaded) is type(autoencoder)
    with pytest.raises(UserError, match=f"{type(autoencoder).__name__} has no weights: dtype='float32'"):
        load_autoencoder(tmp_path, dtype="float32")


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_bad_arrays_are_named(method):
    autoencoder = PixelVideoAutoencoder(3)
    with pytest.raises(UserError, match=r"of shape \(4, 6, 6, 3\); allowed is \(batch, frames, height, width, 3\)"):
        getattr(autoencoder, method)(np.zeros((4, 6, 6, 3)))
    with pytest.raises(UserError, match="the last axis must be the 3 channels"):
        getattr(autoencoder, method)(np.zeros((1, 4, 6, 6, 1)))
