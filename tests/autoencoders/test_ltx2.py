"""The LTX-2 autoencoder in blocks of frames, in pieces and in tiles: beside the whole, and what is refused."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from sana_jax.autoencoders import LTX2VideoAutoencoder, ltx2_autoencoder
from sana_jax.autoencoders.ltx2 import LTX2Decoder, LTX2Encoder
from sana_jax.autoencoders.tiling import FrameTiles, Tiles, tile_starts
from sana_jax.errors import UserError
from tests.parity import ltx2_vae_oracle as oracle

ONE_STAGE = "one stage"  # latents of 4 pixels and 2 frames
LATENTS = oracle.draw(2, 6, 2, 3, 8)
VIDEOS = oracle.draw(2, 11, 8, 12, 3)


@pytest.fixture(autouse=True, scope="module")
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def make(causal: bool, **options) -> LTX2VideoAutoencoder:
    lines: list[str] = []
    config = oracle.jax_config(ONE_STAGE, decoder_causal=causal)
    autoencoder = LTX2VideoAutoencoder.from_params(config, oracle.params_for(ONE_STAGE), say=lines.append, **options)
    autoencoder.lines = lines
    return autoencoder


@pytest.fixture(scope="module")
def causal():
    return make(True)


@pytest.fixture(scope="module")
def published():
    """Whose decoder is not causal."""
    return make(False)


def in_blocks(step, x, lengths):
    """The results of the blocks side by side, and the last state."""
    state, out, start = None, [], 0
    for length in lengths:
        part, state = step(x[:, start : start + length], state)
        out.append(np.asarray(part))
        start += length
    assert start == x.shape[1]
    return np.concatenate(out, 1), state


def shapes_of(state):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), state)


# --- blocks of frames -----------------------------------------------------------------------------------------------


def test_decoding_in_blocks_of_any_length(causal):
    whole = causal.decode(LATENTS)
    found, state = in_blocks(causal.decode_frames, LATENTS, (1, 2, 3))
    assert found.shape == (2, 11, 8, 12, 3)
    assert oracle.relative_error(found, whole) <= 1e-6
    # the state's size does not depend on how many frames there were, and it may be kept outside the device
    _, first = causal.decode_frames(LATENTS[:, :1])
    assert shapes_of(first) == shapes_of(state)
    more, _ = causal.decode_frames(LATENTS[:, 1:3], jax.device_get(first))
    np.testing.assert_array_equal(more, found[:, 1:5])
    with pytest.raises(UserError, match="the state is of another network, dtype, tiling, batch or size"):
        causal.decode_frames(LATENTS[:1, :2], state)


def test_encoding_in_blocks_of_any_length(published):
    whole = published.encode(VIDEOS)
    found, state = in_blocks(published.encode_frames, VIDEOS, (1, 4, 6))
    assert oracle.relative_error(found, whole) <= 1e-6
    with pytest.raises(UserError, match="3 frames that follow others; allowed are multiples of 2"):
        published.encode_frames(VIDEOS[:, :3], state)


def test_large_videos_go_latent_frame_by_latent_frame(causal, monkeypatch):
    decoded, encoded = causal.decode(LATENTS), causal.encode(VIDEOS)
    monkeypatch.setattr(ltx2_autoencoder, "LARGEST_AT_ONCE", 2 * 2 * 8 * 12)
    before = set(causal.programs)
    assert oracle.relative_error(causal.decode(LATENTS), decoded) <= 1e-6
    assert oracle.relative_error(causal.encode(VIDEOS), encoded) <= 1e-6
    keys = {("encoder", (2, 1, 8, 12, 3), False, False), ("encoder", (2, 2, 8, 12, 3), True, False)}
    keys |= {("decoder", (2, 1, 2, 3, 8), False, False), ("decoder", (2, 1, 2, 3, 8), True, False)}
    assert set(causal.programs) == before | keys


def test_a_decoder_that_is_not_causal_does_not_stream(published):
    with pytest.raises(UserError, match=r"not causal: its frames depend on those after them.*streaming_context=1 or 2"):
        published.decode_frames(LATENTS)
    with pytest.raises(UserError, match="this decoder is not causal"):
        LTX2Decoder(published.config).apply({}, LATENTS, {"conv_in": LATENTS[:, :2]})
    other = dataclasses.replace(published.config, encoder_causal=False)
    autoencoder = LTX2VideoAutoencoder.from_params(other, {})
    with pytest.raises(UserError, match="this encoder is not causal"):
        autoencoder.encode_frames(VIDEOS)
    with pytest.raises(UserError, match="this encoder is not causal"):
        LTX2Encoder(other).apply({}, VIDEOS[:, :2], {})


def test_streaming_with_context(published):
    """Frames near the whole video's, the nearer the more context there is; the state is the context."""
    whole, errors = published.decode(LATENTS), []
    for count in (1, 3):
        autoencoder = make(False, streaming_context=count)
        found, state = in_blocks(autoencoder.decode_frames, LATENTS, (2, 4))
        assert found.shape == whole.shape
        assert state["latents"].shape == (2, count, 2, 3, 8)
        # the last frames are far from what a block does not see
        errors.append(oracle.relative_error(found[:, 6:], whole[:, 6:]))
    assert errors[1] < 0.5 * errors[0]
    with pytest.raises(UserError, match="the state is of another"):
        autoencoder.decode_frames(LATENTS[:1], state)
    with pytest.raises(UserError, match="the state is of another"):
        autoencoder.decode_frames(LATENTS, {"latents": LATENTS})


