"""The formula as written, with every token pair spelt out: O(N²) memory, for tests."""

from __future__ import annotations

import jax.numpy as jnp

from kernels.typing import Array, Float


def relu_linear_attention(
    query: Float[Array, "B N h d"], key: Float[Array, "B M h d"], value: Float[Array, "B M h e"], epsilon: float = 1e-15
) -> Float[Array, "B N h e"]:
    """``out_n = Σ_m (relu(q_n)·relu(k_m)) v_m / (Σ_m relu(q_n)·relu(k_m) + ε)`` in float32."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    weights = jnp.einsum("bnhd,bmhd->bhnm", jnp.maximum(query, 0), jnp.maximum(key, 0), precision="highest")
    weights = weights / (weights.sum(-1, keepdims=True) + epsilon)
    return jnp.einsum("bhnm,bmhe->bnhe", weights, value, precision="highest")
