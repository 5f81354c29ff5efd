"""The feed-forward network of a SANA block ("Mix-FFN", a gated inverted bottleneck; arXiv 2410.10629 §2.2)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from kernels.depthwise_conv import depthwise_conv2d
from kernels.typing import Array, Float
from sana_jax.nn.activations import silu
from sana_jax.nn.initializers import torch_uniform
from sana_jax.nn.linear import Linear


class GLUMBConv(nn.Module):
    """Pointwise D -> 2·hidden, SiLU, depthwise 3x3, ``a · SiLU(gate)``, pointwise hidden -> D.

    No norm and no residual. The 3x3 convolution is also what tells a SANA without position table where a token is.
    """

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        """Mixes channels, and each token with its eight neighbours."""
        features, wide = x.shape[-1], 2 * self.hidden
        x = Linear(
            wide,
            dtype=self.dtype,
            kernel_init=torch_uniform(features),
            bias_init=torch_uniform(features),
            name="conv_inverted",
        )(x)
        x = DepthwiseConv(dtype=self.dtype, name="conv_depth")(silu(x))
        value, gate = jnp.split(x, 2, axis=-1)
        point = Linear(
            features, use_bias=False, dtype=self.dtype, kernel_init=torch_uniform(self.hidden), name="conv_point"
        )
        return point(value * silu(gate))


class DepthwiseConv(nn.Module):
    """A 3x3 kernel (3, 3, C) and a bias per channel."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Convolves every channel with its own kernel, zero outside the picture."""
        init = torch_uniform(9)
        kernel = self.param("kernel", init, (3, 3, x.shape[-1]), jnp.float32)
        bias = self.param("bias", init, (x.shape[-1],), jnp.float32)
        return depthwise_conv2d(x, kernel.astype(self.dtype)) + bias.astype(self.dtype)
