"""Two forms for XLA: its own grouped convolution, and shifted multiply-adds.

XLA's CPU backend runs a convolution with one channel per group 10 to 50 times slower than the same sum written as
kh x kw shifted multiply-adds, which it fuses with whatever surrounds them. GPUs have a library routine for it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, linear_call

from kernels.typing import Array, Float, Int


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

    Channels stay last: no transposition. A backward pass keeps ``x`` and the kernel alone.
    """
    return _add_views(x, kernel)


@jax.custom_jvp
def _add_views(x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"]) -> Float[Array, "B H W C"]:
    # A sum in bfloat16 would round at every one of its terms.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    padded, kernel = _padded(x, kernel.shape), kernel.astype(wide)
    views = _views(padded, kernel.shape, x.shape[1])
    taps = [view.astype(wide) * weight for view, weight in zip(views, kernel.reshape(-1, kernel.shape[-1]))]
    return sum(taps[1:], start=taps[0]).astype(x.dtype)


@functools.partial(_add_views.defjvp, symbolic_zeros=True)
def _tangent(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    (x, kernel), (x_tangent, kernel_tangent) = primals, tangents
    terms = []
    if not isinstance(x_tangent, SymbolicZero):
        terms.append(linear_call(_of_input, _to_input, kernel, x_tangent))
    if not isinstance(kernel_tangent, SymbolicZero):
        to_kernel = functools.partial(_to_kernel, kernel.shape)
        terms.append(linear_call(_add_views, to_kernel, x, kernel_tangent))
    return _add_views(x, kernel), sum(terms[1:], start=terms[0]) if terms else jnp.zeros_like(x)


def _of_input(kernel: Float[Array, "kh kw C"], x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    return _add_views(x, kernel)


def _to_input(kernel: Float[Array, "kh kw C"], cotangent: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """A convolution's transpose is the one with its kernel turned by half a circle."""
    return _add_views(cotangent, kernel[::-1, ::-1])


def _to_kernel(
    size: tuple[int, int, int], x: Float[Array, "B H W C"], cotangent: Float[Array, "B H W C"]
) -> Float[Array, "kh kw C"]:
    """The kernel's gradient, row after row, so that a row stays in the processor's cache for all taps.

    As kh x kw sums over whole pictures, XLA's CPU backend takes four to nine times as long: it fuses the product into
    the sum and then runs over a channel's pixels one by one, all of them far apart.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    padded = _padded(x, size)

    def add_row(total: Float[Array, "taps C"], row: Int[Array, ""]) -> tuple[Float[Array, "taps C"], None]:
        views = _views(jax.lax.dynamic_slice_in_dim(padded, row, size[0], axis=1).astype(wide), size, 1)
        own = jax.lax.dynamic_slice_in_dim(cotangent, row, 1, axis=1).astype(wide)
        return total + jnp.stack([(view * own).sum((0, 1, 2)) for view in views]), None

    start = jnp.zeros((size[0] * size[1], size[2]), wide)
    total, _ = jax.lax.scan(add_row, start, jnp.arange(x.shape[1]))
    return total.reshape(size).astype(x.dtype)


def _padded(x: Float[Array, "B H W C"], size: tuple[int, int, int]) -> Float[Array, "B P Q C"]:
    return jnp.pad(x, [(0, 0), (size[0] // 2,) * 2, (size[1] // 2,) * 2, (0, 0)])


def _views(padded: Float[Array, "B P Q C"], size: tuple[int, int, int], rows: int) -> list[Float[Array, "B R W C"]]:
    """What each tap of the kernel sees of ``rows`` rows, tap after tap."""
    columns = padded.shape[2] - size[1] + 1
    return [padded[:, i : i + rows, j : j + columns] for i in range(size[0]) for j in range(size[1])]
