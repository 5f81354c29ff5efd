"""The formulas as written, in float32, for tests."""

from __future__ import annotations

import jax.numpy as jnp

from kernels.typing import Array, Float


def modulated_norm(
    x: Float[Array, "*B N D"], shift: Float[Array, "*#B 1 D"], scale: Float[Array, "*#B 1 D"], epsilon: float
) -> Float[Array, "*B N D"]:
    """``(x - mean(x)) / sqrt(var(x) + ε) · (1 + scale) + shift`` over the last axis, float32."""
    x = x.astype(jnp.float32)
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + epsilon) * (1 + scale) + shift


def gated_residual(
    x: Float[Array, "*B N D"], gate: Float[Array, "*#B 1 D"], update: Float[Array, "*B N D"]
) -> Float[Array, "*B N D"]:
    """``x + gate · update``, float32."""
    return x.astype(jnp.float32) + gate * update.astype(jnp.float32)
