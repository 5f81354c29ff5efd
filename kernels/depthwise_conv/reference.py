"""The definition, one tap at a time in float32, for tests."""

from __future__ import annotations

import jax.numpy as jnp

from kernels.typing import Array, Float


def depthwise_conv2d(x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"]) -> Float[Array, "B H W C"]:
    """``out[y, x, c] = Σ_ij kernel[i, j, c] · x[y + i - kh//2, x + j - kw//2, c]``, zero outside the picture."""
    kernel_height, kernel_width, _ = kernel.shape
    out = jnp.zeros(x.shape, jnp.float32)
    rows, columns = jnp.arange(x.shape[1])[:, None], jnp.arange(x.shape[2])[None, :]
    for i in range(kernel_height):
        for j in range(kernel_width):
            y, z = rows + i - kernel_height // 2, columns + j - kernel_width // 2
            inside = (y >= 0) & (y < x.shape[1]) & (z >= 0) & (z < x.shape[2])
            tap = x[:, jnp.clip(y, 0, x.shape[1] - 1), jnp.clip(z, 0, x.shape[2] - 1), :].astype(jnp.float32)
            out += jnp.where(inside[None, :, :, None], tap, 0.0) * kernel[i, j].astype(jnp.float32)
    return out
