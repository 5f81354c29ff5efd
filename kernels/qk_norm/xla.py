"""The formula for XLA; differentiable in forward and reverse mode."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.linear_attention.rotation import rotate_pairs
from kernels.typing import Array, Float


def qk_norm(
    x: Float[Array, "... C"],
    scale: Float[Array, " C"],
    rotation: tuple[Float[Array, "N p"], Float[Array, "N p"]] | None,
    epsilon: float,
    relu: bool,
) -> Float[Array, "... C"]:
    """Same value as the reference, rounded to ``x``'s dtype after the norm and after the rotation."""
    normed = rms_norm(x, scale, epsilon)
    normed = jax.nn.relu(normed) if relu else normed
    if rotation is None:
        return normed
    heads = normed.astype(jnp.float32).reshape(*x.shape[:2], -1, 2 * rotation[0].shape[1])
    return rotate_pairs(heads, *rotation).reshape(x.shape).astype(x.dtype)


def rms_norm(x: Float[Array, "... C"], scale: Float[Array, " C"], epsilon: float) -> Float[Array, "... C"]:
    """``x / sqrt(mean(x²) + ε) · scale`` in float32, rounded once to ``x``'s dtype."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + epsilon)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)
