"""From noise to latents: loops over the same sampler step.

``sample_scan`` is one ``jax.lax.scan``, for compiling a whole run. ``sample_loop`` steps on the host. Both call
``velocity_fn(latents, timestep)``, which closes over the network, its parameters, the prompt and the guidance, and both
give the same result. ``sample_steps`` is what pipelines compile: it takes any steps of a run, all of them in one call
or one by one with the same program, so that the number of steps, progress and callbacks compile nothing anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from sana_jax.diffusion.samplers.base import Sampler, Schedule
from sana_jax.errors import UserError

VelocityFunction = Callable[[Float[Array, "B *X"], Float[Array, ""]], Float[Array, "B *X"]]
StepCallback = Callable[[int, float, Float[Array, "B *X"]], bool | None]
AmendFunction = Callable[[int, Float[Array, "B *X"]], Float[Array, "B *X"]]
# (index, latents, memory) -> (velocity, memory for the next step)
RememberingVelocity = Callable[[Int[Array, ""], Float[Array, "B *X"], PyTree], tuple[Float[Array, "B *X"], PyTree]]

_FEWEST_ROWS = 8  # of the tables that ``pad_steps`` makes


def step_noise(key: PRNGKeyArray, index: int | Int[Array, ""], shape: tuple[int, ...]) -> Float[Array, "B *X"]:
    """Unit normal float32 noise of one step: a function of the key and the step's index alone."""
    return jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)


def sample_scan(
    sampler: Sampler,
    schedule: Schedule,
    velocity_fn: VelocityFunction,
    latents: Float[Array, "B *X"],
    key: PRNGKeyArray | None = None,
    *,
    noise: Float[Array, "n B *X"] | None = None,
    start_index: int = 0,
) -> Any:
    """Runs all steps as one ``jax.lax.scan``; may itself be jitted, with latents, key or noise traced.

    Args:
      sampler: one of ``sana_jax.diffusion.samplers``.
      schedule: ``sampler.schedule(num_inference_steps)``.
      velocity_fn: (latents, timestep) -> velocity of the latents' shape. Latents are float32; the timestep is a float32
        scalar, ``schedule.timesteps[i]``.
      latents: what the run starts from, as ``sampler.init`` takes it.
      key: seeds the noise of a stochastic sampler (see ``step_noise``); a deterministic one draws nothing from it.
      noise: the noise itself, unit normal, (n, *latents.shape), in place of ``key``.
      start_index: first step taken, for runs that start from a partly noised sample.

    Returns:
      The sampler's last state; its field ``latents`` holds the latents, float32 (``SCM`` also has ``denoised``).

    Raises:
      UserError: if noise is missing, superfluous or of the wrong shape, or ``start_index`` is not a step.
    """
    _check_run(sampler, schedule, latents, key, noise, start_index)
    schedule = jax.tree.map(jnp.asarray, schedule)

    def body(state, index):
        timestep = schedule.timesteps[index].astype(jnp.float32)
        velocity = velocity_fn(state.latents, timestep)
        injected = _noise(sampler, key, noise, index, state.latents.shape)
        return sampler.step(schedule, state, index, velocity, injected), None

    steps = jnp.arange(start_index, schedule.num_inference_steps, dtype=jnp.int32)
    state, _ = jax.lax.scan(body, sampler.init(latents), steps)
    return state


def sample_loop(
    sampler: Sampler,
    schedule: Schedule,
    velocity_fn: VelocityFunction,
    latents: Float[Array, "B *X"],
    key: PRNGKeyArray | None = None,
    on_step: StepCallback | None = None,
    *,
    noise: Float[Array, "n B *X"] | None = None,
    start_index: int = 0,
    amend: AmendFunction | None = None,
) -> Any:
    """Runs the steps from Python; the sampler's step is jitted, and ``velocity_fn`` is called as it is (jit it).

    Args:
      sampler: as in ``sample_scan``.
      schedule: as in ``sample_scan``.
      velocity_fn: as in ``sample_scan``.
      latents: as in ``sample_scan``.
      key: as in ``sample_scan``.
      on_step: called after every step as (index, timestep, latents) with the latents that the step made; if it returns
        False, the run ends there.
      noise: as in ``sample_scan``.
      start_index: as in ``sample_scan``.
      amend: called after every step as (index, latents); what it returns takes the latents' place, as inpainting does
        with what is known of the picture.

    Returns:
      The state after the last step taken.

    Raises:
      UserError: as ``sample_scan``.
    """
    _check_run(sampler, schedule, latents, key, noise, start_index)
    timesteps = [float(timestep) for timestep in schedule.timesteps]
    schedule = jax.tree.map(jnp.asarray, schedule)
    state = sampler.init(latents)
    for index in range(start_index, schedule.num_inference_steps):
        velocity = velocity_fn(state.latents, jnp.float32(timesteps[index]))
        injected = _noise(sampler, key, noise, index, state.latents.shape)
        state = _jitted_step(sampler, schedule, state, index, velocity, injected)
        if amend is not None:
            state = state._replace(latents=amend(index, state.latents))
        if on_step is not None and plain_truth(on_step(index, timesteps[index], state.latents)) is False:
            break
    return state


def plain_truth(answer: Any) -> Any:
    """A callback's answer; NumPy's and JAX's truth values, which comparisons of arrays give, as Python's own."""
    arrays = isinstance(answer, np.bool_ | np.ndarray | jax.Array)
    return bool(answer) if arrays and answer.shape == () and answer.dtype == np.bool_ else answer


