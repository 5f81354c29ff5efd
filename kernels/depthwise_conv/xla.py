"""Two forms for XLA: its own grouped convolution, and shifted multiply-adds.

XLA's CPU backend runs a convolution with one channel per group 10 to 50 times slower than the same sum written as
kh x kw shifted multiply-adds, which it fuses with whatever surrounds them. GPUs have a library routine for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from kernels.typing import Array, Float, Int

# Of a picture, in the sums of the kernel's gradient.
MOST_ROWS_WRITTEN_OUT, ROWS_AT_ONCE = 64, 8


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

    Channels stay last: no transposition. A backward pass keeps ``x`` and the kernel alone. Differentiable in both modes
    and any number of times.
    """
    return _convolve_p.bind(x, kernel)


def _convolve(x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"]) -> Float[Array, "B H W C"]:
    # A sum in bfloat16 would round at every one of its terms.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    views = _views(_padded(x, kernel.shape), kernel.shape, x.shape[1])
    taps = [view.astype(wide) * weight for view, weight in zip(views, kernel.astype(wide).reshape(-1, x.shape[-1]))]
    return sum(taps[1:], start=taps[0]).astype(x.dtype)


def _kernel_gradient(
    x: Float[Array, "B H W C"], cotangent: Float[Array, "B H W C"], *, size: tuple[int, int]
) -> Float[Array, "kh kw C"]:
    """Written for XLA's CPU backend, which takes four to nine times as long over kh x kw sums of whole pictures.

    It fuses the product into the sum and then runs over a channel's pixels one by one, all of them far apart.
    """
    padded, rows = _padded(x, size), x.shape[1]
    sums = _sums_over_columns if rows <= MOST_ROWS_WRITTEN_OUT else _sums_row_after_row
    return sums(padded, cotangent, size).reshape(*size, x.shape[-1]).astype(x.dtype)


def _sums_over_columns(
    padded: Float[Array, "B P Q C"], cotangent: Float[Array, "B H W C"], size: tuple[int, int]
) -> Float[Array, "kh kw C"]:
    """Adds up the rows of every column first, written out: there the channels, side by side in memory, stay last.

    The taps of a column of the kernel lie next to them: they read the same rows, which the processor's cache holds.
    """
    padded, cotangent = jax.lax.optimization_barrier((padded, cotangent))
    wide, (rows, columns) = jnp.promote_types(padded.dtype, jnp.float32), cotangent.shape[1:3]
    own = cotangent.astype(wide)[:, :, :, None]

    def added_rows(j: int, first: int) -> Float[Array, "B W kh C"]:
        terms = [
            padded[:, row : row + size[0], j : j + columns].swapaxes(1, 2).astype(wide) * own[:, row]
            for row in range(first, min(first + ROWS_AT_ONCE, rows))
        ]
        return sum(terms[1:], start=terms[0])

    parts = [jnp.stack([added_rows(j, first) for first in range(0, rows, ROWS_AT_ONCE)]) for j in range(size[1])]
    of_pictures = [part.sum((0, 2)) for part in jax.lax.optimization_barrier(parts)]
    # Pictures last and in one sum: over several devices it is one exchange, of the whole gradient.
    return jnp.stack(of_pictures, axis=2).sum(0)


def _sums_row_after_row(
    padded: Float[Array, "B P Q C"], cotangent: Float[Array, "B H W C"], size: tuple[int, int]
) -> Float[Array, "taps C"]:
    """So that a row stays in the processor's cache for all taps."""
    wide = jnp.promote_types(padded.dtype, jnp.float32)

    def add_row(total: Float[Array, "taps C"], row: Int[Array, ""]) -> tuple[Float[Array, "taps C"], None]:
        views = _views(jax.lax.dynamic_slice_in_dim(padded, row, size[0], axis=1).astype(wide), size, 1)
        own = jax.lax.dynamic_slice_in_dim(cotangent, row, 1, axis=1).astype(wide)
        return total + jnp.stack([(view * own).sum((0, 1, 2)) for view in views]), None

    start = jnp.zeros((size[0] * size[1], padded.shape[-1]), wide)
    total, _ = jax.lax.scan(add_row, start, jnp.arange(cotangent.shape[1]))
    return total


def _padded(x: Float[Array, "B H W C"], size: tuple[int, ...]) -> Float[Array, "B P Q C"]:
    return jnp.pad(x, [(0, 0), (size[0] // 2,) * 2, (size[1] // 2,) * 2, (0, 0)])


def _views(padded: Float[Array, "B P Q C"], size: tuple[int, ...], rows: int) -> list[Float[Array, "B R W C"]]:
    """What each tap of the kernel sees of ``rows`` rows, tap after tap."""
    columns = padded.shape[2] - size[1] + 1
    return [padded[:, i : i + rows, j : j + columns] for i in range(size[0]) for j in range(size[1])]


# -- two primitives: each is linear in both operands, and all their derivatives are these two again --------------------


def _primitive(name: str, function: Callable[..., Array]) -> Primitive:
    primitive = Primitive(name)
    primitive.def_impl(lambda *operands, **params: jax.jit(functools.partial(function, **params))(*operands))
    primitive.def_abstract_eval(lambda *operands, **params: _shape(function, operands, params))
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    return primitive


def _shape(function: Callable[..., Array], operands: tuple[Any, ...], params: dict[str, Any]) -> ShapedArray:
    shapes = [jax.ShapeDtypeStruct(operand.shape, operand.dtype) for operand in operands]
    out = jax.eval_shape(functools.partial(function, **params), *shapes)
    return ShapedArray(out.shape, out.dtype)


def _turned(kernel: Float[Array, "kh kw C"]) -> Float[Array, "kh kw C"]:
    """By half a circle: a convolution's transpose is the one with this kernel."""
    return kernel[::-1, ::-1]


_convolve_p = _primitive("depthwise_conv2d", _convolve)
_kernel_gradient_p = _primitive("depthwise_conv2d_kernel_gradient", _kernel_gradient)
ad.defbilinear(
    _convolve_p,
    lambda cotangent, x, kernel: _convolve_p.bind(cotangent, _turned(kernel)),
    lambda cotangent, x, kernel: _kernel_gradient_p.bind(x, cotangent, size=kernel.aval.shape[:2]),
)
ad.defbilinear(
    _kernel_gradient_p,
    lambda cotangent, x, other, size: _convolve_p.bind(other, _turned(cotangent)),
    lambda cotangent, x, other, size: _convolve_p.bind(x, cotangent),
)


def _batched(primitive: Primitive, operands: tuple[Array, ...], axes: tuple[int | None, ...], **params: Any):
    """Under ``vmap``: what is mapped over becomes further channels, which never meet."""
    count = next(operand.shape[axis] for operand, axis in zip(operands, axes) if axis is not None)

    def to_channels(operand: Array, axis: int | None) -> Array:
        full = jnp.stack([operand] * count, -2) if axis is None else jnp.moveaxis(operand, axis, -2)
        return full.reshape(*full.shape[:-2], -1)

    out = primitive.bind(*(to_channels(operand, axis) for operand, axis in zip(operands, axes)), **params)
    return out.reshape(*out.shape[:-1], count, -1), out.ndim - 1


for _each in (_convolve_p, _kernel_gradient_p):
    batching.primitive_batchers[_each] = functools.partial(_batched, _each)
