"""Moments in 8 bits: codes of the parameter's own shape, and a scale per block of the last axis.

A code is the cube root of a value over its block's scale, rounded: fine for large values and still there for small
ones, without a table. A signed code c of -127..127 is scale * (c / 127)^3; an unsigned one of 1..255 is
scale * (c / 255)^3, never zero: as a divisor, a second moment must not be rounded down to nothing.

Blocks divide the last axis evenly, and as many of them as possible lie in each of up to 64 equal parts of it: an array
that is cut over a mesh is quantised where it lies.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.typing import Array, Float, Shaped

_MOST_PARTS = 64
_SIGNED, _UNSIGNED = 127, 255


class LastAxisBlocks(NamedTuple):
    """An array in 8 bits."""

    codes: Array
    """int8 or uint8, of the array's shape."""
    last_axis_scales: Array
    """float32 (..., blocks): the largest absolute value of each block of the last axis."""


def block_length(axis: int, most: int) -> int:
    """Values of a block: a divisor of ``axis``, at most ``most`` and not under an eighth of it, chosen so that the
    number of blocks has as many factors of two as it can (up to 64), and then the largest. The whole axis without one.
    """
    divisors = [length for length in range(max(1, most // 8), min(axis, most) + 1) if axis % length == 0]
    parts = _MOST_PARTS
    while parts > 1:
        if fitting := [length for length in divisors if axis // length % parts == 0]:
            return max(fitting)
        parts //= 2
    return max(divisors, default=axis)


def quantize_signed(values: Float[Array, "*shape"], most: int) -> LastAxisBlocks:
    """Signed values, each rounded to the nearest code."""
    fractions, scales = _fractions(values, most)
    codes = jnp.round(_SIGNED * jnp.cbrt(fractions)).astype(jnp.int8)
    return LastAxisBlocks(codes.reshape(values.shape), scales)


def quantize_positive(values: Float[Array, "*shape"], most: int, seed: Shaped[Array, ""]) -> LastAxisBlocks:
    """Values of 0 or more, each rounded up or down at random so that its code is right on average.

    A slow average changes by less than half a code per step: rounded to the nearest, it would never change.

    Args:
        values: what to keep.
        most: upper limit of a block's length.
        seed: uint32; the same seed rounds equal values equally, whatever the mesh.
    """
    fractions, scales = _fractions(values, most)
    dither = random_fractions(values.shape, seed).reshape(fractions.shape)
    codes = jnp.clip(jnp.floor(_UNSIGNED * jnp.cbrt(fractions) + dither), 1, _UNSIGNED).astype(jnp.uint8)
    return LastAxisBlocks(codes.reshape(values.shape), scales)


def random_fractions(shape: tuple[int, ...], seed: Shaped[Array, ""]) -> Float[Array, "*shape"]:
    """Numbers from 0 up to 1, each a hash of the seed and of its place in the array.

    For rounding, this need not be jax.random's generator, which costs more than the rest of the optimizer.
    """
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    bits = _mix(place + _mix(jnp.asarray(seed, jnp.uint32)))
    return (bits >> 8).astype(jnp.float32) / 2**24


def _mix(bits: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Spreads every bit of an integer over all of it: shifts and odd factors, each of which can be undone."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 15)


def dequantize(blocks: LastAxisBlocks) -> Float[Array, "*shape"]:
    """The values, as float32."""
    codes, scales = blocks
    largest = _SIGNED if codes.dtype == jnp.int8 else _UNSIGNED
    fractions = (codes.astype(jnp.float32) / largest) ** 3
    return (fractions.reshape(*scales.shape, -1) * scales[..., None]).reshape(codes.shape)


def _fractions(values, most: int):
    """Values over their block's scale (..., blocks, length), and the scales."""
    blocks = values.reshape(*values.shape[:-1], -1, block_length(values.shape[-1], most))
    scales = jnp.abs(blocks).max(-1)
    return blocks / jnp.where(scales > 0, scales, 1)[..., None], scales
