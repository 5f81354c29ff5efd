"""Which keys a query sees: masks by blocks of tokens, by key lengths, and causal."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Bool, Float, Int


def keys_by_length(lengths: Int[Array, " B"] | None, keys: int) -> Bool[Array, "B 1 N"] | None:
    """The mask that keeps the first keys of every example, as many as ``lengths`` says."""
    return None if lengths is None else jnp.arange(keys) < lengths[:, None, None]


def causal_blocks(starts: tuple[int, ...], tokens: int) -> Bool[np.ndarray, "1 P P"]:
    """The mask by which a token sees those of its own block and of earlier ones, with as few rows as will do."""
    step = math.gcd(tokens, *starts)
    own = np.searchsorted(starts, np.arange(0, tokens, step), side="right")
    return (own <= own[:, None])[None]


def seen_pairs(
    mask: Bool[Array, "#B P Q"] | None, queries: int, keys: int, causal: bool
) -> Bool[Array, "#B 1 #M N"] | None:
    """Whether each query sees each key; a mask of one row stays one row. None for all."""
    seen = None
    if mask is not None:
        seen = jnp.repeat(mask, keys // mask.shape[2], axis=2)
        seen = (seen if mask.shape[1] == 1 else jnp.repeat(seen, queries // mask.shape[1], axis=1))[:, None]
    if causal:
        earlier = jnp.arange(keys) <= jnp.arange(queries)[:, None]
        seen = earlier[None, None] if seen is None else seen & earlier
    return seen


def zero_where_nothing_is_seen(
    out: Float[Array, "B M h e"], mask: Bool[Array, "#B P Q"] | None, causal: bool, keys: int
) -> Float[Array, "B M h e"]:
    """``out`` with 0 for queries that see no key; causal ones without a mask see their own."""
    if mask is None:
        return out
    queries = out.shape[1]
    if causal:
        some = seen_pairs(mask, queries, keys, causal).any((1, 3))
    else:
        some = jnp.repeat(mask.any(2), queries // mask.shape[1], axis=1)
    return jnp.where(some[:, :, None, None], out, 0)
