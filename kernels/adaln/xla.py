"""The formulas for XLA, which fuses each of them; differentiable in forward and reverse mode."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.typing import Array, Float


def layer_norm(x: Float[Array, "... C"], epsilon: float) -> Float[Array, "... C"]:
    """Layer normalisation without scale and shift; biased variance in two passes; returns float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)


def modulated_norm(
    x: Float[Array, "*B N D"], shift: Float[Array, "*#B 1 D"], scale: Float[Array, "*#B 1 D"], epsilon: float
) -> Float[Array, "*B N D"]:
    """``LayerNorm(x) · (1 + scale) + shift`` in float32, rounded once to ``x``'s dtype."""
    return (layer_norm(x, epsilon) * (1 + scale) + shift).astype(x.dtype)


def gated_residual(
    x: Float[Array, "*B N D"], gate: Float[Array, "*#B 1 D"], update: Float[Array, "*B N D"]
) -> Float[Array, "*B N D"]:
    """``x + gate · update`` in float32, rounded once to ``x``'s dtype."""
    return (x.astype(jnp.float32) + gate * update.astype(jnp.float32)).astype(x.dtype)
