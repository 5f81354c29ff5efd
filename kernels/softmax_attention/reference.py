"""The definition with every pair of query and key spelt out, in float32 or better, for tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.softmax_attention.visibility import keys_by_length, seen_pairs, zero_where_nothing_is_seen
from kernels.typing import Array, Bool, Float, Int


def attend(
    query: Float[Array, "B M h d"],
    key: Float[Array, "B N k d"],
    value: Float[Array, "B N k e"],
    mask: Bool[Array, "#B P Q"] | None = None,
    bias: Float[Array, "#B #h #M #N"] | None = None,
    key_lengths: Int[Array, " B"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B M h e"]:
    """``softmax(cap(scale · q kᵀ) + bias) v``; ``cap(x) = c·tanh(x/c)``; every k-th part of the heads shares keys."""
    work, groups = jnp.promote_types(query.dtype, jnp.float32), query.shape[2] // key.shape[2]
    wide = query.astype(work), *(jnp.repeat(x.astype(work), groups, axis=2) for x in (key, value))
    scores = jnp.einsum("bmhd,bnhd->bhmn", *wide[:2], precision="highest")
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = scores if bias is None else scores + bias
    mask = keys_by_length(key_lengths, key.shape[1]) if mask is None else mask
    seen = seen_pairs(mask, query.shape[1], key.shape[1], causal)
    if seen is not None:
        scores = jnp.where(seen, scores, -1e30)
    out = jnp.einsum("bhmn,bnhe->bmhe", jax.nn.softmax(scores, axis=-1), wide[2], precision="highest")
    return zero_where_nothing_is_seen(out, mask, causal, key.shape[1]).astype(query.dtype)
