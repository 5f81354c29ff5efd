"""The Wan autoencoder in blocks of frames and in tiles: beside the whole, beside diffusers, and how much memory."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from sana_jax.autoencoders import WanAutoencoder, blockwise, wan_autoencoder
from sana_jax.autoencoders.base import latent_frames, pixel_frames
from sana_jax.autoencoders.tiling import Tiles
from sana_jax.autoencoders.wan import WanDecoder, WanEncoder
from sana_jax.autoencoders.wan_config import WanConfig
from sana_jax.errors import UserError
from tests.parity import wan_oracle as oracle

TWO_LEVELS, PUBLISHED = "two levels", "published order"
TILES = Tiles((16, 20), (12, 12))
LATENTS = oracle.draw(2, 6, 2, 3, 4)
VIDEOS = oracle.draw(2, 17, 16, 24, 3)


@pytest.fixture(autouse=True, scope="module")
def _quick_and_exact():
    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("highest"):
        patch.setattr(blockwise, "compile_ahead", oracle.quick_compile)
        yield


def make(variant: str, **options) -> WanAutoencoder:
    lines: list[str] = []
    options = {"tiles": TILES, "say": lines.append} | options
    autoencoder = WanAutoencoder.from_params(oracle.jax_config(variant), oracle.params_for(variant), **options)
    autoencoder.lines = lines
    return autoencoder


@pytest.fixture(scope="module")
def published():
    return make(PUBLISHED)


@pytest.fixture(scope="module")
def two_levels():
    return make(TWO_LEVELS)


def in_blocks(step, x, lengths, **options):
    """The results of the blocks side by side, and the last state."""
    state, out, start = None, [], 0
    for length in lengths:
        part, state = step(x[:, start : start + length], state, **options)
        out.append(np.asarray(part))
        start += length
    assert start == x.shape[1]
    return np.concatenate(out, 1), state


def bytes_of(state) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


# --- blocks of frames -----------------------------------------------------------------------------------------------


def test_decoding_in_blocks_of_any_length(published):
    whole = published.decode(LATENTS)
    found, state = in_blocks(published.decode_frames, LATENTS, (1, 2, 3))
    assert oracle.relative_error(found, whole) <= 1e-6
    # the state's size does not depend on how many frames there were, and it may be kept outside the device
    _, first = published.decode_frames(LATENTS[:, :1])
    assert bytes_of(first) == bytes_of(state)
    more, _ = published.decode_frames(LATENTS[:, 1:3], jax.device_get(first))
    np.testing.assert_array_equal(more, found[:, 1:9])


def test_encoding_in_blocks_of_any_length(published):
    whole = published.encode(VIDEOS)
    found, _ = in_blocks(published.encode_frames, VIDEOS, (5, 8, 4))
    assert oracle.relative_error(found, whole) <= 1e-6


def test_large_videos_go_latent_frame_by_latent_frame(published, monkeypatch):
    """The same programs however long the video is, so the same memory, by the compiler's own figures."""
    decoded, encoded = published.decode(LATENTS), published.encode(VIDEOS)
    monkeypatch.setattr(wan_autoencoder, "LARGEST_AT_ONCE", 2 * 4 * 16 * 24)
    before = set(published.programs)
    assert oracle.relative_error(published.decode(LATENTS), decoded) <= 1e-6
    assert oracle.relative_error(published.encode(VIDEOS), encoded) <= 1e-6
    keys = {("encoder", (2, 1, 16, 24, 3), False, False), ("encoder", (2, 4, 16, 24, 3), True, False)}
    keys |= {("decoder", (2, 1, 2, 3, 4), False, False), ("decoder", (2, 1, 2, 3, 4), True, False)}
    assert set(published.programs) == before | keys
    published.decode(np.concatenate([LATENTS] * 3, 1))
    frames, _ = in_blocks(published.decode_frames, LATENTS, (3, 3))  # blocks that are too large themselves
    assert oracle.relative_error(frames, decoded) <= 1e-6
    assert set(published.programs) == before | keys


