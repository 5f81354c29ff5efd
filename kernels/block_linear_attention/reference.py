"""The definition with every token pair spelt out and no state: O(N²) memory, for tests."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from kernels.linear_attention.rotation import rotate_pairs
from kernels.typing import Array, Float


def block_linear_attention(
    query: Float[Array, "B N h d"],
    key: Float[Array, "B N h d"],
    value: Float[Array, "B N h e"],
    cos: Float[Array, "N p"],
    sin: Float[Array, "N p"],
    block_starts: Sequence[int],
    num_cached_blocks: int | None = None,
    epsilon: float = 1e-15,
) -> Float[Array, "B N h e"]:
    """Linear attention with rotary positions over the pairs whose key's block is the query's or one it still sees."""
    query, key = (jnp.maximum(x.astype(jnp.float32), 0) for x in (query, key))
    block = jnp.searchsorted(jnp.asarray(block_starts), jnp.arange(query.shape[1]), side="right")
    distance = block[:, None] - block[None, :]
    visible = (distance >= 0) & (distance <= (num_cached_blocks or len(block_starts)))
    plain = jnp.einsum("bnhd,bmhd->bhnm", query, key, precision="highest") * visible
    query, key = rotate_pairs(query, cos, sin), rotate_pairs(key, cos, sin)
    weights = jnp.einsum("bnhd,bmhd->bhnm", query, key, precision="highest") * visible
    weights = weights / (plain.sum(-1, keepdims=True) + epsilon)
    return jnp.einsum("bhnm,bmhe->bnhe", weights, value.astype(jnp.float32), precision="highest")
