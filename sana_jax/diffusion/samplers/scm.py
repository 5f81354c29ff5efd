"""The consistency sampler of SANA-Sprint (SCMScheduler of diffusers): jump to clean, add noise again, repeat.

sCM, Lu and Song, arXiv 2410.11081; SANA-Sprint, arXiv 2503.09641. Coordinates in ``sana_jax.diffusion.trigflow``.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int
from sana_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS
from sana_jax.diffusion.samplers.base import Schedule, entry, latents_like, require_positive, require_steps
from sana_jax.errors import UserError


class SCMTables(NamedTuple):
    """Cosines and sines of the angle before every step and after the last, float32 (n + 1,)."""

    cos: np.ndarray
    sin: np.ndarray


class SCMState(NamedTuple):
    """State between two steps, float32.

    Attributes:
      latents: x_t, in units of ``sigma_data`` (multiply unit normal starting noise by it).
      denoised: the clean sample predicted by the last step; zeros before the first. The result of a run.
    """

    latents: Float[Array, "B *X"]
    denoised: Float[Array, "B *X"]


@dataclasses.dataclass(frozen=True)
class SCM:
    """Multistep consistency sampling in TrigFlow angles.

    With F the TrigFlow velocity (``trigflow.trigflow_velocity``) a step is x0 = cos(t)·x − sin(t)·F, then
    x ← cos(t_next)·x0 + sin(t_next)·sigma_data·noise. ``schedule.timesteps`` holds the angles in radians and
    ``schedule.sigmas`` their flow levels sin t/(cos t + sin t), which is what SANA-Sprint's network is told.

    Attributes:
      sigma_data: standard deviation of the data.
      max_timesteps: first angle; None only with ``timesteps``.
      intermediate_timesteps: second angle of a run of two steps; None spaces the angles evenly and is required for any
        other number of steps.
      timesteps: all n + 1 angles in place of the above, from noise to data.
      num_train_timesteps: the largest number of steps.
    """

    sigma_data: float = 0.5
    max_timesteps: float | None = 1.57080
    intermediate_timesteps: float | None = 1.3
    timesteps: tuple[float, ...] | None = None
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS

    stochastic: ClassVar[bool] = True

    def __post_init__(self):
        require_positive("sigma_data", self.sigma_data)
        require_positive("num_train_timesteps", self.num_train_timesteps)
        if self.timesteps is None:
            if self.max_timesteps is None:
                raise UserError("SCM needs max_timesteps or timesteps; SANA-Sprint uses max_timesteps=1.5708")
            require_positive("max_timesteps", self.max_timesteps)
            if self.intermediate_timesteps is not None and not 0 < self.intermediate_timesteps < self.max_timesteps:
                raise UserError(
                    f"intermediate_timesteps={self.intermediate_timesteps} must lie between 0 and max_timesteps="
                    f"{self.max_timesteps}; SANA-Sprint uses 1.3, None spaces the angles evenly"
                )
            return
        given = [name for name in ("max_timesteps", "intermediate_timesteps") if getattr(self, name) is not None]
        if given:
            raise UserError(f"timesteps={self.timesteps} takes the place of {' and '.join(given)}; set those to None")
        object.__setattr__(self, "timesteps", tuple(float(angle) for angle in self.timesteps))
        if len(self.timesteps) < 2 or any(np.diff(self.timesteps) >= 0) or self.timesteps[-1] < 0:
            raise UserError(
                f"timesteps={self.timesteps} must be two or more angles that decrease and are not negative, "
                "e.g. (1.5708, 1.3, 0.0)"
            )

    def schedule(self, num_inference_steps: int) -> Schedule:
        """The angles of a run and their cosines and sines.

        Raises:
          UserError: if the number of steps is above ``num_train_timesteps``, differs from ``timesteps``, or is not 2
            while ``intermediate_timesteps`` is set.
        """
        steps = require_steps(num_inference_steps)
        if steps > self.num_train_timesteps:
            raise UserError(f"{steps} steps are more than num_train_timesteps={self.num_train_timesteps}; use fewer")
        if self.timesteps is not None:
            if len(self.timesteps) != steps + 1:
                raise UserError(
                    f"{len(self.timesteps)} timesteps do not make {steps} steps; give {steps + 1} angles, "
                    f"or num_inference_steps={len(self.timesteps) - 1}"
                )
            angles = np.array(self.timesteps, np.float32)
        elif self.intermediate_timesteps is not None:
            if steps != 2:
                raise UserError(
                    f"intermediate_timesteps={self.intermediate_timesteps} goes with 2 steps, not {steps}; "
                    "set intermediate_timesteps to None"
                )
            angles = np.array([self.max_timesteps, self.intermediate_timesteps, 0.0], np.float32)
        else:
            angles = _evenly_spaced(self.max_timesteps, steps)
        cos, sin = (function(angles.astype(np.float64)).astype(np.float32) for function in (np.cos, np.sin))
        return Schedule(timesteps=angles[:-1], sigmas=sin / (cos + sin), tables=SCMTables(cos, sin))

    def init(self, latents: Float[Array, "B *X"]) -> SCMState:
        """The state before the first step; ``latents`` are unit normal noise times ``sigma_data``."""
        latents = jnp.asarray(latents, jnp.float32)
        return SCMState(latents, jnp.zeros_like(latents))

    def step(
        self,
        schedule: Schedule,
        state: SCMState,
        index: int | Int[Array, ""],
        velocity: Float[Array, "B *X"],
        noise: Float[Array, "B *X"] | None = None,
    ) -> SCMState:
        """One consistency step in float32; ``velocity`` is the TrigFlow one, ``noise`` is unit normal.

        Raises:
          UserError: without noise. The last step multiplies it by 0 if the angles end at 0, yet takes it like the rest.
        """
        if noise is None:
            raise UserError("SCM adds noise at every step; pass key= or noise= to the loop, or noise= to step")
        tables: SCMTables = schedule.tables
        velocity = latents_like(state, velocity)
        denoised = entry(tables.cos, index) * state.latents - entry(tables.sin, index) * velocity
        noise = jnp.asarray(noise, jnp.float32) * self.sigma_data
        latents = entry(tables.cos, index + 1) * denoised + entry(tables.sin, index + 1) * noise
        return SCMState(latents, denoised)


def _evenly_spaced(first: float, steps: int) -> np.ndarray:
    """Angles from ``first`` down to 0, float32 (steps + 1,).

    Computed in float32, the first half from the front and the second from the back, which is how the reference rounds.
    """
    spacing = np.float32(first) / np.float32(steps)
    index = np.arange(steps + 1, dtype=np.float32)
    from_front, from_back = np.float32(first) - spacing * index, spacing * index[::-1]
    return np.where(index < (steps + 1) // 2, from_front, from_back)
