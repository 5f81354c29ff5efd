"""What a train step takes on each device: counted from shapes, measured by the compiler, estimated by tracing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from kernels.typing import PyTree
from sana_jax.compilation import readable_bytes
from sana_jax.errors import UserError
from train.state import TrainState

# Of one block's intermediates, kept at once by its backward pass where all of them are kept for all blocks anyway.
_LAST_BLOCK = 0.75
_SMALLEST_SAVING = 0.02  # of the whole, below which a change is no advice
_MOST_ADVICE = 5
_LONGEST_REASON = 160


class Memory(NamedTuple):
    """Bytes on each device while a step runs."""

    parameters: int
    """Those that are trained."""
    frozen: int
    """The base model's."""
    optimizer: int
    average: int
    batch: int
    gradients: int
    activations: int
    """Temporaries of the step beside the gradients, and results that take no argument's place."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class Activations(NamedTuple):
    """What one device's share of a loss keeps for its backward pass, in bytes."""

    saved: int
    """Kept from the forward pass, on the device."""
    working: int
    """What the backward pass of one block computes again or holds beside it."""


def device_bytes(tree: PyTree) -> int:
    """Bytes of a tree's arrays, or their shapes, on each device."""
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _leaf_bytes(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def fixed_memory(state: TrainState, frozen: PyTree | None, batch: PyTree, gradient_copies: int = 1) -> Memory:
    """All but the activations, from shapes with shardings."""
    parameters = device_bytes(state.params)
    return Memory(
        parameters=parameters,
        frozen=device_bytes(frozen),
        optimizer=device_bytes(state.opt_state) + device_bytes(state.step),
        average=device_bytes(state.ema),
        batch=device_bytes(batch),
        gradients=gradient_copies * parameters,
        activations=0,
    )


def compiled_bytes(compiled: jax.stages.Compiled) -> int | None:
    """What a compiled function needs on each device, by the compiler's own analysis: what ``compile_ahead`` prints."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + outputs + analysis.temp_size_in_bytes


def traced_activations(
    loss: Callable[..., Any],
    keeping_all: Callable[..., Any],
    arguments: Sequence[PyTree],
    layers: int,
    remat: str,
    platform: str,
) -> Activations:
    """Estimates the activations of a loss by tracing; nothing is compiled.

    Args:
        loss: a function whose first argument are the trained parameters, with the policy ``remat`` in its blocks.
        keeping_all: the same loss with the policy ``none``.
        arguments: as shapes, without shardings.
        layers: blocks.
        remat: the policy.
        platform: of the devices.
    """
    saved = _saved_bytes(loss, arguments, platform)
    block = (saved if remat == "none" else _saved_bytes(keeping_all, arguments, platform)) // layers
    again = _LAST_BLOCK * block if remat == "none" else max(block - saved / layers, block / 4)
    return Activations(saved, int(again))


def _saved_bytes(loss: Callable[..., Any], arguments: Sequence[PyTree], platform: str) -> int:
    """Bytes that the forward pass keeps on the device for the backward pass, beside arrays that were there before."""

    def kept(trained, *others):
        return jax.tree.leaves(jax.vjp(lambda trained: loss(trained, *others), trained)[1])

    jaxpr = jax.make_jaxpr(kept)(*arguments).jaxpr
    there_before = {*jaxpr.invars, *jaxpr.constvars}
    found = {var for var in jaxpr.outvars if not isinstance(var, Literal)} - there_before
    return sum(_kept_bytes(var.aval, platform) for var in found)


def _kept_bytes(aval: Any, platform: str) -> int:
    if not hasattr(aval, "shape") or getattr(aval, "memory_space", None) == jax.memory.Space.Host:
        return 0
    # A CPU computes bfloat16 in float32 and keeps most of it so.
    width = 4 if aval.dtype == jnp.bfloat16 and platform == "cpu" else aval.dtype.itemsize
    return math.prod(aval.shape) * width


class Choice(NamedTuple):
    """A change of a configuration, and what a device would then need."""

    option: str
    total: int
    price: str
    """What it costs, in a few words."""


@contextlib.contextmanager
def advice_when_memory_ends(needed_and_choices: Callable[[], tuple[int | None, list[Choice]]]) -> Iterator[None]:
    """Turns the devices' running out of memory into one line with what would need less, the best first.

    Args:
        needed_and_choices: bytes per device of the run as it is, where they are known, and what other settings would
            need; called when there is an error.

    Raises:
        UserError: there was not enough memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(out_of_memory_line(str(error), *needed_and_choices())) from error


def out_of_memory_line(reason: str, needed: int | None, choices: list[Choice]) -> str:
    """The message for a device that has run out of memory."""
    line = f"a device ran out of memory ({' '.join(reason.split())[:_LONGEST_REASON]})"
    if needed is not None:
        line += f"; the step needs {readable_bytes(needed)} on each device"
        choices = [choice for choice in choices if choice.total < (1 - _SMALLEST_SAVING) * needed]
    listed = sorted(choices, key=lambda choice: choice.total)[:_MOST_ADVICE]
    about = ", ".join(f"{choice.option} (about {readable_bytes(choice.total)})" for choice in listed)
    return (
        line
        + (f"; it would need less with {about}" if about else "; no single setting would make it much less")
        + ", or a smaller --batch-size or --data.resolution: --plan shows all of it. Another process may hold the "
        "device's memory: nvidia-smi names it"
    )
