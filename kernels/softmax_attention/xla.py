"""All scores at once, for XLA to fuse: where keys are few, or queries."""

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
    """Same value as the reference; differentiable in both modes; weights are rounded to ``value``'s dtype."""
    queries, keys = query.shape[1], key.shape[1]
    mask = keys_by_length(key_lengths, keys) if mask is None else mask
    if soft_cap is None and query.shape[2] == key.shape[2] and key.shape == value.shape:
        seen = seen_pairs(mask, queries, keys, causal=False)
        out = jax.nn.dot_product_attention(
            query, key, value, bias, seen, scale=scale, is_causal=causal, implementation="xla"
        )
    else:
        out = _grouped(query, key, value, seen_pairs(mask, queries, keys, causal), bias, scale, soft_cap)
    return zero_where_nothing_is_seen(out, mask, causal, keys)


def _grouped(
    query: Float[Array, "B M h d"],
    key: Float[Array, "B N k d"],
    value: Float[Array, "B N k e"],
    seen: Bool[Array, "#B 1 #M N"] | None,
    bias: Float[Array, "#B #h #M #N"] | None,
    scale: float | None,
    soft_cap: float | None,
) -> Float[Array, "B M h e"]:
    """What JAX's own function has not: a soft cap, values of another size, and heads that share keys without copies."""
    batch, queries, heads, size = query.shape
    shared = key.shape[2]
    query = query.reshape(batch, queries, shared, heads // shared, size)
    work = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", query, key, preferred_element_type=work)
    scores = scores * (size**-0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if bias is not None:
        split = (shared, heads // shared) if bias.shape[1] == heads else (1, 1)
        scores = scores + bias.reshape(bias.shape[0], *split, *bias.shape[2:])
    if seen is not None:
        scores = jnp.where(seen[:, None], scores, jnp.finfo(work).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bhgqk,bkhd->bqhgd", weights, value)
    return out.reshape(batch, queries, heads, value.shape[-1]).astype(query.dtype)
