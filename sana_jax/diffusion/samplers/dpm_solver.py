"""DPM-Solver++ for the flow ODE: the multistep solver of order 2 that the published SANA models sample with.

Equals DPMSolverMultistepScheduler of diffusers with ``use_flow_sigmas`` and ``flow_prediction``
(Lu et al., arXiv 2211.01095, algorithm 2; flow form in SANA, arXiv 2410.10629, section 3.2).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int
from sana_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS, shift_sigma
from sana_jax.diffusion.samplers.base import (
    Schedule,
    entry,
    latents_like,
    refuse_noise,
    require_positive,
    require_steps,
)
from sana_jax.errors import UserError


class DPMTables(NamedTuple):
    """Coefficients of every step, float32 (n,); see ``DPMSolver``.

    Attributes:
      sample_scale: σ_next / σ.
      x0_scale: α_next·(1 − e^{−h}).
      slope_scale: 1/r, or 0 on a step of first order.
    """

    sample_scale: np.ndarray
    x0_scale: np.ndarray
    slope_scale: np.ndarray


class DPMState(NamedTuple):
    """State between two steps.

    Attributes:
      latents: float32.
      previous_x0: the clean sample predicted at the step before, float32; zeros before the first.
      steps_done: how many steps were taken, int32 scalar; the first is of first order wherever a run starts.
    """

    latents: Float[Array, "B *X"]
    previous_x0: Float[Array, "B *X"]
    steps_done: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class DPMSolver:
    """Exponential integrator on predictions of the clean sample, in half log signal-to-noise λ = log((1 − σ)/σ).

    With x0 = x − σ·velocity, h = λ_next − λ, r = (λ − λ_before)/h and α = 1 − σ, a step is

        x ← (σ_next/σ)·x + α_next·(1 − e^{−h})·(x0 + (x0 − x0_before)/(2r)),

    where the term in x0_before ("midpoint") is left out on the first step and on the last, which ends at σ = 0, where
    λ is infinite and the step gives x0 itself.

    Timesteps are num_train_timesteps·σ truncated to integers, held as float32, as the network was trained on. Leading
    timesteps may then be equal (from 144 steps at shift 8 on); every step is taken all the same.

    Attributes:
      flow_shift: bends the levels towards noise: 3 for SANA images, 6 at 4096 pixels, 8 for SANA-Video.
      solver_order: 2, or 1 to leave the midpoint term out everywhere.
      num_train_timesteps: number of training levels; scales the timesteps and sets the spacing.
    """

    flow_shift: float = 3.0
    solver_order: int = 2
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS

    stochastic: ClassVar[bool] = False

    def __post_init__(self):
        require_positive("flow_shift", self.flow_shift)
        require_positive("num_train_timesteps", self.num_train_timesteps)
        if self.solver_order not in (1, 2):
            raise UserError(f"solver_order={self.solver_order!r} is not available; choose 1 or 2 (published models: 2)")

    def schedule(self, num_inference_steps: int) -> Schedule:
        """Evenly spaced levels below 1, shifted, and a final 0."""
        steps = require_steps(num_inference_steps)
        ascending = 1.0 - np.linspace(1.0, 1.0 / self.num_train_timesteps, steps + 1)
        levels = shift_sigma(ascending, self.flow_shift)[:0:-1]
        timesteps = np.trunc(levels * self.num_train_timesteps).astype(np.float32)
        sigmas = np.append(levels, 0.0).astype(np.float32)
        return Schedule(timesteps, sigmas, self._tables(sigmas))

    def _tables(self, sigmas: np.ndarray) -> DPMTables:
        """Coefficients, computed in float32 throughout: λ near σ = 1 loses digits, and the reference loses the same."""
        one, two_ends = np.float32(1.0), slice(1, -1)
        alpha = one - sigmas
        with np.errstate(divide="ignore"):
            half_log_snr = np.log(alpha) - np.log(sigmas)
        log_step = np.diff(half_log_snr)
        slope_scale = np.zeros_like(log_step)
        if self.solver_order == 2:
            slope_scale[two_ends] = one / (log_step[:-2] / log_step[1:-1])
        return DPMTables(
            sample_scale=sigmas[1:] / sigmas[:-1],
            x0_scale=-(alpha[1:] * (np.exp(-log_step) - one)),
            slope_scale=slope_scale,
        )

    def init(self, latents: Float[Array, "B *X"]) -> DPMState:
        """The state before the first step, from standard normal latents."""
        latents = jnp.asarray(latents, jnp.float32)
        return DPMState(latents, jnp.zeros_like(latents), jnp.zeros((), jnp.int32))

    def step(
        self,
        schedule: Schedule,
        state: DPMState,
        index: int | Int[Array, ""],
        velocity: Float[Array, "B *X"],
        noise: None = None,
    ) -> DPMState:
        """One solver step in float32."""
        refuse_noise(self, noise)
        tables: DPMTables = schedule.tables
        x0 = state.latents - entry(schedule.sigmas, index) * latents_like(state, velocity)
        x0_scale = entry(tables.x0_scale, index)
        slope_scale = jnp.where(state.steps_done > 0, entry(tables.slope_scale, index), 0.0)
        slope = slope_scale * (x0 - state.previous_x0)
        latents = entry(tables.sample_scale, index) * state.latents + x0_scale * x0 + 0.5 * x0_scale * slope
        return DPMState(latents, x0, state.steps_done + 1)
