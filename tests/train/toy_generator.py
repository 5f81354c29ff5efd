"""A generator and scores of a few numbers, for what self-forcing computes around networks."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs.longsana import SelfForcingConfig
from sana_jax.diffusion.flow import align_leading
from tests.train.tiny_run import QUICKLY
from train.batch import Batch
from train.objectives.longsana.networks import Captions
from train.objectives.longsana.self_forcing import SelfForcing

ROWS, HEIGHT, WIDTH, CHANNELS = 2, 2, 3, 2


class ToyState(NamedTuple):
    """The sum of all blocks and the number of passes that were kept."""

    total: Any
    passes: Any


def toy_block(params, noisy, timestep, captions, state, first_frame):
    """A network whose answer depends on everything it is given."""
    seen = params["w"] * noisy + params["b"] * timestep[:, None, None, None, None] / 1000
    seen = jnp.tanh(
        seen + 0.1 * state.total[:, None] + 0.01 * first_frame + captions.embeds.mean((1, 2))[:, None, None, None, None]
    )
    return seen, ToyState(state.total + seen.mean(1), state.passes + 1)


def toy_score(params, noisy, timestep, captions):
    return jnp.tanh(params * noisy + told(captions, noisy) - align_leading(timestep / 1000, noisy))


def told(captions, noisy):
    return align_leading(captions.embeds.mean((1, 2)), noisy)


def empty(shape) -> ToyState:
    return ToyState(jnp.zeros((shape[0], *shape[2:])), jnp.zeros((), jnp.int32))


PARAMS = {"w": jnp.float32(0.7), "b": jnp.float32(-0.3)}
TRAINED = {"transformer": PARAMS, "fake": jnp.float32(0.4)}
REAL = jnp.float32(0.9)
NEGATIVE = Captions(jnp.full((1, 4, 5), -0.5), jnp.ones((1, 4), jnp.int32))


def batch_of(frames: int, caption: float = 0.3, rows: int = ROWS, conditions: dict | None = None) -> Batch:
    latents = np.random.default_rng(frames).normal(size=(rows, frames, HEIGHT, WIDTH, CHANNELS)).astype(np.float32)
    embeds = np.full((rows, 4, 5), caption, np.float32) + np.arange(rows, dtype=np.float32)[:, None, None]
    return Batch(latents, embeds, np.ones((rows, 4), np.int32), conditions or {})


def self_forcing(**changes) -> SelfForcing:
    options = {"timesteps": (1000, 800, 500), "block_frames": 2, **changes}
    return SelfForcing(toy_block, toy_score, toy_score, empty, SelfForcingConfig(**options), NEGATIVE)


def quickly(function, **options):
    return jax.jit(function, compiler_options=QUICKLY, **options)
