"""The LTX-2 autoencoder against recorded vectors: whole videos, blocks of frames with state, blocks with context."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
import pytest

from sana_jax.autoencoders import LTX2VideoAutoencoder
from sana_jax.autoencoders.base import pixel_frames
from sana_jax.autoencoders.ltx2 import LTX2Decoder, LTX2Encoder, init_params
from sana_jax.autoencoders.ltx2_config import STRIDES, LTX2AutoencoderConfig
from sana_jax.weights.rules import flatten, read_params
from sana_jax.weights.tables.ltx2_vae import ltx2_vae_rules
from tests.golden.golden_files import assert_golden, load_golden
from tests.golden.video_networks import RecordedWeights, channels_last

GOLDEN = load_golden("causal_vae")
TOLERANCE = 1e-5
HPARAMS = GOLDEN.hparams
NET = dict(HPARAMS["net"])
LATENTS, PIXELS = (channels_last(GOLDEN[name]) for name in ("in/z", "in/pixels"))
PREPENDED = [name.removeprefix("chunked_bidirectional_prepend") for name in GOLDEN.children("out/decode/")]
PREPENDED = [int(name) for name in PREPENDED if name.isdigit()]


def config(**changes) -> LTX2AutoencoderConfig:
    """The recorded shape; its list of what a decoder's stages double counts from the highest resolution."""
    net = dict(NET)
    stages = len(net["block_out_channels"])
    kinds = net.pop("decoder_upsample_type", None) or ["spatiotemporal"] * len(net["decoder_block_out_channels"])
    rows = net["patch_size"] * math.prod(STRIDES[kind][1] for kind in net["downsample_type"])
    net |= {"upsample_type": kinds[::-1], "down_block_types": ["LTX2VideoDownBlock3D"] * stages}
    return LTX2AutoencoderConfig(**{**net, "spatial_compression_ratio": rows, **changes})


@functools.cache
def params() -> dict:
    source = RecordedWeights({name.removeprefix("w/"): GOLDEN[name] for name in GOLDEN.names("w/")})
    abstract = jax.eval_shape(lambda: init_params(config(), jax.random.key(0)))
    return read_params(source, ltx2_vae_rules(config()), abstract)


@functools.cache
def network(half: str, causal: bool = True):
    kind = {"encoder": LTX2Encoder, "decoder": LTX2Decoder}[half](config(**{f"{half}_causal": causal}))
    return jax.jit(lambda x, state=None: kind.apply({"params": params()[half]}, x, state))


@pytest.fixture(autouse=True, scope="module")
def _exact():
    with jax.default_matmul_precision("highest"):
        yield


