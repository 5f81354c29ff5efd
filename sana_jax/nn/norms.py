"""Normalisations, accumulated in float32 whatever the compute dtype is."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.typing import Array, Float


def layer_norm(x: Float[Array, "... C"], epsilon: float) -> Float[Array, "... C"]:
    """Layer normalisation without scale and shift; biased variance in two passes; returns float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)


def rms_norm(x: Float[Array, "... C"], scale: Float[Array, " C"], epsilon: float) -> Float[Array, "... C"]:
    """``x / sqrt(mean(x²) + ε) · scale`` in float32, rounded once to ``x``'s dtype."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + epsilon)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nn.Module):
    """``rms_norm`` with a learned scale that starts at ``initial_scale``."""

    epsilon: float
    initial_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """Normalises the last axis."""
        scale = self.param("scale", nn.initializers.constant(self.initial_scale), (x.shape[-1],), jnp.float32)
        return rms_norm(x, scale, self.epsilon)
