"""LongSANA's sampler: its table of levels, its blocks and steps, and who writes the state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import UserError
from sana_jax.diffusion.samplers.longsana import (
    LongSanaSampler,
    causal_block_starts,
    generate_block,
    nearest_sigma,
    read_block,
    sigma_table,
)


class State(NamedTuple):
    """The sum of all blocks and the number of passes that were kept."""

    total: Any
    passes: Any


def test_the_table_of_levels_is_shifted_and_never_clean():
    table = sigma_table(1.0)
    np.testing.assert_allclose(table.sigmas, 1 - np.arange(1000) / 1000, atol=1e-6)
    assert table.sigmas[0] == 1
    np.testing.assert_allclose(LongSanaSampler().context_sigma, 7 * 0.001 / (1 + 6 * 0.001), rtol=1e-6)
    assert nearest_sigma(jnp.float32(0), 7.0) == np.float32(LongSanaSampler().context_sigma)


@pytest.mark.parametrize("shift", [3.0, 7.0, 8.0])
def test_the_nearest_level_is_the_nearest(shift):
    table, asked = sigma_table(shift), np.array([[0, 20.5, 333], [727, 960, 1000]], np.float32)
    found = np.asarray(nearest_sigma(jnp.asarray(asked), shift))
    assert found.shape == asked.shape
    for one, time in zip(found.ravel(), asked.ravel()):
        assert abs(1000 * float(one) - time) <= np.abs(table.timesteps - time).min() + 1e-3


def test_steps_are_whole_float32_numbers_and_a_last_0_is_no_step():
    sampler = LongSanaSampler(timesteps=(1000, 960, 889, 727, 0))
    assert sampler == LongSanaSampler()
    schedule = sampler.schedule()
    assert schedule.timesteps.dtype == np.float32
    assert schedule.timesteps.tolist() == [1000, 960, 889, 727]
    assert schedule.sigmas[-1] == 0


@pytest.mark.parametrize("timesteps", [(), (0,), (960, 1000), (1000, 1000), (1001, 5), (500.5, 2), (5, -1)])
def test_timesteps_that_are_not_allowed(timesteps):
    with pytest.raises(UserError, match="whole numbers that decrease"):
        LongSanaSampler(timesteps=timesteps)


def test_another_number_of_steps_is_refused():
    with pytest.raises(UserError, match="distilled to the 4 steps"):
        LongSanaSampler().schedule(20)


@pytest.mark.parametrize(
    ("frames", "length", "starts"),
    [(21, 10, (0, 11)), (20, 10, (0, 10)), (7, 10, (0,)), (10, 10, (0,)), (10, 3, (0, 4, 7)), (1, 1, (0,))],
)
def test_the_first_block_takes_the_remainder(frames, length, starts):
    assert causal_block_starts(frames, length) == starts


def test_a_block_reads_the_state_and_only_the_clean_pass_writes_it():
    sampler = LongSanaSampler()
    start = jax.random.normal(jax.random.key(0), (1, 2, 2, 3, 2))

    def velocity(noisy, timestep, state):
        seen = jnp.tanh(0.7 * noisy - 0.3 * timestep / 1000 + 0.1 * state.total[:, None])
        return seen, State(state.total + seen.mean(1), state.passes + 1)

    state = State(jnp.ones((1, 2, 3, 2)), jnp.int32(3))
    noise = jax.random.normal(jax.random.key(1), (3, *start.shape))
    run = jax.jit(lambda noise: generate_block(velocity, state, start, sampler, noise=noise))
    clean = run(noise)
    x, sigmas = jnp.asarray(start), sampler.schedule().sigmas
    for step, time in enumerate(sampler.timesteps):
        x0 = x - sigmas[step] * velocity(x, jnp.float32(time), state)[0]
        x = x0 if step == 3 else (1 - sigmas[step + 1]) * x0 + sigmas[step + 1] * noise[step]
    np.testing.assert_allclose(clean, x, rtol=1e-5, atol=1e-6)
    after = read_block(velocity, state, clean)
    assert after.passes == 4
    np.testing.assert_allclose(after.total, velocity(clean, jnp.float32(0), state)[1].total, rtol=1e-6)
    run = jax.jit(lambda key: generate_block(velocity, state, start, sampler, key))
    seeded = [run(jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(seeded[0], seeded[1])
    assert not np.array_equal(seeded[0], seeded[2])
    with pytest.raises(UserError, match="give both, or neither"):
        read_block(velocity, state, clean, sigma=0.1)
    with pytest.raises(UserError, match="does not give every step its own"):
        generate_block(velocity, state, start, sampler, noise=noise[:2])
