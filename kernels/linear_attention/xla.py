"""Linear form: the d x d summary of keys and values is built once and read by every query. O(N) memory."""

from __future__ import annotations

import jax.numpy as jnp

from kernels.linear_attention.rotation import rotate_pairs
from kernels.typing import Array, Float


def relu_linear_attention(
    query: Float[Array, "B N h d"], key: Float[Array, "B M h d"], value: Float[Array, "B M h e"], epsilon: float = 1e-15
) -> Float[Array, "B N h e"]:
    """Same value as the reference; differentiable in forward and reverse mode; the result keeps ``value``'s dtype."""
    # ReLU commutes with the widening cast, so half-precision inputs are read once.
    query, key = (_heads_first(jnp.maximum(x, 0).astype(jnp.float32)) for x in (query, key))
    key_value = _key_value(key, _heads_first(value.astype(jnp.float32)))
    return _read(query, key_value, key.sum(2), epsilon).swapaxes(1, 2).astype(value.dtype)


def rope_linear_attention(
    query: Float[Array, "B N h d"],
    key: Float[Array, "B N h d"],
    value: Float[Array, "B N h e"],
    cos: Float[Array, "N p"],
    sin: Float[Array, "N p"],
    epsilon: float = 1e-15,
) -> Float[Array, "B N h e"]:
    """Same value as the reference; differentiable in forward and reverse mode; the result keeps ``value``'s dtype."""
    query, key = (jnp.maximum(x, 0).astype(jnp.float32) for x in (query, key))
    key_value, key_sum = summarise(key, value, cos, sin)
    return read_summary(query, key_value, key_sum, cos, sin, epsilon).astype(value.dtype)


def summarise(
    key: Float[Array, "B N h d"], value: Float[Array, "B N h e"], cos: Float[Array, "N p"], sin: Float[Array, "N p"]
) -> tuple[Float[Array, "B h d e"], Float[Array, "B h d"]]:
    """``Σ (R k) vᵀ`` and ``Σ k`` over tokens, float32; keys are float32 and after their ReLU."""
    rotated = _heads_first(rotate_pairs(key, cos, sin))
    return _key_value(rotated, _heads_first(value.astype(jnp.float32))), key.sum(1)


def read_summary(
    query: Float[Array, "B N h d"],
    key_value: Float[Array, "B h d e"],
    key_sum: Float[Array, "B h d"],
    cos: Float[Array, "N p"],
    sin: Float[Array, "N p"],
    epsilon: float,
) -> Float[Array, "B N h e"]:
    """What every query gets from the two sums of ``summarise``; queries are float32 and after their ReLU."""
    rotated, query = _heads_first(rotate_pairs(query, cos, sin)), _heads_first(query)
    return _read(query, key_value, key_sum, epsilon, rotated).swapaxes(1, 2)


# -- heads before tokens: otherwise XLA's CPU backend turns operands and gradients of every product around -------------


def _heads_first(x: Float[Array, "B N h d"]) -> Float[Array, "B h N d"]:
    return x.swapaxes(1, 2)


def _key_value(key: Float[Array, "B h N d"], value: Float[Array, "B h N e"]) -> Float[Array, "B h d e"]:
    # Full float32 products: a TF32 or bfloat16 summary of a few thousand tokens loses the small ones.
    return jnp.einsum("bhmd,bhme->bhde", key, value, precision="highest")


def _read(
    query: Float[Array, "B h N d"],
    key_value: Float[Array, "B h d e"],
    key_sum: Float[Array, "B h d"],
    epsilon: float,
    rotated: Float[Array, "B h N d"] | None = None,
) -> Float[Array, "B h N e"]:
    """``rotated`` reads the numerator; the query itself where it is None."""
    numerator = jnp.einsum("bhnd,bhde->bhne", query if rotated is None else rotated, key_value, precision="highest")
    denominator = jnp.einsum("bhnd,bhd->bhn", query, key_sum, precision="highest")
    return numerator / (denominator[..., None] + epsilon)
