"""Both fast forms: each frame's d x d update is built once and used in both directions of time.

``scan`` takes one frame after another and holds one frame's tokens at a time, which is what a CPU's caches want.
``associative_scan`` builds and reads all frames at once and absorbs updates in pairs of growing size: more products,
but the number of them that wait for each other grows only with the logarithm of the number of frames.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.gated_delta_rule.state import DeltaState
from kernels.gated_delta_rule.updates import FrameUpdate, compose, frame_update
from kernels.linear_attention.rotation import rotate_pairs
from kernels.typing import Array, Float

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


def _scan(build, read, query, frames, angles, memory, starts_chunk):
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

    nothing = [jnp.zeros_like(x) for x in memory]
    memory, (updates, seen) = jax.lax.scan(forward, memory, (*frames, angles))
    _, out = jax.lax.scan(backward, nothing, (query, angles, updates, seen, starts_chunk), reverse=True)
    return out, memory


def _associative_scan(build, read, query, frames, angles, memory, starts_chunk):
    """All frames at once; returns what was read and the memories after the last frame."""

    def compose_each(earlier, later):
        return [compose(*pair) for pair in zip(earlier, later)]

    def memories(updates, reverse):
        composed = jax.lax.associative_scan(compose_each, updates, axis=0, reverse=reverse)
        return [update.addition for update in composed]

    def start_from(memory: Array, update: FrameUpdate) -> FrameUpdate:
        """The first frame's addition takes in what it makes of the memory given."""
        entering = jnp.matmul(update.transition[0], memory, precision="highest")
        return FrameUpdate(update.transition, update.addition.at[0].add(entering))

    def successor(x: Array) -> Array:
        """Of every frame the next one's; zeros, an update that forgets everything, at the end of a chunk."""
        has_next = np.append(~starts_chunk[1:], False).reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(has_next, jnp.roll(x, -1, axis=0), 0)

    updates = jax.vmap(build)(*frames, angles)
    seen = memories([start_from(*pair) for pair in zip(memory, updates)], reverse=False)
    later = memories(jax.tree.map(successor, updates), reverse=True)
    out = jax.vmap(read)(query, [before + after for before, after in zip(seen, later)], angles)
    return out, [x[-1] for x in seen]


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
    starts_chunk = np.isin(np.arange(frames), chunk_starts)
    out, memory = form(build, read, frame_first(query), inputs, angles, memory, starts_chunk)
    out = jnp.moveaxis(out.reshape(frames, tokens, batch, heads, -1), 2, 0)
    memory = [x.reshape(batch, heads, *x.shape[1:]) for x in memory]
    return out, DeltaState(memory[0], memory[1][..., 0] if normalised else None)


scan = functools.partial(_gated_delta_rule, _scan)
associative_scan = functools.partial(_gated_delta_rule, _associative_scan)
