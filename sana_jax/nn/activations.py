"""Activations whose inside is float32 whatever the compute dtype is."""

from __future__ import annotations

import jax

from kernels.activations import rounded_once, silu
from kernels.typing import Array, Float

__all__ = ["gelu_tanh", "silu"]


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU in its tanh form, rounded once to ``x``'s dtype."""
    return rounded_once(lambda x: jax.nn.gelu(x, approximate=True), x)
