"""Block by block: each block's own sums, then what it sees of those before it. O(N) memory, O(blocks) programs."""

from __future__ import annotations

import jax.numpy as jnp

from kernels.block_linear_attention.state import BlockSums
from kernels.linear_attention.xla import read_summary, summarise
from kernels.typing import Array, Float


def block_linear_attention(
    query: Float[Array, "B N h d"],
    key: Float[Array, "B N h d"],
    value: Float[Array, "B N h e"],
    cos: Float[Array, "N p"],
    sin: Float[Array, "N p"],
    block_starts: tuple[int, ...],
    state: BlockSums,
    epsilon: float = 1e-15,
) -> tuple[Float[Array, "B N h e"], BlockSums]:
    """Same value as the reference; differentiable, the state too; the result keeps ``value``'s dtype."""
    query, key = (jnp.maximum(x, 0).astype(jnp.float32) for x in (query, key))
    outputs = []
    for start, end in zip(block_starts, (*block_starts[1:], query.shape[1])):
        tokens = slice(start, end)
        angles = cos[tokens], sin[tokens]
        own_key_value, own_key = summarise(key[:, tokens], value[:, tokens], *angles)
        seen = state.key_value.sum(0) + own_key_value, state.key.sum(0) + own_key
        outputs.append(read_summary(query[:, tokens], *seen, *angles, epsilon))
        state = _append(state, own_key_value, own_key)
    return jnp.concatenate(outputs, axis=1).astype(value.dtype), state


def _append(state: BlockSums, key_value: Float[Array, "B h d e"], key: Float[Array, "B h d"]) -> BlockSums:
    """The state after one more block: its sums are added, or take the place of the oldest block's."""

    def append(slots: Array, new: Array) -> Array:
        if state.num_cached_blocks is None:
            return slots + new
        return jnp.concatenate([slots[1:], new[None]])

    return BlockSums(append(state.key_value, key_value), append(state.key, key), state.num_cached_blocks)
