"""A pipeline's sampling steps as one compiled program: all of them in one call, or some at a time with the same one."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from kernels.typing import Array, Float, PyTree
from sana_jax.compilation import Program, Programs, readable_bytes
from sana_jax.diffusion.samplers import Sampler, Schedule
from sana_jax.diffusion.sampling import Progress, begin_steps, pad_steps, sample_steps
from sana_jax.errors import UserError

GuidanceBatching = Literal["auto", "batched", "split"]
GUIDANCE_BATCHINGS = ("auto", "batched", "split")


class Step(NamedTuple):
    """What is known of a step when it is taken.

    Attributes:
        index: its number.
        timestep: the sampler's.
        sigma: the noise level before it.
        next_sigma: the noise level after it.
        numbers: its row of each of the caller's tables.
    """

    index: Array
    timestep: Float[Array, ""]
    sigma: Float[Array, ""]
    next_sigma: Float[Array, ""]
    numbers: Any


# (params, inputs, step, latents, memory) -> (velocity, memory for the next step)
StepVelocity = Callable[[PyTree, PyTree, Step, Array, PyTree], tuple[Array, PyTree]]
# (inputs, step, latents) -> latents
StepAmendment = Callable[[PyTree, Step, Array], Array]


class Denoising(NamedTuple):
    """One call's denoising, but for the weights.

    Attributes:
        what: what the functions below close over, with which programs are told apart.
        sampler: takes the steps.
        schedule: the steps.
        velocity: the network with its guidance.
        inputs: what it reads at every step: prompts, pictures.
        tables: what it reads of a step: arrays of as many rows as there are steps.
        memory: what it keeps between steps, before the first.
        noise: of every step, for a sampler that draws noise.
        amend: changes the latents after a step; None leaves them.
    """

    what: Hashable
    sampler: Sampler
    schedule: Schedule
    velocity: StepVelocity
    inputs: PyTree
    tables: PyTree = ()
    memory: PyTree = ()
    noise: Float[Array, "n B *X"] | None = None
    amend: StepAmendment | None = None

    def begin(self, start: Float[Array, "B *X"]) -> Progress:
        """The progress before the first step, which shares no memory with ``start`` or with this."""
        return begin_steps(self.sampler, start, jax.tree.map(jnp.array, self.memory))

    def compiled(
        self, programs: Programs, name: str, params: PyTree, start: Float[Array, "B *X"], identity: Any
    ) -> tuple[Program, Denoiser]:
        """The program, and the function that calls it with these parameters.

        Args:
            programs: where programs are kept; they serve other numbers of steps too.
            name: of the network, for messages.
            params: the network's.
            start: the latents of the first step.
            identity: of the network, for programs kept on disk; see ``sana_jax.executables``.
        """
        steps = self.schedule.num_inference_steps
        tables = (self.schedule, self.tables, self.noise)
        arguments = (params, self.inputs, *pad_steps(steps, jax.tree.map(jnp.asarray, tables)))
        program = programs.get(
            name,
            (self.what, self.sampler),
            _program(self.sampler, self.velocity, self.amend),
            *arguments,
            self.begin(start),
            jnp.int32(0),
            jnp.int32(0),
            donate=(5,),  # the progress; parameters stay for the next call, and no result has their shapes
            identity=identity,
        )
        return program, Denoiser(self, program.run, arguments)


def _program(sampler: Sampler, velocity: StepVelocity, amend: StepAmendment | None) -> Callable:
    """The function that is compiled. It holds no array of a call, which would stay in memory with it."""

    def run(params, inputs, schedule, tables, noise, progress, start, stop):
        def at(index: Array) -> Step:
            levels = (schedule.timesteps[index], schedule.sigmas[index], schedule.sigmas[index + 1])
            return Step(index, *levels, jax.tree.map(lambda table: table[index], tables))

        def step_velocity(index, latents, memory):
            return velocity(params, inputs, at(index), latents, memory)

        def step_amend(index, latents):
            return amend(inputs, at(index), latents)

        amends = None if amend is None else step_amend
        return sample_steps(sampler, schedule, step_velocity, progress, start, stop, noise=noise, amend=amends)

    return run


class Denoiser:
    """A compiled denoising with its parameters: takes steps."""

    def __init__(self, denoising: Denoising, run: Callable, arguments: tuple) -> None:
        self.denoising = denoising
        self._run, self._arguments = run, arguments

    def begin(self, start: Float[Array, "B *X"]) -> Progress:
        """The progress before the first step, which shares no memory with ``start``."""
        return self.denoising.begin(start)

    def with_tables(self, change: Callable[[PyTree], PyTree]) -> Denoiser:
        """The same program with other tables; ``change`` makes them of these, which are padded."""
        params, inputs, schedule, tables, noise = self._arguments
        return Denoiser(self.denoising, self._run, (params, inputs, schedule, change(tables), noise))

    def __call__(self, progress: Progress, start: int, stop: int) -> Progress:
        """Takes the steps ``start`` to ``stop - 1``; ``progress`` is used up."""
        return self._run(*self._arguments, progress, jnp.int32(start), jnp.int32(stop))


# -- guidance's parts: one batch, or one after another ---------------------------------------------------------------


def check_guidance_batching(batching: str, guided: bool) -> None:
    """Raises ``UserError`` for a value that is not allowed, or that would not be used."""
    if batching not in GUIDANCE_BATCHINGS:
        raise UserError(f"guidance_batching {batching!r} is not allowed; choose one of {', '.join(GUIDANCE_BATCHINGS)}")
    if batching != "auto" and not guided:
        raise UserError(
            f"guidance_batching {batching} would not be used without guidance, where the network sees each sample "
            "once; leave it out, or raise guidance_scale above 1"
        )


def fitting_program(
    batching: GuidanceBatching,
    guided: bool,
    compiled: Callable[[bool], tuple[Program, Denoiser]],
    params: PyTree,
    *,
    may_split: bool = True,
    budget: int | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Program, Denoiser]:
    """The program that is asked for; for ``auto``, the one batch where it fits into the device's free memory.

    What a program needs beside its arguments, which are there already, is the compiler's own figure.

    Args:
        batching: see above.
        guided: whether there are several parts.
        compiled: compiles it for the parts one after another (True) or in one batch.
        params: the network's, for the device that they are on.
        may_split: whether ``auto`` may choose so.
        budget: bytes that the program is to keep within, arguments included; None sets no bound.
        say: prints what was chosen.
    """
    if not guided:
        return compiled(False)
    if batching != "auto":
        program, denoiser = compiled(batching == "split")
        if program.seconds:
            say(f"guidance: {_PARTS[batching == 'split']}, as asked for")
        return program, denoiser
    needed, together = None, None
    try:
        together = compiled(False)
        needed = together[0].working_bytes
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or not may_split:
            raise
    free = free_device_bytes(params)
    over = (
        together is not None and None not in (budget, together[0].device_bytes) and (together[0].device_bytes > budget)
    )
    unknown = together is not None and (needed is None or free is None)
    if not over and (unknown or (together is not None and needed <= free)):
        if together[0].seconds:
            why = "the device does not say how much is free" if unknown else f"{_fits(needed, free)}"
            say(f"guidance: {_PARTS[False]} ({why})")
        return together
    if over:
        why = f"it holds {readable_bytes(together[0].device_bytes)}, and memory leaves it {readable_bytes(budget)}"
    else:
        why = "the compiler found no room for one batch" if needed is None else _fits(needed, free, "but only")
    if not may_split:
        say(f"guidance: {_PARTS[False]}, which may run out of memory ({why}); step_cache needs it")
        return together
    say(f"guidance: {_PARTS[True]} ({why})")
    return compiled(True)


_PARTS = {False: "prompt and negative prompt in one batch", True: "prompt and negative prompt one after another"}


def _fits(needed: int, free: int, word: str = "and") -> str:
    return f"it needs {readable_bytes(needed)} beside what is in memory, {word} {readable_bytes(free)} are free"


def free_device_bytes(params: PyTree) -> int | None:
    """Bytes that are free on the device with the least room of those that hold ``params``; None if it does not say."""
    devices = {device for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array) for device in leaf.devices()}
    free = []
    for device in devices:
        statistics = device.memory_stats() or {}
        if "bytes_limit" not in statistics or "bytes_in_use" not in statistics:
            return None
        free.append(statistics["bytes_limit"] - statistics["bytes_in_use"])
    return min(free, default=None)
