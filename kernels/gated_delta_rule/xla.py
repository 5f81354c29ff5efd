"""Both fast forms: each frame's d x d update is built once and used in both directions of time.

``scan`` takes one frame after another and holds one frame's tokens at a time, which is what a CPU's caches want.
``associative_scan`` builds and reads all frames at once and absorbs updates in pairs of growing size: more products,
but the number of them that wait for each other grows only with the logarithm of the number of frames.

Where frames are split over a mesh axis (``axis_name``), both compose a device's frames first, in each direction of
time, and go on from the memory that enters them; ``scan`` then keeps the updates instead of building them again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.gated_delta_rule.split_frames import entering_memory
from kernels.gated_delta_rule.state import DeltaState
from kernels.gated_delta_rule.updates import FrameUpdate, compose, frame_update, identity_update
from kernels.linear_attention.rotation import rotate_pairs
from kernels.split_frames import all_frames, own_part
from kernels.typing import Array, Bool, Float, PyTree

# Lists below have one entry per memory: the numerator's, and the normaliser's where there is one. G counts the heads of
# all examples.
Angles = tuple[Float[Array, "... S p"], Float[Array, "... S p"]]


def _frame_updates(
    key: Float[Array, "S G d"],
    value: Float[Array, "S G e"],
    beta: Float[Array, "S G"],
    decay: Float[Array, "G"],
    angles: Angles | None,
    normalised: bool,
    key_scale: float,
) -> list[FrameUpdate]:
    """The updates of one frame, in float32 or better."""
    work = jnp.promote_types(value.dtype, jnp.float32)
    key, value, beta, decay = (x.astype(work) for x in (key, value, beta, decay))
    turned = _rotate(key, angles)
    # products over the tokens of one head: heads in front, or the compiler reorders the tokens of all frames instead
    turned, key, value, beta = (jnp.swapaxes(x, 0, 1) for x in (turned, key, value, beta))
    updates = [frame_update(turned, value, beta, decay, key_scale)]
    return [*updates, frame_update(key, None, beta, decay, key_scale)] if normalised else updates


def _rotate(x: Float[Array, "S G d"], angles: Angles | None) -> Float[Array, "S G d"]:
    return x if angles is None else rotate_pairs(x[None], *angles)[0]


def _read_frame(
    query: Float[Array, "S G d"], memory: list[Array], angles: Angles | None, epsilon: float, dtype: Any
) -> Float[Array, "S G e"]:
    """What the queries of one frame find in the memories."""
    query = query.astype(memory[0].dtype)
    turned = jnp.swapaxes(_rotate(query, angles), 0, 1)
    out = jnp.swapaxes(jnp.einsum("gsd,gde->gse", turned, memory[0], precision="highest"), 0, 1)
    if len(memory) > 1:
        denominator = jnp.einsum("sgd,gd->sg", query, memory[1][..., 0], precision="highest")
        out = out / (denominator[..., None] + epsilon)
    return out.astype(dtype)


def _scan(build, read, query, frames, angles, memory, starts_chunk, axis_name):
    """One frame after another, forward and then backward; returns what was read and the memories after the last."""

    def forward(memory, inputs):
        updates = build(*inputs)
        memory = [update(before) for update, before in zip(updates, memory)]
        return memory, (updates, memory)

    def backward(later, inputs):
        query, angles, updates, seen, first_of_chunk = inputs
        out = read(query, [before + after for before, after in zip(seen, later)], angles)
        # what comes before a chunk's first frame knows nothing of the chunk
        later = [jnp.where(first_of_chunk, 0, update(after)) for update, after in zip(updates, later)]
        return later, out

    later, inputs = [jnp.zeros_like(x) for x in memory], (*frames, angles)
    if axis_name is not None:
        runs, updates = composed_frames(build, inputs, starts_chunk, memory)
        memory, last = entering_memories(runs[0], memory, axis_name)
        later, _ = entering_memories(runs[1], later, axis_name, reverse=True)
        build, inputs = (lambda *updates: list(updates)), tuple(updates)
    memory, (updates, seen) = jax.lax.scan(forward, memory, inputs)
    _, out = jax.lax.scan(backward, later, (query, angles, updates, seen, starts_chunk), reverse=True)
    return out, memory if axis_name is None else last


def composed_frames(
    build: Callable[..., list[FrameUpdate]],
    inputs: tuple[PyTree, ...],
    starts_chunk: Bool[Array, " T"],
    memory: list[Float[Array, "G d _"]],
) -> tuple[tuple[list[FrameUpdate], list[FrameUpdate]], list[FrameUpdate]]:
    """The update of all frames, forward and backward, per memory; and those of each frame.

    Args:
        build: one frame's updates, one for each memory, from its part of ``inputs``.
        inputs: arrays with an axis of T frames in front.
        starts_chunk: whether a frame is the first of its chunk.
        memory: any of the memories' shapes and dtypes.
    """

    def forward(run, inputs):
        updates = build(*inputs)
        return _compose_each(run, updates), updates

    def backward(run, inputs):
        updates, first_of_chunk = inputs
        return jax.tree.map(lambda x: jnp.where(first_of_chunk, 0, x), _compose_each(run, updates)), None

    def nothing(memory: Array) -> FrameUpdate:
        return identity_update(FrameUpdate(jnp.zeros((*memory.shape[:2], memory.shape[1]), memory.dtype), memory))

    before = [nothing(x) for x in memory]
    run, updates = jax.lax.scan(forward, before, inputs)
    backward_run, _ = jax.lax.scan(backward, before, (updates, starts_chunk), reverse=True)
    return (run, backward_run), updates


def _compose_each(earlier: list[FrameUpdate], later: list[FrameUpdate]) -> list[FrameUpdate]:
    return [compose(*pair) for pair in zip(earlier, later)]


def entering_memories(
    updates: list[FrameUpdate], memory: list[Float[Array, "G d _"]], axis_name: str, reverse: bool = False
) -> tuple[list[Float[Array, "G d _"]], list[Float[Array, "G d _"]]]:
    """``entering_memory`` of every memory: those that enter, and those that leave."""
    found = [entering_memory(*pair, axis_name, reverse=reverse) for pair in zip(updates, memory)]
    return [enters for enters, _ in found], [leaves for _, leaves in found]


def _associative_scan(build, read, query, frames, angles, memory, starts_chunk, axis_name):
    """All frames at once; returns what was read and the memories after the last frame."""

    def forget_at_starts(x: Array) -> Array:
        """What comes before a chunk's first frame knows nothing of the chunk."""
        return jnp.where(starts_chunk.reshape(-1, *[1] * (x.ndim - 1)), 0, x)

    def start_from(memory: Array, update: FrameUpdate) -> FrameUpdate:
        """The first frame's addition takes in what it makes of the memory given."""
        entering = jnp.matmul(update.transition[0], memory, precision="highest")
        return FrameUpdate(update.transition, update.addition.at[0].add(entering))

    updates = jax.vmap(build)(*frames, angles)
    starting = updates
    if axis_name is None:
        starting = [start_from(*pair) for pair in zip(memory, updates)]
    runs = jax.lax.associative_scan(_compose_each, starting, axis=0)
    back = jax.tree.map(forget_at_starts, updates)
    back = jax.lax.associative_scan(_compose_each, back, axis=0, reverse=True)
    if axis_name is None:
        seen, later = ([run.addition for run in found] for found in (runs, back))
        last, ends = [x[-1] for x in seen], [jnp.zeros_like(x) for x in memory]
    else:
        entering, last = entering_memories(jax.tree.map(lambda x: x[-1], runs), memory, axis_name)
        nothing = [jnp.zeros_like(x) for x in memory]
        ends, _ = entering_memories(jax.tree.map(lambda x: x[0], back), nothing, axis_name, reverse=True)
        seen, later = ([run(x) for run, x in zip(*pair)] for pair in ((runs, entering), (back, ends)))
    # a frame reads what those behind it have left
    later = [jnp.concatenate([x[1:], end[None]]) for x, end in zip(later, ends)]
    out = jax.vmap(read)(query, [before + after for before, after in zip(seen, later)], angles)
    return out, last