def autoencoder(causal: bool, **options) -> LTX2VideoAutoencoder:
    """For decoding. The recorded encoder has other factors than the decoder, so one that fits stands in its place."""
    recorded = config()
    frames, rows = recorded.decoder_factors
    kinds = ["temporal"] * int(math.log2(frames)) + ["spatial"] * int(math.log2(rows // recorded.patch_size))
    widths = itertools.accumulate(
        (math.prod(STRIDES[kind]) for kind in kinds), int.__mul__, initial=NET["latent_channels"]
    )
    stands_in = dataclasses.replace(
        recorded,
        decoder_causal=causal,
        block_out_channels=tuple(widths)[1:],
        down_block_types=("LTX2VideoDownBlock3D",) * len(kinds),
        layers_per_block=(1,) * (len(kinds) + 1),
        downsample_type=tuple(kinds),
        spatial_compression_ratio=None,
        temporal_compression_ratio=None,
    )
    return LTX2VideoAutoencoder.from_params(stands_in, params(), say=lambda line: None, **options)


def normalised(latents: np.ndarray) -> np.ndarray:
    """What the autoencoder takes for latents that the recorded decoder was given."""
    return (latents - GOLDEN["w/latents_mean"]) / GOLDEN["w/latents_std"] * np.float32(NET["scaling_factor"])


def assert_recorded(found, name: str) -> None:
    recorded = GOLDEN[f"out64/{name}" if f"out64/{name}" in GOLDEN else f"out/{name}"]
    assert_golden(found, channels_last(recorded), TOLERANCE, name)


def in_chunks(step, x, name: str, adapt=lambda state, chunk: state):
    """Runs ``step`` over the recorded chunks and compares each result; returns the last state."""
    state, start = None, 0
    for number, length in enumerate(HPARAMS["chunks"]):
        chunk = x[:, start : start + length]
        found, state = step(chunk, None if state is None else adapt(state, chunk))
        assert_recorded(found, f"{name}/chunk{number}")
        start += length
    assert start == x.shape[1]
    return state


@pytest.mark.parametrize(("causal", "name"), [(True, "one_shot_causal"), (False, "one_shot_bidirectional")])
def test_decoding_whole(causal, name):
    found, _ = network("decoder", causal)(LATENTS)
    assert_recorded(found, f"decode/{name}")


def test_decoding_in_chunks():
    """Outputs, and every cache that is left: two frames of each convolution's input, in order of use."""
    state = in_chunks(network("decoder"), LATENTS, "decode/chunked_causal")
    order = ["conv_in", *(f"mid_block_resnets_{i}" for i in range(NET["decoder_layers_per_block"][-1]))]
    for stage, count in enumerate(reversed(NET["decoder_layers_per_block"][:-1])):
        order += [f"up_blocks_{stage}_upsamplers_0", *(f"up_blocks_{stage}_resnets_{i}" for i in range(count))]
    found = [leaf for name in [*order, "conv_out"] for leaf in flatten({name: state[name]}).values()]
    slots = [number for number, kind in enumerate(HPARAMS["cache_kinds"]) if kind == "conv"]
    assert len(slots) == len(found)
    for slot, frames in zip(slots, found):
        name = f"out/decode/chunked_causal/final_cache/slot{slot:02d}"
        assert_golden(frames, channels_last(GOLDEN[name]), TOLERANCE, name)


def test_decoding_latent_frame_by_latent_frame():
    state, frames = None, []
    for index in range(LATENTS.shape[1]):
        found, state = network("decoder")(LATENTS[:, index : index + 1], state)
        frames.append(np.asarray(found))
    assert [part.shape[1] for part in frames] == GOLDEN["out/decode/per_frame_sizes"].tolist()
    assert_recorded(np.concatenate(frames, 1), "decode/per_frame_causal")


def test_the_streaming_adapter():
    """Statistics and scaling factor are undone on the way in; the input is the normalised latents."""
    in_chunks(unclamped(autoencoder(True)), LATENTS, "decode/stream_adapter")


def unclamped(streaming: LTX2VideoAutoencoder):
    """``decode_frames`` of an autoencoder whose frames are small enough not to be clamped, and large again."""
    shrink = 64.0
    weights = dict(streaming.weights.params)
    decoder = dict(weights["decoder"])
    decoder["conv_out"] = {name: leaf / shrink for name, leaf in decoder["conv_out"].items()}
    streaming.weights = type(streaming.weights).of("vae", weights | {"decoder": decoder})

    def step(latents, state):
        frames, state = streaming.decode_frames(latents, state)
        assert np.abs(frames).max() < 1
        return np.asarray(frames) * shrink, state

    return step


@pytest.mark.parametrize("count", PREPENDED)
def test_decoding_in_chunks_with_context(count):
    """A decoder that is not causal, which is given the latents before a chunk again."""
    streaming, lengths = autoencoder(False, streaming_context=count), iter(HPARAMS["chunks"])

    def adapt(state, chunk):
        # Recorded are those of the chunk before alone; copies of this chunk's first one stand for what it is too short.
        kept = min(count, next(lengths))
        first = np.broadcast_to(streaming._denormalised(chunk[:, :1]), (len(chunk), count - kept, *chunk.shape[2:]))
        return state | {"latents": np.concatenate([first, state["latents"][:, count - kept :]], 1)}

    in_chunks(unclamped(streaming), normalised(LATENTS), f"decode/chunked_bidirectional_prepend{count}", adapt)


def test_encoding_whole():
    found, _ = network("encoder")(PIXELS)
    assert_recorded(found, "encode/one_shot_causal")


def test_encoding_in_chunks():
    """Recorded chunks have any number of frames and give what they complete; ours wait until a latent is complete."""
    factor, state = config().temporal_factor, None
    waiting, start = PIXELS[:, :0], 0
    for number, length in enumerate(HPARAMS["epx"]):
        name = f"encode/chunked_causal/chunk{number}"
        waiting = np.concatenate([waiting, PIXELS[:, start : start + length]], 1)
        start += length
        whole = waiting.shape[1] // factor * factor
        if state is None:
            whole = pixel_frames(1 + (waiting.shape[1] - 1) // factor, factor) if waiting.shape[1] else 0
        _, _, latent_frames, _, _ = HPARAMS["encode_chunk_shapes"][name]
        if not whole:
            assert latent_frames == 0
            continue
        found, state = network("encoder")(waiting[:, :whole], state)
        waiting = waiting[:, whole:]
        assert found.shape[1] == latent_frames
        assert_recorded(found, name)
    assert start == PIXELS.shape[1]
