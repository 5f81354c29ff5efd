"""The formulas as written, with every token pair spelt out: O(N²) memory, for tests."""

from __future__ import annotations

import jax.numpy as jnp

from kernels.linear_attention.rotation import rotate_pairs
from kernels.typing import Array, Float


def relu_linear_attention(
    query: Float[Array, "B N h d"], key: Float[Array, "B M h d"], value: Float[Array, "B M h e"], epsilon: float = 1e-15
) -> Float[Array, "B N h e"]:
    """``out_n = Σ_m (relu(q_n)·relu(k_m)) v_m / (Σ_m relu(q_n)·relu(k_m) + ε)`` in float32."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    weights = jnp.einsum("bnhd,bmhd->bhnm", jnp.maximum(query, 0), jnp.maximum(key, 0), precision="highest")
    weights = weights / (weights.sum(-1, keepdims=True) + epsilon)
    return jnp.einsum("bhnm,bmhe->bnhe", weights, value, precision="highest")


def rope_linear_attention(
    query: Float[Array, "B N h d"],
    key: Float[Array, "B N h d"],
    value: Float[Array, "B N h e"],
    cos: Float[Array, "N p"],
    sin: Float[Array, "N p"],
    epsilon: float = 1e-15,
) -> Float[Array, "B N h e"]:
    """``out_n = Σ_m (R_n relu(q_n)·R_m relu(k_m)) v_m / (Σ_m relu(q_n)·relu(k_m) + ε)`` in float32."""
    query, key = (jnp.maximum(x.astype(jnp.float32), 0) for x in (query, key))
    plain = jnp.einsum("bnhd,bmhd->bhnm", query, key, precision="highest")
    query, key = rotate_pairs(query, cos, sin), rotate_pairs(key, cos, sin)
    weights = jnp.einsum("bnhd,bmhd->bhnm", query, key, precision="highest") / (plain.sum(-1, keepdims=True) + epsilon)
    return jnp.einsum("bhnm,bmhe->bnhe", weights, value.astype(jnp.float32), precision="highest")
