"""Normalisations, accumulated in float32 whatever the compute dtype is."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from kernels.adaln.xla import layer_norm
from kernels.qk_norm import qk_norm
from kernels.typing import Array, Float

__all__ = ["RMSNorm", "layer_norm", "rms_norm"]


def rms_norm(x: Float[Array, "... C"], scale: Float[Array, " C"], epsilon: float) -> Float[Array, "... C"]:
    """``x / sqrt(mean(x²) + ε) · scale`` in float32, rounded once to ``x``'s dtype."""
    return qk_norm(x, scale, epsilon=epsilon)


class RMSNorm(nn.Module):
    """``rms_norm`` with a learned scale that starts at ``initial_scale``."""

    epsilon: float
    initial_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """Normalises the last axis."""
        scale = self.param("scale", nn.initializers.constant(self.initial_scale), (x.shape[-1],), jnp.float32)
        return rms_norm(x, scale, self.epsilon)
