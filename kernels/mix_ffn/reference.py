"""The formula as written, in float32, for tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.depthwise_conv.reference import depthwise_conv2d
from kernels.typing import Array, Float


def mix_ffn(
    x: Float[Array, "B H W E"], bias: Float[Array, " E"], kernel: Float[Array, "3 3 E"], depth_bias: Float[Array, " E"]
) -> Float[Array, "B H W F"]:
    """``value · SiLU(gate)`` of ``(value, gate) = depthwise3x3(SiLU(x + bias)) + depth_bias``, float32."""
    x, bias, kernel, depth_bias = (array.astype(jnp.float32) for array in (x, bias, kernel, depth_bias))
    value, gate = jnp.split(depthwise_conv2d(jax.nn.silu(x + bias), kernel) + depth_bias, 2, axis=-1)
    return value * jax.nn.silu(gate)
