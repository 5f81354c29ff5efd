"""LongSANA's recorded vectors: one set of weights in its three forms, beside the training code's own.

The recorded denoisers cut timesteps to whole numbers before they embed them; our network takes them as they are, so the
cut is made here, as it is by whoever calls the network in the way of the original code.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.models.sana_video import SanaVideoTransformer, init_state
from tests.golden.golden_files import assert_golden, load_golden
from tests.golden.video_networks import channels_last, recorded_params, recorded_slots, recorded_transformer

WHOLE_MODEL = 5e-5
CACHE = 5e-5
# Only values are wanted, not speed.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module", autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def golden():
    return load_golden("longsana")


@functools.cache
def transformer() -> SanaVideoTransformer:
    return recorded_transformer(load_golden("longsana").hparams)


@pytest.fixture(scope="module")
def params(golden):
    """Read through the table of original names and the table of published ones."""
    return recorded_params(golden, "w/", transformer())


@functools.cache
def compiled(block_starts: tuple[int, ...] | None = None):
    """``(params, latents, caption, timestep, mask) -> velocity``"""
    run = functools.partial(transformer().apply, block_starts=block_starts)
    return jax.jit(lambda params, *inputs: run({"params": params}, *inputs), compiler_options=QUICK_COMPILE)


@functools.cache
def compiled_block():
    """``(params, latents, caption, timestep, mask, state, first_frame) -> velocity, state``"""

    def run(params, latents, caption, timestep, mask, state, first_frame):
        inputs = ({"params": params}, latents, caption, timestep, mask)
        return transformer().apply(*inputs, state=state, first_frame=first_frame)

    return jax.jit(run, compiler_options=QUICK_COMPILE)


def inputs(golden, timestep: str) -> tuple[np.ndarray, ...]:
    """Latents, caption, whole timesteps (B,) or (B, T), mask."""
    times = np.floor(golden[f"in/{timestep}"])
    times = times[:, 0] if times.ndim == 3 else times
    mask = golden["in/mask"].astype(np.int32)
    return channels_last(golden["in/x"]), golden["in/y"][:, 0], times.astype(np.float32), mask


def recordings(form: str) -> list[str]:
    return load_golden("longsana").children(f"out/{form}/")


@pytest.mark.parametrize("timestep", recordings("bidirectional"))
def test_bidirectional(golden, params, timestep):
    found = compiled()(params, *inputs(golden, timestep))
    expected = golden[f"out64/bidirectional/{timestep}"]
    assert_golden(np.moveaxis(found, -1, 1), expected, WHOLE_MODEL, timestep)


@pytest.mark.parametrize("timestep", recordings("chunk_parallel"))
def test_all_blocks_at_once(golden, params, timestep):
    run = compiled(tuple(golden.hparams["chunk_starts"]))
    found = run(params, *inputs(golden, timestep))
    expected = golden[f"out64/chunk_parallel/{timestep}"]
    assert_golden(np.moveaxis(found, -1, 1), expected, WHOLE_MODEL, timestep)


@pytest.mark.parametrize("window", load_golden("longsana").hparams["num_cached_blocks"])
def test_one_block_after_another(golden, params, window):
    """Outputs, what every block is given and what it leaves, with all earlier blocks in sight and with a window."""
    config, segments = transformer().config, golden.hparams["segments"]
    latents, caption, _, mask = inputs(golden, "t_same")
    batch, _, height, width, _ = latents.shape
    grid = (height // config.patch_size[1], width // config.patch_size[2])
    num_cached_blocks = window if window > 0 else None
    state = init_state(config, batch, grid, num_cached_blocks)
    time = np.full(batch, np.floor(golden.hparams["long_timestep"]), np.float32)
    outputs = []
    for block, (start, end) in enumerate(itertools.pairwise(segments)):
        prefix = f"out/forward_long/window{window}/chunk{block}"
        before = state
        if block:
            for layer in range(config.num_layers):
                key_value, key, frame = recorded_slots(golden, f"{prefix}/cache_in/block{layer}", grid)
                where = f"{prefix}/cache_in/block{layer}"
                assert_golden(before.attention.key_value[layer].sum(0), key_value, CACHE, where)
                assert_golden(before.attention.key[layer].sum(0), key, CACHE, where)
                assert_golden(before.last_frame[layer], frame, CACHE, where)
        arguments = (latents[:, start:end], caption, time, mask)
        velocity, state = compiled_block()(params, *arguments, state, jnp.int32(start))
        outputs.append(velocity)
        for layer in range(config.num_layers):
            key_value, key, frame = recorded_slots(golden, f"{prefix}/cache_saved/block{layer}", grid)
            where = f"{prefix}/cache_saved/block{layer}"
            if num_cached_blocks is None:  # they keep every block's own sums, we their sum
                key_value = key_value + before.attention.key_value[layer, 0]
                key = key + before.attention.key[layer, 0]
            assert_golden(state.attention.key_value[layer, -1], key_value, CACHE, where)
            assert_golden(state.attention.key[layer, -1], key, CACHE, where)
            assert_golden(state.last_frame[layer], frame, CACHE, where)
    expected = golden[f"out64/forward_long/window{window}/output"]
    assert_golden(np.moveaxis(np.concatenate(outputs, axis=1), -1, 1), expected, WHOLE_MODEL, f"window {window}")
