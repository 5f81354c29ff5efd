"""The definition: frame after frame, first forward, then backward through every chunk. Slow, for tests."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from kernels.gated_delta_rule.state import DeltaState
from kernels.linear_attention.rotation import rotate_pairs
from kernels.typing import Array, Float


def gated_delta_rule(
    query: Float[Array, "B T S h d"],
    key: Float[Array, "B T S h d"],
    value: Float[Array, "B T S h e"],
    beta: Float[Array, "B T S h"],
    decay: Float[Array, "B T h"],
    rotation: tuple[Float[Array, "N p"], Float[Array, "N p"]] | None,
    chunk_starts: Sequence[int],
    state: DeltaState,
    key_scale: float = 1.0,
    epsilon: float = 1e-8,
) -> tuple[Float[Array, "B T S h e"], DeltaState]:
    """Every frame reads what the frames up to it wrote, and what the later frames of its own chunk wrote."""
    work = jnp.promote_types(value.dtype, jnp.float32)
    query, key, values, beta, decay = (x.astype(work) for x in (query, key, value, beta, decay))
    key = key * key_scale
    rest = beta, decay, chunk_starts
    turned = (query, key) if rotation is None else (_rotate(x, *rotation) for x in (query, key))
    numerator, key_value = _both_directions(*turned, values, *rest, state.key_value.astype(work))
    if state.key is None:
        return numerator.astype(value.dtype), DeltaState(key_value)
    ones, memory = jnp.ones_like(values[..., :1]), state.key.astype(work)[..., None]
    denominator, memory = _both_directions(query, key, ones, *rest, memory)
    return (numerator / (denominator + epsilon)).astype(value.dtype), DeltaState(key_value, memory[..., 0])


def _rotate(x, cos, sin):
    batch, frames, tokens, heads, size = x.shape
    return rotate_pairs(x.reshape(batch, frames * tokens, heads, size), cos, sin).reshape(x.shape)


def _both_directions(query, key, value, beta, decay, chunk_starts, memory):
    """What every query reads, and the forward memory after the last frame."""

    def absorb(memory, t):
        memory = decay[:, t, :, None, None] * memory
        missing = value[:, t] - jnp.einsum("bshd,bhde->bshe", key[:, t], memory, precision="highest")
        written = jnp.einsum("bshd,bshe->bhde", beta[:, t, :, :, None] * key[:, t], missing, precision="highest")
        return memory + written

    def read(memory, t):
        return jnp.einsum("bshd,bhde->bshe", query[:, t], memory, precision="highest")

    frames, outputs = query.shape[1], []
    for t in range(frames):
        memory = absorb(memory, t)
        outputs.append(read(memory, t))
    for start, end in zip(chunk_starts, (*chunk_starts[1:], frames)):
        later = jnp.zeros_like(memory)
        for t in reversed(range(start, end)):
            outputs[t] += read(later, t)
            later = absorb(later, t)
    return jnp.stack(outputs, axis=1), memory
