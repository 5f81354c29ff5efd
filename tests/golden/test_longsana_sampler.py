"""LongSANA's sampler against recorded vectors: the table, every jump of every block, and the state in between."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion.flow import x0_from_velocity
from sana_jax.diffusion.samplers.longsana import (
    LongSanaSampler,
    causal_block_starts,
    generate_block,
    nearest_sigma,
    read_block,
    sigma_table,
)
from sana_jax.models.sana_video import init_state
from tests.golden.golden_files import assert_golden, load_golden
from tests.golden.video_networks import (
    channels_last,
    frames_channels_last,
    recorded_numerics,
    recorded_params,
    recorded_slots,
    recorded_transformer,
)
from tests.train.tiny_run import QUICKLY

VALUES = 5e-5
TABLES = 5e-6


@pytest.fixture(scope="module", autouse=True)
def _recorded_numerics():
    with recorded_numerics():
        yield


@pytest.fixture(scope="module")
def golden():
    return load_golden("longsana")


@functools.cache
def sampler() -> LongSanaSampler:
    hparams = load_golden("longsana").hparams
    return LongSanaSampler(hparams["flow_shift"], tuple(hparams["denoising_step_list"]))


def test_table(golden):
    table = sigma_table(golden.hparams["flow_shift"], len(golden["out/scheduler/sigmas"]))
    assert_golden(table.sigmas, golden["out64/scheduler/sigmas"], TABLES, "sigmas")
    assert_golden(table.timesteps, golden["out64/scheduler/timesteps"], TABLES, "timesteps")


def test_blocks(golden):
    (*starts, frames), length = golden.hparams["segments"], golden.hparams["base_chunk_frames"]
    assert causal_block_starts(frames, length) == tuple(starts) == tuple(golden.hparams["chunk_starts"])


@functools.cache
def compiled() -> Any:
    """``(params, state, start, noise, caption, mask, first_frame) -> block, state``"""
    transformer = recorded_transformer(load_golden("longsana").hparams)

    def run(params, state, start, noise, caption, mask, first_frame):
        def velocity(latents, timestep, state):
            times = jnp.broadcast_to(timestep, latents.shape[:1])
            inputs = ({"params": params}, latents, caption, times, mask)
            return transformer.apply(*inputs, state=state, first_frame=first_frame)

        block = generate_block(velocity, state, start, sampler(), noise=noise)
        return block, read_block(velocity, state, block)

    return jax.jit(run, compiler_options=QUICKLY)


@pytest.mark.parametrize("window", load_golden("longsana").hparams["num_cached_blocks"])
def test_blocks_one_after_another(golden, window):
    """All earlier blocks in sight, and a window of them."""
    transformer = recorded_transformer(golden.hparams)
    config, where = transformer.config, f"out/sampler/window{window}"
    params = recorded_params(golden, "w/", transformer)
    start = channels_last(golden["in/sampler_latents"])
    rows, _, height, width, _ = start.shape
    caption, mask = golden["in/y"][:rows, 0], golden["in/mask"][:rows].astype(np.int32)
    grid = (height // config.patch_size[1], width // config.patch_size[2])
    state = init_state(config, rows, grid, window if window > 0 else None)
    draws = [frames_channels_last(golden[name])[None] for name in golden.names(f"rng/window{window}/")]
    between = sampler().num_inference_steps - 1
    found = []
    for block, (first, end) in enumerate(itertools.pairwise(golden.hparams["segments"])):
        noise, draws = jnp.stack(draws[:between]), draws[between:]
        before = state
        clean, state = compiled()(params, state, start[:, first:end], noise, caption, mask, jnp.int32(first))
        found.append(clean)
        cached = f"{where}/chunk{block}/cache_saved"
        for layer in range(config.num_layers) if golden.names(cached) else ():
            slots = recorded_slots(golden, f"{cached}/block{layer}", grid)
            ours = [state.attention.key_value[layer, -1], state.attention.key[layer, -1], state.last_frame[layer]]
            if window <= 0:  # they keep every block's own sums, we their sum
                ours[0] -= before.attention.key_value[layer, 0]
                ours[1] -= before.attention.key[layer, 0]
            for number, (own, recorded) in enumerate(zip(ours, slots)):
                assert_golden(own, recorded, VALUES, f"{cached}/block{layer}/slot{number}")
    assert not draws
    expected = golden[f"out64/sampler/window{window}/output"]
    assert_golden(np.moveaxis(np.concatenate(found, axis=1), -1, 1), expected, VALUES, where)


@pytest.mark.parametrize("window", load_golden("longsana").hparams["num_cached_blocks"])
def test_every_jump_from_what_was_recorded(golden, window):
    schedule = sampler().schedule()
    draws = golden.names(f"rng/window{window}/")
    steps = schedule.num_inference_steps
    for block in range(len(golden.hparams["chunk_starts"])):
        for step in range(steps):
            where = f"out/sampler/window{window}/chunk{block}/step{step}"
            noisy, velocity, clean = (channels_last(golden[f"{where}/{part}"]) for part in ("x_in", "flow", "x0"))
            sigma = nearest_sigma(jnp.float32(schedule.timesteps[step]), golden.hparams["flow_shift"])
            assert sigma == schedule.sigmas[step]
            assert_golden(x0_from_velocity(noisy, velocity, sigma), clean, TABLES, where)
            last = step == steps - 1
            noise = np.zeros_like(noisy) if last else frames_channels_last(golden[draws.pop(0)])[None]
            state = sampler().step(schedule, sampler().init(noisy), step, velocity, noise)
            after = (
                clean if last else channels_last(golden[f"out/sampler/window{window}/chunk{block}/step{step + 1}/x_in"])
            )
            assert_golden(state.latents, after, TABLES, where)
    assert not draws
