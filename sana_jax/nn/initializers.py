"""Initialisers of the published training code, where Flax has no equal."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def xavier_uniform(fused: int = 1) -> Callable:
    """Xavier uniform of a dense kernel (in, out) that is one of ``fused`` kernels drawn as a single wide one.

    Upstream draws q, k and v of self-attention as one (in, 3·out) matrix, and k and v of cross-attention as one
    (in, 2·out), which makes the bound ``sqrt(6 / (in + fused·out))`` smaller than for separate ones.
    """

    def initialize(key, shape, dtype=jnp.float32):
        bound = math.sqrt(6 / (math.prod(shape[:-1]) + fused * shape[-1]))
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialize


def torch_uniform(fan_in: int) -> Callable:
    """``U(±1/sqrt(fan_in))``: what PyTorch gives the weights and biases of a convolution left alone."""

    def initialize(key, shape, dtype=jnp.float32):
        bound = 1 / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialize


def scaled_normal(standard_deviation: float) -> Callable:
    """``N(0, standard_deviation²)``."""

    def initialize(key, shape, dtype=jnp.float32):
        return standard_deviation * jax.random.normal(key, shape, dtype)

    return initialize
