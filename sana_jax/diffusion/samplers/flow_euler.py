"""Euler's method for the flow ODE (FlowMatchEulerDiscreteScheduler of diffusers)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int
from sana_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS, shift_sigma
from sana_jax.diffusion.samplers.base import (
    LatentState,
    Schedule,
    entry,
    latents_like,
    refuse_noise,
    require_positive,
    require_steps,
)


@dataclasses.dataclass(frozen=True)
class FlowEuler:
    """x ← x + (σ_next − σ)·velocity, over levels from 1 down to 0.

    Timesteps are num_train_timesteps·σ, not truncated. ``step`` reads nothing but ``schedule.sigmas``, so a caller with
    a list of levels of its own makes ``Schedule(timesteps, sigmas)`` directly.

    Attributes:
      flow_shift: bends the levels towards noise; ``shift`` in a diffusers configuration.
      num_train_timesteps: number of training levels; scales the timesteps and sets the smallest level.
    """

    flow_shift: float = 1.0
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS

    stochastic: ClassVar[bool] = False

    def __post_init__(self):
        require_positive("flow_shift", self.flow_shift)
        require_positive("num_train_timesteps", self.num_train_timesteps)

    def schedule(self, num_inference_steps: int) -> Schedule:
        """Evenly spaced levels between the ends of the shifted training table, shifted once more, and a final 0.

        The shift acts twice because the reference takes its ends from the table that it has already shifted; the
        highest level stays 1 and the lowest is the twice-shifted 1/num_train_timesteps.
        """
        steps = require_steps(num_inference_steps)
        ends = np.array([self.num_train_timesteps, 1], np.float32) / np.float32(self.num_train_timesteps)
        highest, lowest = shift_sigma(ends, self.flow_shift).astype(np.float64) * self.num_train_timesteps
        levels = np.linspace(highest, lowest, steps) / self.num_train_timesteps
        sigmas = shift_sigma(levels, self.flow_shift).astype(np.float32)
        timesteps = sigmas * np.float32(self.num_train_timesteps)
        return Schedule(timesteps, np.append(sigmas, np.float32(0.0)))

    def init(self, latents: Float[Array, "B *X"]) -> LatentState:
        """The state before the first step, from standard normal latents."""
        return LatentState(jnp.asarray(latents, jnp.float32))

    def step(
        self,
        schedule: Schedule,
        state: LatentState,
        index: int | Int[Array, ""],
        velocity: Float[Array, "B *X"],
        noise: None = None,
    ) -> LatentState:
        """One Euler step in float32."""
        refuse_noise(self, noise)
        velocity = latents_like(state, velocity)
        step_size = entry(schedule.sigmas, index + 1) - entry(schedule.sigmas, index)
        return LatentState(state.latents + step_size * velocity)
