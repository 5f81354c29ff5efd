"""Linear form: the d x d summary of keys and values is built once and read by every query. O(N) memory."""

from __future__ import annotations

import jax.numpy as jnp

from kernels.typing import Array, Float


def relu_linear_attention(
    query: Float[Array, "B N h d"], key: Float[Array, "B M h d"], value: Float[Array, "B M h e"], epsilon: float = 1e-15
) -> Float[Array, "B N h e"]:
    """Same value as the reference; differentiable in forward and reverse mode; the result keeps ``value``'s dtype."""
    # ReLU commutes with the widening cast, so half-precision inputs are read once.
    query, key = (jnp.maximum(x, 0).astype(jnp.float32) for x in (query, key))
    # Full float32 products: a TF32 or bfloat16 summary of a few thousand tokens loses the small ones.
    summary = jnp.einsum("bmhd,bmhe->bhde", key, value.astype(jnp.float32), precision="highest")
    numerator = jnp.einsum("bnhd,bhde->bnhe", query, summary, precision="highest")
    denominator = jnp.einsum("bnhd,bhd->bnh", query, key.sum(1), precision="highest")
    return (numerator / (denominator[..., None] + epsilon)).astype(value.dtype)
