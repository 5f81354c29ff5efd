"""SANA-WM's samplers on a velocity that is known: where they end, and what they leave alone. Numbers: tests/golden."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion.samplers.world_model import (
    DISTILLED_STEPS,
    STREAMING_STEPS,
    chunk_starts,
    euler_step,
    generate_block,
    listed_schedule,
    read_block,
)
from sana_jax.errors import UserError

SHAPE = (2, 4, 2, 3, 1)


def draw(seed: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(SHAPE), jnp.float32)


def straight(target):
    """The velocity of straight paths to ``target``: noise − target where a frame is noise, whatever its level."""

    def velocity_fn(latents, timestep, state):
        level = timestep[:, :, None, None, None] / 1000
        velocity = jnp.where(level > 0, (latents - target) / jnp.where(level > 0, level, 1), 7.0)
        return velocity, state + timestep.sum()

    return velocity_fn


@pytest.mark.parametrize("steps", [STREAMING_STEPS, DISTILLED_STEPS, (*STREAMING_STEPS, 0)])
def test_straight_paths_end_at_their_target(steps):
    schedule, target, given = listed_schedule(steps), draw(0), draw(1)[:, :1]
    found = generate_block(straight(target), jnp.float32(0), draw(2), schedule, given)
    np.testing.assert_array_equal(found[:, :1], given)
    np.testing.assert_allclose(found[:, 1:], target[:, 1:], atol=1e-5)
    np.testing.assert_allclose(generate_block(straight(target), 0.0, draw(2), schedule), target, atol=1e-5)
    np.testing.assert_array_equal(np.trunc(schedule.timesteps), steps[:4])


def test_the_state_is_written_by_the_clean_pass():
    seen = []

    def velocity_fn(latents, timestep, state):
        seen.append(timestep)
        return latents, state + 1

    assert read_block(velocity_fn, 4, draw(0)) == 5
    np.testing.assert_array_equal(seen[0], np.zeros(SHAPE[:2]))


def test_frames_whose_level_stays_are_left_as_they_are():
    latents, velocity = draw(0), jnp.full(SHAPE, jnp.nan).at[:, 1:].set(1.0)
    found = euler_step(latents, velocity, jnp.array([0.0, 1, 1, 0.5]), jnp.array([0.0, 0.5, 1, 0]))
    moved = np.array([0, -0.5, 0, -0.5])[None, :, None, None, None]
    np.testing.assert_allclose(found, latents + moved, rtol=1e-6)
    np.testing.assert_array_equal(found[:, ::2], latents[:, ::2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: listed_schedule((900, 1000)), r"timesteps=\(900, 1000\)"),
        (lambda: listed_schedule((1001, 5)), "at most 1000"),
        (lambda: listed_schedule((999.5,)), "whole numbers"),
        (lambda: listed_schedule((0,)), "above 0"),
        (lambda: chunk_starts(0), "num_frames"),
        (lambda: chunk_starts(5, 3, "halves"), "strategy='halves'.*uniform, first_plus_one, first_frame"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