def test_memory_of_a_scan_over_blocks_does_not_grow():
    """The step as a function of (x, state), scanned: the compiler's figure for 4 and 16 times the blocks."""
    config, params = oracle.jax_config(TWO_LEVELS), oracle.params_for(TWO_LEVELS)["decoder"]
    latents = oracle.draw(1, 1 + 16 * 2, 3, 2, 4)

    def step(params, z, state):
        return WanDecoder(config).apply({"params": params}, z, state)

    def scanned(params, first, later):
        frames, state = step(params, first, None)
        _, more = jax.lax.scan(lambda state, z: step(params, z, state)[::-1], state, later)
        return frames, more

    def compiled(blocks):
        later = latents[:, 1 : 1 + 2 * blocks].reshape(1, blocks, 2, 3, 2, 4).swapaxes(0, 1)
        program = jax.jit(scanned, compiler_options={"xla_backend_optimization_level": 0})
        return program.lower(params, latents[:, :1], later).compile(), later

    (short, _), (long, later) = compiled(4), compiled(16)
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (short, long)]
    assert sizes[1] <= 1.01 * sizes[0]
    frames, more = long(params, latents[:, :1], later)
    found = np.concatenate([frames, np.asarray(more).swapaxes(0, 1).reshape(1, -1, *frames.shape[2:])], 1)
    expected = oracle.torch_decoded(oracle.torch_model(TWO_LEVELS), latents)
    assert oracle.relative_error(found, expected) <= 2e-6


@pytest.mark.prove
def test_how_far_back_the_decoder_looks(published, monkeypatch):
    """What a latent frame cannot reach is not changed by it, and a decoding begun that far before gives the same."""
    assert WanConfig().decoder_history == 38
    history = published.config.decoder_history
    latents = oracle.draw(1, history + 4, 1, 1, 4)
    marked = latents.copy()
    marked[:, 1] = np.nan
    touched = np.isnan(np.asarray(published.decode(marked))).any((0, 2, 3, 4))
    latent_of = (np.arange(touched.size) + 3) // 4
    assert (latent_of[touched].min(), latent_of[touched].max()) == (1, 1 + history)
    monkeypatch.setattr(wan_autoencoder, "LARGEST_AT_ONCE", 1)
    whole = np.asarray(published.decode(latents))
    again = np.asarray(published.decode(latents[:, 2:]))
    np.testing.assert_array_equal(whole[:, -4:], again[:, -4:])


@pytest.mark.parametrize("frames", [1, 5, 81])
def test_numbers_of_frames(frames):
    assert pixel_frames(latent_frames(frames, 4), 4) == frames


@pytest.mark.parametrize(("frames", "near"), [(0, "1"), (-3, "1"), (2, "1 or 5"), (7, "5 or 9"), (80, "77 or 81")])
def test_other_numbers_of_frames_are_named(frames, near):
    with pytest.raises(UserError, match=rf"{frames} frames; .*the nearest are {near}: "):
        latent_frames(frames, 4)


def test_bad_blocks_are_named(published):
    _, state = published.decode_frames(LATENTS[:, :1])
    for other in (LATENTS[:1, :2], LATENTS[:, :2, :1]):
        with pytest.raises(UserError, match="the state is of another network, dtype, tiling, batch or size"):
            published.decode_frames(other, state)
    with pytest.raises(UserError, match="the state is of another"):
        published.decode_frames(LATENTS[:, :2], (*state, *state))
    with pytest.raises(UserError, match="the state is of another"):
        published.decode_frames(LATENTS[:, :2], ())
    with pytest.raises(UserError, match="the state is of another"):
        published.encode_frames(VIDEOS[:, :4], state)
    published.decode_frames(LATENTS[:, 1:3], state)
    with pytest.raises(UserError, match="this state was used already"):
        published.decode_frames(LATENTS[:, 1:3], state)
    with pytest.raises(UserError, match="3 frames that follow others; allowed are multiples of 4, the nearest are 4:"):
        published.encode_frames(VIDEOS[:, :3], state)
    with pytest.raises(UserError, match="the nearest are 4 or 8:"):
        WanEncoder(published.config).apply({}, VIDEOS[:, :6], {"conv_in": None})
    with pytest.raises(UserError, match="3 frames; a video has 1"):
        published.encode_frames(VIDEOS[:, :3])


# --- tiles ----------------------------------------------------------------------------------------------------------


def torch_tiled(tiles: Tiles) -> AutoencoderKLWan:
    model = AutoencoderKLWan(**oracle.fields(TWO_LEVELS))
    model.load_state_dict(oracle.torch_model(TWO_LEVELS).state_dict())
    model.enable_tiling(*tiles.size, *tiles.stride)
    return model.eval()