class Progress(NamedTuple):
    """What ``sample_steps`` hands from step to step.

    Attributes:
        state: the sampler's; its field ``latents`` holds the latents.
        memory: what the velocity function keeps from step to step; () where it keeps nothing.
        first_bad: of every sample the first step after which it was not finite; -1 where there was none.
        next_step: the one after the last step that was taken; 0 before the first.
    """

    state: Any
    memory: PyTree
    first_bad: Int[Array, " B"]
    next_step: Int[Array, ""]

    def bad_step(self) -> tuple[int, Bool[np.ndarray, " B"]] | None:
        """The first step after which a sample was not finite, and which samples still were; None if all always were."""
        first_bad = np.asarray(self.first_bad)
        if (first_bad < 0).all():
            return None
        step = int(first_bad[first_bad >= 0].min())
        return step, first_bad != step


def begin_steps(sampler: Sampler, latents: Float[Array, "B *X"], memory: PyTree = ()) -> Progress:
    """The progress before the first step. It shares no memory with ``latents``, so that it can be donated."""
    state = sampler.init(jnp.array(latents, jnp.float32, copy=True))
    return Progress(state, memory, jnp.full((latents.shape[0],), -1, jnp.int32), jnp.int32(0))


def sample_steps(
    sampler: Sampler,
    schedule: Schedule,
    velocity_fn: RememberingVelocity,
    progress: Progress,
    start: int | Int[Array, ""],
    stop: int | Int[Array, ""],
    *,
    noise: Float[Array, "n B *X"] | None = None,
    amend: AmendFunction | None = None,
) -> Progress:
    """Takes the steps ``start`` to ``stop - 1``, both of which may be traced, in one loop on the device.

    Args:
        sampler: one of ``sana_jax.diffusion.samplers``.
        schedule: ``sampler.schedule(num_inference_steps)``, or that padded by ``pad_steps``.
        velocity_fn: (index, latents, memory) -> (velocity, memory).
        progress: of ``begin_steps``, or what an earlier call has returned.
        start: first step taken.
        stop: the step before which the loop ends.
        noise: unit normal, of every step of the schedule, for a stochastic sampler and no other.
        amend: called after every step as (index, latents); what it returns takes the latents' place.

    Raises:
        UserError: if noise is missing or superfluous.
    """
    if sampler.stochastic != (noise is not None):
        needs = "needs noise" if sampler.stochastic else "is deterministic and takes no noise"
        raise UserError(f"{type(sampler).__name__} {needs}; {'give' if sampler.stochastic else 'leave out'} noise=")
    schedule = jax.tree.map(jnp.asarray, schedule)

    def body(progress):
        state, memory, first_bad, index = progress
        velocity, memory = velocity_fn(index, state.latents, memory)
        state = sampler.step(schedule, state, index, velocity, None if noise is None else noise[index])
        if amend is not None:
            state = state._replace(latents=amend(index, state.latents))
        finite = jnp.isfinite(state.latents).all(axis=tuple(range(1, state.latents.ndim)))
        first_bad = jnp.where((first_bad < 0) & ~finite, index, first_bad)
        return Progress(state, memory, first_bad, index + 1)

    begin = progress._replace(next_step=jnp.asarray(start, jnp.int32))
    return jax.lax.while_loop(lambda progress: progress.next_step < stop, body, begin)


def pad_steps(num_inference_steps: int, tables: PyTree) -> PyTree:
    """Per-step tables, their first axis lengthened to the next power of two of steps, so that programs are shared.

    What is added repeats the last row, and is not read. Tables of n + 1 rows keep the one more.

    Args:
        num_inference_steps: n.
        tables: arrays of n or n + 1 rows, such as a ``Schedule`` has.
    """
    more = max(_FEWEST_ROWS, 1 << (num_inference_steps - 1).bit_length()) - num_inference_steps

    def pad(table):
        xp = jnp if isinstance(table, jax.Array) else np
        return xp.concatenate([table, xp.repeat(table[-1:], more, axis=0)])

    return jax.tree.map(pad, tables)


@functools.partial(jax.jit, static_argnums=0)
def _jitted_step(sampler, schedule, state, index, velocity, noise):
    return sampler.step(schedule, state, index, velocity, noise)


def _noise(sampler, key, noise, index, shape):
    if not sampler.stochastic:
        return None
    return step_noise(key, index, shape) if noise is None else noise[index]


def _check_run(sampler, schedule, latents, key, noise, start_index) -> None:
    name = type(sampler).__name__
    if sampler.stochastic and (key is None) == (noise is None):
        raise UserError(f"{name} needs exactly one of key and noise; pass key=jax.random.key(seed)")
    if not sampler.stochastic and noise is not None:
        raise UserError(f"{name} is deterministic and takes no noise; leave it out")
    steps = schedule.num_inference_steps
    if noise is not None and jnp.shape(noise) != (steps, *jnp.shape(latents)):
        raise UserError(
            f"noise of shape {jnp.shape(noise)} does not give every step its own; it must have the shape "
            f"{(steps, *jnp.shape(latents))}"
        )
    if not 0 <= start_index < steps:
        raise UserError(f"start_index={start_index} is not one of the steps 0 to {steps - 1}; choose one of them")
