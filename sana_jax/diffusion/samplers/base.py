"""The contract that all samplers share.

A sampler is a frozen dataclass of its settings. ``schedule`` lays out the steps on the host in NumPy, ``init`` makes
the state of a run, and ``step`` is a pure function (schedule, state, index, velocity) -> state that works under
``jax.lax.scan`` with a traced index as well as in a Python loop. ``sana_jax.diffusion.sampling`` has both loops.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int
from sana_jax.errors import UserError


class Schedule(NamedTuple):
    """The steps of a run, in order from noise to data; NumPy arrays on the host, or JAX arrays as arguments of a jit.

    Attributes:
      timesteps: what the network is told at every step, in its own units, float32 (n,).
      sigmas: flow noise level before every step and after the last, float32 (n + 1,).
      tables: further per-step numbers of the sampler that made the schedule; its own NamedTuple, or ().
    """

    timesteps: np.ndarray
    sigmas: np.ndarray
    tables: Any = ()

    @property
    def num_inference_steps(self) -> int:
        """n, the number of steps and of network evaluations."""
        return len(self.timesteps)


class LatentState(NamedTuple):
    """State of a sampler that remembers nothing but the latents, float32."""

    latents: Float[Array, "B *X"]


@runtime_checkable
class Sampler(Protocol):
    """What the loops of ``sana_jax.diffusion.sampling`` need of a sampler."""

    stochastic: ClassVar[bool]

    def schedule(self, num_inference_steps: int) -> Schedule:
        """Lays out a run of ``num_inference_steps`` steps."""

    def init(self, latents: Float[Array, "B *X"]) -> Any:
        """The state before the first step; a NamedTuple of fixed shapes with the field ``latents``."""

    def step(
        self,
        schedule: Schedule,
        state: Any,
        index: int | Int[Array, ""],
        velocity: Float[Array, "B *X"],
        noise: Float[Array, "B *X"] | None = None,
    ) -> Any:
        """The state after step ``index``, given the network's velocity at ``state.latents``.

        ``noise`` is standard normal of the latents' shape; exactly the samplers with ``stochastic`` set take it.
        """


def require_steps(num_inference_steps: int) -> int:
    """Returns the number of steps as an int, or raises ``UserError`` if it is not a whole number of at least 1."""
    if isinstance(num_inference_steps, bool) or int(num_inference_steps) != num_inference_steps:
        raise UserError(f"num_inference_steps={num_inference_steps!r} is not a whole number; give 1 or more")
    if num_inference_steps < 1:
        raise UserError(
            f"num_inference_steps={num_inference_steps} must be at least 1; SANA uses 20, Sprint 2, video 50"
        )
    return int(num_inference_steps)


def require_positive(name: str, value: float | int) -> None:
    """Raises ``UserError`` unless ``value`` is above 0 and finite."""
    if not (value > 0 and np.isfinite(value)):
        raise UserError(f"{name}={value!r} must be a positive number; see the model's scheduler_config.json")


def entry(table: Array | np.ndarray, index: int | Int[Array, ""]) -> Array:
    """One number of a per-step table as a float32 scalar; ``index`` may be traced."""
    return jnp.asarray(table, jnp.float32)[index]


def latents_like(state: Any, velocity: Float[Array, "B *X"]) -> Float[Array, "B *X"]:
    """The velocity in float32, once its shape is known to be that of the latents.

    Raises:
        UserError: it is another one.
    """
    if jnp.shape(velocity) != jnp.shape(state.latents):
        raise UserError(
            f"the velocity has shape {jnp.shape(velocity)} but the latents {jnp.shape(state.latents)}; "
            "velocity_fn must return one velocity for every latent"
        )
    return jnp.asarray(velocity, jnp.float32)


def refuse_noise(sampler: Any, noise: Array | None) -> None:
    """Raises ``UserError`` if noise is handed to a sampler that has no use for it."""
    if noise is not None:
        raise UserError(f"{type(sampler).__name__} is deterministic and takes no noise; leave noise and key out")