@pytest.mark.parametrize(
    ("causal", "options", "message"),
    [
        (True, {"streaming_context": 1}, "this decoder is causal and streams exactly, so"),
        (True, {"frame_tiles": FrameTiles()}, "frame_tiles and streaming_context would not be used"),
        (False, {"streaming_context": -1}, "streaming_context=-1 is not allowed; choose 0, 1, 2 or more"),
        (False, {"streaming_context": True}, "streaming_context=True is not allowed"),
        (False, {"dtype": "float16"}, "choose float32 or bfloat16"),
    ],
    ids=str,
)
def test_bad_options_are_named(causal, options, message):
    with pytest.raises(UserError, match=message):
        make(causal, **options)


# --- pieces and tiles -----------------------------------------------------------------------------------------------


def test_when_a_video_is_cut(monkeypatch):
    """In time first, then in space, and a line each; nothing where tiling is off."""
    autoencoder = make(False, tiles=Tiles((16, 16), (12, 12)), frame_tiles=FrameTiles(8, 6))
    shapes = []

    def step(half, x, state, ends=False):
        shapes.append(x.shape[1:4])
        frames = x.shape[1] * 2 - 1
        return np.zeros((x.shape[0], frames, x.shape[2] * 4, x.shape[3] * 4, 3), np.float32), ()

    monkeypatch.setattr(autoencoder, "_step", step)
    latents = np.zeros((1, 9, 6, 5, 8), np.float32)
    for largest, expected in (
        (18 * 24 * 20, {(9, 6, 5)}),
        (18 * 24 * 20 - 1, {(5, 6, 5), (5, 6, 5), (3, 6, 5)}),
        (9 * 24 * 20 - 1, {(t, h, w) for t in (5, 3) for h in (4, 3) for w in (4, 2)}),
    ):
        monkeypatch.setattr(ltx2_autoencoder, "LARGEST_AT_ONCE", largest)
        shapes.clear()
        assert autoencoder.decode(latents).shape == (1, 17, 24, 20, 3)
        assert set(shapes) == expected
    assert autoencoder.lines == [
        "decoding 17 frames in pieces of 8 every 6, to bound memory; tiling=False does not",
        "decoding 17 frames in pieces of 8 every 6, to bound memory; tiling=False does not",
        "decoding 24x20 pixels in tiles of 16x16 every 12x12, to bound memory; tiling=False does not",
    ]
    shapes.clear()
    autoencoder.decode(latents, tiling=False)
    assert shapes == [(9, 6, 5)]


def test_no_tile_is_one_latent_wide():
    """The published class stops there; ours takes the last column from the tile before, which has it as well."""
    assert tile_starts(29, 16, 14) == [0, 14, 28]
    assert tile_starts(29, 16, 14, 2) == [0, 14]
    assert tile_starts(30, 16, 14, 2) == [0, 14, 28]
    assert tile_starts(29, 14, 14, 2) == [0, 14, 28]  # nothing else has it
    tiles = Tiles((16, 16), (12, 12))
    latents = oracle.draw(1, 1, 2, 7, 8)
    autoencoder = make(False, tiles=tiles)
    found = np.asarray(autoencoder.decode(latents, tiling=True))
    assert {key[1][2:4] for key in autoencoder.programs} == {(2, 4)}
    last = np.asarray(autoencoder.decode(latents[:, :, :, 3:]))
    np.testing.assert_array_equal(found[..., 16:, :], last[..., 4:, :])  # behind what is blended
    model = oracle.torch_model(ONE_STAGE)
    with pytest.raises(RuntimeError, match="Padding size"):
        oracle.torch_decoded(model, latents[:, :, :, 6:])
    # a video of one latent has no mirror image: its only column stands around it
    assert np.isfinite(autoencoder.decode(latents[:, :, :, 6:])).all()