def test_tiles_are_those_of_diffusers(two_levels):
    """Cutting, networks, blending and statistics together; rows and columns of tiles of unequal sizes."""
    model = torch_tiled(TILES)
    mean, inverse_std = oracle.statistics(TWO_LEVELS)
    videos, latents = oracle.draw(1, 5, 28, 24, 3), oracle.draw(1, 4, 6, 12, 4)
    two_levels.lines.clear()
    with torch.no_grad():
        mode = model.encode(oracle.channels_first(videos)).latent_dist.mode()
        encoded = oracle.channels_last((mode - mean) * inverse_std)
        decoded = oracle.channels_last(model.decode(oracle.channels_first(latents) / inverse_std + mean).sample)
    assert np.abs(decoded).max() < 1
    assert oracle.relative_error(two_levels.encode(videos, tiling=True), encoded) <= 2e-6
    assert oracle.relative_error(two_levels.decode(latents, tiling=True), decoded) <= 2e-6
    assert [line for line in two_levels.lines if "tiles" in line] == [
        f"{what} pixels in tiles of 16x20 every 12x12, to bound memory; tiling=False does not"
        for what in ("encoding 28x24", "decoding 12x24")
    ]


@pytest.mark.prove
def test_blocks_of_tiles(two_levels):
    """Blocks of frames, each in tiles, each tile with its own state."""
    latents = oracle.draw(1, 4, 6, 12, 4)
    whole = two_levels.decode(latents, tiling=True)
    two_levels.lines.clear()
    found, state = in_blocks(two_levels.decode_frames, latents, (2, 1, 1), tiling=True)
    assert oracle.relative_error(found, whole) <= 1e-6
    assert len(state) == 2
    assert len([line for line in two_levels.lines if "tiles" in line]) == 1
    # not the untiled result, or the comparison would say nothing
    assert oracle.relative_error(two_levels.decode(latents, tiling=False), whole) > 1e-3
    with pytest.raises(UserError, match="the state is of another network, dtype, tiling, batch or size"):
        two_levels.decode_frames(latents, state, tiling=False)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_memory_of_tiles_is_bounded(half):
    """Twice the frame's width takes the same programs tile by tile, and what the frame is large by otherwise."""
    autoencoder = make(TWO_LEVELS, tiles=Tiles((32, 32), (24, 24)))

    def run(width: int, tiling: bool) -> dict[tuple, int]:
        if half == "encoder":
            autoencoder.encode(np.zeros((1, 3, 24, width, 3), np.float32), tiling=tiling)
        else:
            autoencoder.decode(np.zeros((1, 2, 12, width // 2, 4), np.float32), tiling=tiling)
        programs = autoencoder.programs.items()
        return {key: program.memory_analysis().temp_size_in_bytes for key, program in programs}

    tiles = run(56, True)
    assert run(104, True) == tiles
    assert max(run(104, False).values()) > 3 * max(tiles.values())


@pytest.mark.parametrize(
    ("setting", "argument", "size", "expected"),
    [
        (None, None, (64, 64), False),
        (None, None, (68, 64), True),
        (None, True, (64, 64), True),
        (None, True, (16, 20), False),  # one tile
        (None, False, (68, 64), False),
        (True, None, (64, 64), True),
        (True, False, (64, 64), False),
        (False, None, (68, 64), False),
        (False, True, (68, 64), True),
    ],
)
def test_when_tiling_sets_in(monkeypatch, setting, argument, size, expected):
    monkeypatch.setattr(wan_autoencoder, "LARGEST_AT_ONCE", 2 * 64 * 64)  # one latent frame is two frames
    autoencoder = make(TWO_LEVELS, tiling=setting)
    # What would be compiled, without compiling it.
    shapes = []

    def step(half, x, state, ends=False):
        assert half == "decoder"
        shapes.append(x.shape)
        frames = x.shape[1] * 2 - (state is None)
        return np.zeros((x.shape[0], frames, x.shape[2] * 2, x.shape[3] * 2, 3), np.float32), ()

    monkeypatch.setattr(autoencoder, "_step", step)
    latents = np.zeros((2, 3, size[0] // 2, size[1] // 2, 4), np.float32)
    out = autoencoder.decode(latents, tiling=argument)
    assert out.shape == (2, 5, *size, 3)
    assert (len({shape[2:4] for shape in shapes}) > 1) == expected
    assert len(autoencoder.lines) == expected
    # whatever is too much at once goes video by video and latent frame by latent frame
    assert all(np.prod(shape[:4]) * 8 <= 2 * 64 * 64 or shape[:2] == (1, 1) for shape in shapes)
