"""Step caching as pipelines use it: its options, what a run is given and keeps, and what it reports."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Bool, Float, PyTree
from sana_jax.diffusion.sampling import Progress, pad_steps
from sana_jax.diffusion.step_caching import (
    Decision,
    StepCache,
    StepCacheMemory,
    StepCacheReport,
    check_step_cache,
    empty_memory,
    latents_error,
    required_steps,
)
from sana_jax.errors import UserError
from sana_jax.pipelines.denoising import Denoiser, GuidanceBatching, Step


@dataclasses.dataclass(frozen=True)
class StepCaching:
    """What a call asks for.

    Attributes:
        threshold: see ``sana_jax.diffusion.step_caching``.
        measures_error: whether every step is taken as well, for comparison.
    """

    threshold: float
    measures_error: bool

    @classmethod
    def asked_for(
        cls, threshold: float | None, measures_error: bool, steps_taken: int, batching: GuidanceBatching
    ) -> StepCaching | None:
        """Of a call's arguments; None where it asks for none.

        Raises:
            UserError: a value that is not allowed, or arguments that exclude one another or would not be used.
        """
        if threshold is None:
            if measures_error:
                raise UserError(
                    "step_cache_error would not be used without step_cache; set a threshold or leave it out"
                )
            return None
        check_step_cache(threshold, steps_taken)
        if batching == "split":
            raise UserError(
                "step_cache with guidance_batching split is not allowed: steps are skipped for prompt and negative "
                "prompt together; leave one of them out"
            )
        return cls(float(threshold), measures_error)

    def tables(self, first: int, num_inference_steps: int) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Of every step the threshold, and whether it is computed in any case; the last of a denoising's tables."""
        return np.full(num_inference_steps, self.threshold, np.float32), required_steps(first, num_inference_steps)

    def report(
        self, denoiser: Denoiser, start: Float[Array, "B *X"], progress: Progress, memory: StepCacheMemory, first: int
    ) -> StepCacheReport:
        """What was skipped, printed; with the error against the same run at threshold 0, if that is asked for.

        Args:
            denoiser: of the run.
            start: its first latents.
            progress: after it.
            memory: this part of the progress' own.
            first: its first step.
        """
        stop = int(progress.next_step)
        report = StepCacheReport.of(self.threshold, memory, first, stop)
        if self.measures_error:
            full = denoiser.with_tables(_without_threshold)(denoiser.begin(start), first, stop)
            error = latents_error(progress.state.latents, full.state.latents)
            report = dataclasses.replace(report, error=error)
        print(report if self.measures_error else f"{report} (step_cache_error measures it)")
        return report


def memory_before(shape: tuple[int, int, int], dtype: jnp.dtype, num_inference_steps: int) -> StepCacheMemory:
    """The memory before the first step of a network whose tokens (B, N, D) have this shape and dtype."""
    memory = empty_memory(shape, dtype, num_inference_steps)
    decided = {"computed": memory.computed, "changes": memory.changes}
    return memory._replace(**pad_steps(num_inference_steps, decided))


def cache_of(memory: StepCacheMemory, threshold: Float[Array, ""], required: Bool[Array, ""]) -> StepCache:
    """What the network is given at a step."""
    return StepCache(memory.signal, memory.residual, memory.accumulated, threshold, required)


def memory_after(memory: StepCacheMemory, step: Step, cache: StepCache, decision: Decision) -> StepCacheMemory:
    """The memory after a step, of what the network has returned."""
    computed = memory.computed.at[step.index].set(decision.compute)
    changes = memory.changes.at[step.index].set(decision.change)
    return StepCacheMemory(cache.signal, cache.residual, cache.accumulated, computed, changes)


def _without_threshold(tables: PyTree) -> PyTree:
    """The tables of a run in which every step is computed, by the same program."""
    *others, threshold, required = tables
    return (*others, jnp.zeros_like(threshold), required)