@pytest.mark.parametrize(
    ("make_tiles", "message"),
    [
        (lambda: FrameTiles(96, 97), "pieces of 96 frames every 97: allowed is 1 to the piece's size"),
        (lambda: FrameTiles(96, 0), "every 0"),
        (lambda: FrameTiles(20, 16).in_latents(8), "multiples of the autoencoder's factor 8"),
    ],
)
def test_bad_pieces_are_named(make_tiles, message):
    with pytest.raises(UserError, match=message):
        make_tiles()


# --- as pipelines and trainers use it -------------------------------------------------------------------------------


def test_a_picture_is_the_first_latent(published):
    """What the world model's pipeline asks: a picture to a latent frame, latents to frames within [-1, 1]."""
    first = published.encode(VIDEOS[:, :1])
    assert first.shape == (2, 1, 2, 3, 8)
    assert oracle.relative_error(first, published.encode(VIDEOS)[:, :1]) <= 1e-6
    params = oracle.params_for(ONE_STAGE)
    louder = jax.tree.map(lambda leaf: 10 * leaf, params["decoder"]["conv_out"])
    louder = params | {"decoder": params["decoder"] | {"conv_out": louder}}
    loud = LTX2VideoAutoencoder.from_params(published.config, louder, say=lambda line: None)
    loud.programs = published.programs
    frames = np.asarray(published.decode(LATENTS))
    assert frames.shape == (2, 11, 8, 12, 3)
    clamped = np.asarray(loud.decode(LATENTS))
    assert 0.01 < (np.abs(clamped) == 1).mean() < 0.9
    np.testing.assert_allclose(clamped, np.clip(10 * frames, -1, 1), atol=1e-5)
    sizes = published.spatial_factor, published.temporal_factor, published.latent_channels, published.image_channels
    assert sizes == (4, 2, 8, 3)
    with pytest.raises(UserError, match=r"12 frames; a video has 1 \+ 2·k of them"):
        published.encode(np.zeros((1, 12, 8, 12, 3), np.float32))
    with pytest.raises(UserError, match="height and width must be multiples of 4"):
        published.encode(np.zeros((1, 1, 8, 10, 3), np.float32))
    with pytest.raises(UserError, match=r"allowed is \(batch, frames, height, width, 8\)"):
        published.decode(LATENTS[..., :4])


def test_statistics_come_with_the_weights():
    """Twice the deviation halves the latents; a mean moves them; the other way round when they are decoded."""
    params = oracle.params_for(ONE_STAGE)
    plain = {"mean": np.zeros(8, np.float32), "std": np.ones(8, np.float32)}
    moved = {"mean": plain["mean"] + 0.5, "std": 2 * plain["std"]}
    config = oracle.jax_config(ONE_STAGE)
    first, second = (
        LTX2VideoAutoencoder.from_params(config, params | {"statistics": statistics}, say=lambda line: None)
        for statistics in (plain, moved)
    )
    second.programs = first.programs
    means = np.asarray(first.encode(VIDEOS[:, :1]))
    np.testing.assert_allclose(second.encode(VIDEOS[:, :1]), (means - 0.5) / 2, rtol=1e-6)
    np.testing.assert_allclose(second.decode(means), first.decode(2 * means + 0.5), atol=1e-6)
    scaled = dataclasses.replace(config, scaling_factor=3.0)
    third = LTX2VideoAutoencoder.from_params(scaled, params | {"statistics": moved}, say=lambda line: None)
    third.programs = first.programs
    np.testing.assert_allclose(third.encode(VIDEOS[:, :1]), 3 * (means - 0.5) / 2, rtol=1e-5)


@pytest.mark.parametrize("kind", ["causal", "published"])
def test_the_last_frame_encoded(kind, request):
    autoencoder = request.getfixturevalue(kind)
    latents = LATENTS[:, :3]
    expected = autoencoder.encode(autoencoder.decode(latents)[:, -1:])
    found = jax.jit(autoencoder.last_frame_encoded)(autoencoder.training_params(), latents)
    assert oracle.relative_error(found, expected) <= 1e-5