def _gated_delta_rule(
    form,
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
) -> tuple[Float[Array, "B T S h e"], DeltaState]:
    """Same value as the reference; differentiable in both modes, the state too; the result keeps ``value``'s dtype."""
    batch, frames, tokens, heads, _ = query.shape
    normalised = state.key is not None
    work = jnp.promote_types(value.dtype, jnp.float32)

    def frame_first(x: Array) -> Array:
        """(B, T, S, h, ...) -> (T, S, G, ...), which for one example is no copy."""
        return jnp.moveaxis(x, 0, 2).reshape(frames, tokens, batch * heads, *x.shape[4:])

    inputs = *(frame_first(x) for x in (key, value, beta)), jnp.moveaxis(decay, 0, 1).reshape(frames, batch * heads)
    angles = None if rotation is None else tuple(x.reshape(frames, tokens, -1).astype(work) for x in rotation)
    memory = [state.key_value] + ([state.key[..., None]] if normalised else [])
    memory = [x.astype(work).reshape(batch * heads, *x.shape[2:]) for x in memory]
    # The gradient keeps a frame's inputs and update, not what lies between: that is cheap, and as large as the inputs.
    build = functools.partial(_frame_updates, normalised=normalised, key_scale=key_scale)
    build = jax.checkpoint(build, prevent_cse=False)
    read = functools.partial(_read_frame, epsilon=epsilon, dtype=value.dtype)
    starts_chunk = np.isin(np.arange(all_frames(frames, axis_name)), chunk_starts)
    starts_chunk = own_part(starts_chunk, frames, axis_name)
    out, memory = form(build, read, frame_first(query), inputs, angles, memory, starts_chunk, axis_name)
    out = jnp.moveaxis(out.reshape(frames, tokens, batch, heads, -1), 2, 0)
    memory = [x.reshape(batch, heads, *x.shape[1:]) for x in memory]
    return out, DeltaState(memory[0], memory[1][..., 0] if normalised else None)


scan = functools.partial(_gated_delta_rule, _scan)
associative_scan = functools.partial(_gated_delta_rule, _associative_scan)
