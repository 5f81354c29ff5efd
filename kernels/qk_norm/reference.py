"""The formula as written, in float32, for tests."""

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
    """``R relu(x / sqrt(mean(x²) + ε) · scale)``, float32; R turns adjacent channel pairs of each head."""
    x, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
    normed = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale
    normed = jax.nn.relu(normed) if relu else normed
    if rotation is None:
        return normed
    return rotate_pairs(normed.reshape(*x.shape[:2], -1, 2 * rotation[0].shape[1]), *rotation).reshape(x.shape)
