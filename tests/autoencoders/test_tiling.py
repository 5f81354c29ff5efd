"""Tiled encoding and decoding: beside diffusers' own, when it sets in, and how much memory it takes."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC

from sana_jax.autoencoders import DCAutoencoder, dc_autoencoder
from sana_jax.autoencoders.dc_ae import init_params
from sana_jax.autoencoders.dc_ae_config import DCAEConfig
from sana_jax.autoencoders.tiling import Tiles, tiled_decode, tiled_encode
from sana_jax.errors import UserError
from tests.parity import dc_ae_oracle as oracle

FACTOR = 8
TILES = Tiles((32, 40), (24, 24))
# Pictures whose last tiles are whole, of one latent, smaller than the overlap; and ones cut along one axis only.
SIZES = [(56, 64), (104, 56), (32, 72), (64, 40), (80, 112)]


def torch_tiled(tiles: Tiles) -> AutoencoderDC:
    """The sana-style tiny model with tiling on."""
    model = AutoencoderDC(**oracle.fields("sana"))
    model.load_state_dict(oracle.torch_model("sana").state_dict())
    model.enable_tiling(*tiles.size, *tiles.stride)
    return model.eval()


def torch_runs(half: str):
    """A half of the PyTorch network on channels-last arrays."""
    return functools.partial(oracle.torch_output, oracle.torch_model("sana"), half)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_decode_is_diffusers_with_its_own_network(size):
    """With the same network for the tiles only the cutting and blending is compared; it is equal to rounding."""
    latents = oracle.draw(2, size[0] // FACTOR, size[1] // FACTOR, 8)
    with torch.no_grad():
        expected = oracle.channels_last(torch_tiled(TILES).decode(oracle.channels_first(latents)).sample)
    found = tiled_decode(torch_runs("decoder"), latents, FACTOR, TILES)
    assert oracle.relative_error(found, expected) <= 1e-7


@pytest.mark.parametrize("size", [*SIZES, (57, 64), (60, 99), (33, 47), (55, 25)], ids=str)
def test_encode_is_diffusers_with_its_own_network(size):
    """Also for pictures that are not whole latents, whose last tiles are padded."""
    images = oracle.draw(2, *size, 3)
    with torch.no_grad():
        expected = oracle.channels_last(torch_tiled(TILES).tiled_encode(oracle.channels_first(images)).latent)
    found = tiled_encode(torch_runs("encoder"), images, FACTOR, TILES)
    assert oracle.relative_error(found, expected) <= 1e-7


@pytest.fixture(scope="module")
def autoencoder():
    lines: list[str] = []
    autoencoder = DCAutoencoder.from_params(
        oracle.jax_config("sana"), oracle.params_for("sana"), tiles=TILES, say=lines.append
    )
    autoencoder.lines = lines
    return autoencoder


def test_whole_autoencoder_beside_diffusers(autoencoder):
    """Scaling, network, cutting and blending together."""
    model, scale = torch_tiled(TILES), autoencoder.config.scaling_factor
    images, latents = oracle.draw(1, 56, 24, 3), oracle.draw(1, 3, 11, 8)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        encoded = oracle.channels_last(model.encode(oracle.channels_first(images)).latent) * scale
        decoded = oracle.channels_last(model.decode(oracle.channels_first(latents) / scale).sample)
        assert oracle.relative_error(autoencoder.encode(images, tiling=True), encoded) <= 2e-6
        assert oracle.relative_error(autoencoder.decode(latents, tiling=True), decoded) <= 2e-6
        # Not the untiled result, or the comparison would say nothing.
        assert oracle.relative_error(autoencoder.decode(latents, tiling=False), decoded) > 1e-3
    tiled = [line for line in autoencoder.lines if "tiles" in line]
    assert len(tiled) == 2
    assert tiled[1].startswith("decoding 24x88 pixels in tiles of 32x40 every 24x24")


@pytest.mark.parametrize(
    ("setting", "argument", "size", "expected"),
    [
        (None, None, (64, 64), False),
        (None, None, (72, 64), True),
        (None, True, (64, 64), True),
        (None, True, (32, 40), False),  # one tile
        (None, False, (72, 64), False),
        (True, None, (64, 64), True),
        (True, False, (64, 64), False),
        (False, None, (72, 64), False),
        (False, True, (72, 64), True),
    ],
)
def test_when_tiling_sets_in(monkeypatch, setting, argument, size, expected):
    monkeypatch.setattr(dc_autoencoder, "LARGEST_UNTILED", 64 * 64)
    lines: list[str] = []
    autoencoder = DCAutoencoder.from_params(
        oracle.jax_config("sana"), oracle.params_for("sana"), tiles=TILES, tiling=setting, say=lines.append
    )
    # What would be compiled, without compiling it.
    shapes = []

    def run(what, x):
        shapes.append(x.shape[1:3])
        return np.zeros((x.shape[0], x.shape[1] * FACTOR, x.shape[2] * FACTOR, 3), np.float32)

    monkeypatch.setattr(autoencoder, "_run", run)
    out = autoencoder.decode(np.zeros((1, size[0] // FACTOR, size[1] // FACTOR, 8), np.float32), tiling=argument)
    assert out.shape == (1, *size, 3)
    assert (len(shapes) > 1) == expected
    assert len(lines) == expected


def test_large_batches_go_picture_by_picture(autoencoder, monkeypatch):
    """The same result from programs of a single picture."""
    latents = oracle.draw(3, 3, 5, 8)
    with jax.default_matmul_precision("highest"):
        together = autoencoder.decode(latents)
        monkeypatch.setattr(dc_autoencoder, "LARGEST_UNTILED", 2 * 24 * 40)
        autoencoder.programs.clear()
        one_by_one = autoencoder.decode(latents)
    assert set(autoencoder.programs) == {("decode", (1, 3, 5, 8))}
    assert oracle.relative_error(one_by_one, together) <= 1e-6


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_memory_of_the_networks_is_bounded(method):
    """Twice the picture's side: the same programs tile by tile, four times the memory otherwise."""

    two_stages = {f"{half}_block_out_channels": (8, 16) for half in ("encoder", "decoder")}
    two_stages |= {f"{half}_layers_per_block": (1, 1) for half in ("encoder", "decoder")}
    two_stages |= {f"{half}_qkv_multiscales": ((), ()) for half in ("encoder", "decoder")}
    config = DCAEConfig(latent_channels=4, **two_stages)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    def peak(pixels: int, tiling: bool) -> int:
        autoencoder = DCAutoencoder.from_params(config, params, tiles=Tiles((64, 64), (48, 48)), say=lambda line: None)
        side, channels = (pixels, 3) if method == "encode" else (pixels // 2, 4)
        getattr(autoencoder, method)(np.zeros((1, side, side, channels), np.float32), tiling=tiling)
        return max(program.memory_analysis().temp_size_in_bytes for program in autoencoder.programs.values())

    assert peak(112, True) == peak(208, True)
    assert 3.5 < peak(208, False) / peak(104, False) < 4.5


def test_leading_axes_go_through_whole():
    """A video autoencoder's frames: each picture as it would be alone."""
    video = oracle.draw(2, 5, 7, 8, 8)

    def decode(z):
        return np.repeat(np.repeat(z[..., :3], FACTOR, -3), FACTOR, -2) * (1 + np.arange(z.shape[-2] * FACTOR)[:, None])

    found = tiled_decode(decode, video, FACTOR, TILES)
    assert found.shape == (2, 5, 56, 64, 3)
    alone = tiled_decode(decode, video[1, 3], FACTOR, TILES)
    np.testing.assert_array_equal(found[1, 3], alone)


def test_tiles_that_overlap_not_at_all():
    latents = oracle.draw(1, 7, 8, 3)
    found = tiled_decode(lambda z: z, latents, 1, Tiles((4, 3), (4, 3)))
    np.testing.assert_array_equal(found, latents)


@pytest.mark.parametrize(("factor", "stride"), [(8, 448), (32, 448), (64, 448), (128, 384)])
def test_default_tiles_are_whole_latents(factor, stride):
    """diffusers leaves 448 for a factor of 128, which is 3.5 latents, and gives pictures of the wrong size."""
    tiles = Tiles.for_factor(factor)
    assert (tiles.size, tiles.stride) == ((512, 512), (stride, stride))
    assert tiles.in_latents(factor).size == (512 // factor,) * 2


def test_impossible_tiles_are_named():
    with pytest.raises(UserError, match="allowed is 1 to the tile's size"):
        Tiles((64, 64), (48, 96))
    with pytest.raises(UserError, match="allowed are multiples of the autoencoder's factor 32"):
        Tiles((500, 512), (448, 448)).in_latents(32)
