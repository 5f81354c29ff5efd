"""Step caching: steps at which a network's blocks hardly change are not computed; what the blocks last added is reused.

As in TeaCache (Liu et al., arXiv 2411.19108): the input of the first block, modulated by time, is compared with that of
the step before. Its relative changes add up from the last step that was computed; while they stay below a threshold,
the difference between the last block's output and the first block's input that was computed then is added again.
Changes are taken as they are: TeaCache's polynomials, fitted for each model, do not exist for SANA.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Bool, Float
from sana_jax.errors import UserError

FEWEST_STEPS = 3  # the first and the last one are always computed


class StepCache(NamedTuple):
    """What a network is given beside its inputs, to skip its blocks.

    Attributes:
        signal: the first block's modulated input at the step before.
        residual: what the blocks added at the last step that was computed, float32.
        accumulated: the changes of ``signal`` since then.
        threshold: the blocks are skipped while ``accumulated`` is below it; 0 computes every step.
        required: whether this step is computed in any case.
    """

    signal: Float[Array, "B N D"]
    residual: Float[Array, "B N D"]
    accumulated: Float[Array, ""]
    threshold: Float[Array, ""]
    required: Bool[Array, ""]


class StepCacheMemory(NamedTuple):
    """What is kept from step to step: a ``StepCache``'s first three fields, and what was decided at every step."""

    signal: Float[Array, "B N D"]
    residual: Float[Array, "B N D"]
    accumulated: Float[Array, ""]
    computed: Bool[Array, " n"]
    changes: Float[Array, " n"]


class Decision(NamedTuple):
    """Of one step: whether the blocks are computed, the relative change of their input, and the changes added up."""

    compute: Bool[Array, ""]
    change: Float[Array, ""]
    accumulated: Float[Array, ""]


def decide(cache: StepCache, signal: Float[Array, "B N D"]) -> Decision:
    """Whether this step's blocks are computed; one decision for the whole batch. What is not finite is computed."""
    before, now = cache.signal.astype(jnp.float32), signal.astype(jnp.float32)
    change = jnp.mean(jnp.abs(now - before)) / jnp.mean(jnp.abs(before))
    accumulated = cache.accumulated + change
    compute = cache.required | ~(accumulated < cache.threshold)
    return Decision(compute, change, jnp.where(compute, 0.0, accumulated))


def empty_memory(shape: tuple[int, int, int], dtype: jnp.dtype, rows: int) -> StepCacheMemory:
    """The memory before the first step, for a network whose token stream (B, N, D) has this shape and dtype."""
    signal, residual = jnp.zeros(shape, dtype), jnp.zeros(shape, jnp.float32)
    return StepCacheMemory(signal, residual, jnp.float32(0), jnp.zeros(rows, bool), jnp.zeros(rows, jnp.float32))


def required_steps(first: int, num_inference_steps: int) -> Bool[np.ndarray, " n"]:
    """The steps that are computed in any case: the first that is taken, and the last."""
    index = np.arange(num_inference_steps)
    return (index == first) | (index == num_inference_steps - 1)


def check_step_cache(threshold: float, steps_taken: int) -> None:
    """Raises ``UserError`` for a threshold that is not allowed, and for runs too short to skip anything."""
    if (
        not isinstance(threshold, int | float | np.integer | np.floating)
        or not math.isfinite(threshold)
        or threshold < 0
    ):
        raise UserError(f"step_cache {threshold!r} is not allowed; choose a threshold from 0 (every step is computed)")
    if steps_taken < FEWEST_STEPS:
        raise UserError(
            f"step_cache would not be used in {steps_taken} steps, of which the first and the last are always "
            f"computed; leave it out, or take {FEWEST_STEPS} or more"
        )


@dataclasses.dataclass(frozen=True)
class StepCacheReport:
    """What a run with step caching did.

    Attributes:
        threshold: the one that was asked for.
        computed: of every step taken, whether it was computed.
        changes: of every step taken, the relative change of the blocks' input; of the first one nan.
        error: of the latents against those of the run that computes every step, the norm of the difference relative
            to their norm; None where it was not measured.
    """

    threshold: float
    computed: tuple[bool, ...]
    changes: tuple[float, ...]
    error: float | None = None

    @classmethod
    def of(cls, threshold: float, memory: StepCacheMemory, first: int, stop: int) -> StepCacheReport:
        """The report of a run that took the steps ``first`` to ``stop - 1``."""
        computed = tuple(bool(value) for value in np.asarray(memory.computed)[first:stop])
        changes = (math.nan, *(float(value) for value in np.asarray(memory.changes)[first + 1 : stop]))
        return cls(threshold, computed, changes)

    def __str__(self) -> str:
        measured = "not measured" if self.error is None else f"{self.error:.3g} of the latents' norm"
        return (
            f"step cache {self.threshold:g}: {sum(self.computed)} of {len(self.computed)} steps were computed; error "
            f"against computing all of them: {measured}"
        )


def latents_error(latents: Float[Array, "B *X"], full: Float[Array, "B *X"]) -> float:
    """The norm of the difference relative to the norm of ``full``."""
    latents, full = np.asarray(latents, np.float64), np.asarray(full, np.float64)
    return float(np.linalg.norm(latents - full) / np.linalg.norm(full))
