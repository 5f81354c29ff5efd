"""How the GPU forms are put together from their three parts: frames' updates, the scan over frames, and reading.

``pallas`` and ``triton`` have the parts. Here are shapes, the order of channels (``tiles``), and what devices tell each
other where frames are split over them: then XLA composes the updates that the kernel has built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.gated_delta_rule import tiles, xla
from kernels.gated_delta_rule.state import DeltaState
from kernels.gated_delta_rule.tiles import LARGEST_HEAD, Sizes
from kernels.gated_delta_rule.updates import FrameUpdate
from kernels.refusal import Refusal
from kernels.split_frames import all_frames, own_part
from kernels.typing import Array, Float


class Parts(NamedTuple):
    """The kernels of one form, with the arguments and results of ``pallas_update``, ``_scan`` and ``_read``."""

    update: Callable
    scan: Callable
    read: Callable


def run(
    name: str,
    parts: Parts,
    query: Float[Array, "B T S h d"],
    key: Float[Array, "B T S h d"],
    value: Float[Array, "B T S h e"],
    beta: Float[Array, "B T S h"],
    decay: Float[Array, "B T h"],
    rotation: tuple[Float[Array, "N p"], Float[Array, "N p"]] | None,
    chunk_starts: tuple[int, ...],
    state: DeltaState,
    key_scale: float = 1.0,
    epsilon: float = 1e-8,
    axis_name: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T S h e"], DeltaState]:
    """The rule from its parts; ``name`` is the form's, for messages.

    Raises:
        ValueError: for float64 inputs, heads larger than a program's registers hold, or (when gradients are taken) a
            rotation that should get one.
    """
    _check(name, (query, key, value, beta, decay, state.key_value), query.shape[-1], value.shape[-1])
    key_size = query.shape[-1]
    if key_size % 2:  # only where nothing is rotated; a channel of zeros changes nothing
        query, key = (_one_more(x, -1) for x in (query, key))
        state = DeltaState(_one_more(state.key_value, -2), None if state.key is None else _one_more(state.key, -1))
    sizes = Sizes(*query.shape, value.shape[-1], rotation is not None, interpret)
    angles = None
    if rotation is not None:
        shape = sizes.frames, sizes.tokens, sizes.pairs
        angles = tuple(_without_gradient(name, x.astype(jnp.float32)).reshape(shape) for x in rotation)
    normalised = state.key is not None
    updates = parts.update(sizes, normalised, key_scale, key, value, beta, decay, angles)
    memory = [state.key_value] + ([state.key[..., None]] if normalised else [])
    memory = [tiles.split_rows(x.astype(jnp.float32), sizes) for x in memory]
    pairs = [(updates.transition, updates.addition), (updates.plain_transition, updates.plain_addition)][: len(memory)]
    starts_chunk = np.isin(np.arange(all_frames(sizes.frames, axis_name)), chunk_starts)
    starts_chunk = jnp.asarray(own_part(starts_chunk, sizes.frames, axis_name), jnp.int32)
    entering, last = [(x, jnp.zeros_like(x)) for x in memory], None
    if axis_name is not None:
        entering, last = _entering(sizes, pairs, memory, starts_chunk, axis_name)
    found = [parts.scan(sizes, *pair, starts_chunk, jnp.stack(x)) for pair, x in zip(pairs, entering)]
    seen, left = [x for x, _ in found], [leaving[0] for _, leaving in found]
    out = parts.read(sizes, value.dtype, epsilon, query, seen[0], seen[1] if normalised else None, angles)
    last = [tiles.join_rows(x, sizes)[:, :, :key_size] for x in (left if last is None else last)]
    return out, DeltaState(last[0], last[1][..., 0] if normalised else None)


def _check(name: str, arrays: tuple[Array, ...], key_size: int, value_size: int) -> None:
    if any(x.dtype == jnp.float64 for x in arrays):
        raise Refusal(f"implementation={name!r}: float64 inputs or state: its sums are float32; use 'xla' for float64")
    if max(key_size, value_size) > LARGEST_HEAD:
        raise Refusal(
            f"implementation={name!r}: heads of {key_size} and {value_size} channels: its programs hold up to "
            f"{LARGEST_HEAD}; use 'xla'"
        )


def _one_more(x: Array, axis: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = 0, 1
    return jnp.pad(x, widths)


def _entering(
    sizes: Sizes,
    pairs: list[tuple[Array, Array]],
    memory: list[Float[Array, "B h 2 p e"]],
    starts_chunk: Array,
    axis_name: str,
) -> tuple[list[tuple[Array, Array]], list[Array]]:
    """What enters this device's frames, forward and going back, and what leaves the last frame of all; per memory."""

    def flat(x: Array) -> Array:
        return x.reshape(-1, sizes.key, x.shape[-1])

    def frame_first(transition: Array, addition: Array) -> FrameUpdate:
        split = jnp.moveaxis(transition, 1, 0), jnp.moveaxis(addition, 1, 0)
        shape = sizes.frames, sizes.batch * sizes.heads, sizes.key
        return FrameUpdate(split[0].reshape(*shape, sizes.key), split[1].reshape(*shape, -1))

    flat_memory, updates = [flat(x) for x in memory], [frame_first(*pair) for pair in pairs]
    (forward, backward), _ = xla.composed_frames(
        lambda *given: list(given), tuple(updates), starts_chunk > 0, flat_memory
    )
    enters, last = xla.entering_memories(forward, flat_memory, axis_name)
    nothing = [jnp.zeros_like(x) for x in flat_memory]
    enters_back, _ = xla.entering_memories(backward, nothing, axis_name, reverse=True)
    entering, back, last = ([x.reshape(y.shape) for x, y in zip(z, memory)] for z in (enters, enters_back, last))
    return list(zip(entering, back)), last


def _without_gradient(name: str, x: Array) -> Array:
    """``x``, of which no derivative can be taken."""

    @jax.custom_jvp
    def same(x: Any) -> Any:
        return x

    @same.defjvp
    def _refuse(primals, tangents):
        raise ValueError(f"implementation={name!r}: it has no gradient by the rotation; use 'xla', or take none by it")

    return same(x)
