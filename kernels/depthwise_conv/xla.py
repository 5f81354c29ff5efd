"""Two forms for XLA: its own grouped convolution, and shifted multiply-adds.

XLA's CPU backend runs a convolution with one channel per group 10 to 50 times slower than the same sum written as
kh x kw shifted multiply-adds, which it fuses with whatever surrounds them. GPUs have a library routine for it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.typing import Array, Float


def grouped_convolution(x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"]) -> Float[Array, "B H W C"]:
    """XLA's convolution with ``feature_group_count = C``."""
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None, :],
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def shifted_multiply_add(x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"]) -> Float[Array, "B H W C"]:
    """Pads once and adds kh x kw weighted views, in float32, rounded once to ``x``'s dtype.

    Channels stay last: no transposition.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return _add_views(x, kernel)
    # A sum in bfloat16 would round at every one of its terms; a backward pass keeps x, not its float32 views.
    return jax.checkpoint(_add_views, prevent_cse=False)(x, kernel)


def _add_views(x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"]) -> Float[Array, "B H W C"]:
    kernel_height, kernel_width, _ = kernel.shape
    _, height, width, _ = x.shape
    padding = [(0, 0), (kernel_height // 2,) * 2, (kernel_width // 2,) * 2, (0, 0)]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    padded, kernel = jnp.pad(x, padding), kernel.astype(wide)
    taps = [
        padded[:, i : i + height, j : j + width, :].astype(wide) * kernel[i, j]
        for i in range(kernel_height)
        for j in range(kernel_width)
    ]
    return sum(taps[1:], start=taps[0]).astype(x.dtype)
