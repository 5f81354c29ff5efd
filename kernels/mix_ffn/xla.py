"""The layers one after another, for XLA to fuse: on a CPU all of them, on a GPU what surrounds the convolution."""

from __future__ import annotations

import jax.numpy as jnp

from kernels.activations import silu
from kernels.bias import add_bias
from kernels.depthwise_conv import depthwise_conv2d
from kernels.typing import Array, Float
from kernels.written_once import written_once


def mix_ffn(
    x: Float[Array, "B H W E"], bias: Float[Array, " E"], kernel: Float[Array, "3 3 E"], depth_bias: Float[Array, " E"]
) -> Float[Array, "B H W F"]:
    """Same value as the reference; differentiable in forward and reverse mode; the result keeps ``x``'s dtype."""
    x = add_bias(depthwise_conv2d(silu(add_bias(x, bias)), kernel), depth_bias)
    value, gate = jnp.split(written_once(x), 2, axis=-1)
    return value * silu(gate)
