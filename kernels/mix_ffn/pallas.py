"""One Pallas kernel for GPUs that reads the pointwise product once and writes the gated channels, and its backward.

A program has a strip of ``ROWS`` rows for a block of channels, and goes through its columns one by one. It keeps the
sums of the output columns that still lack a neighbour, so that no SiLU is computed anew for another column; only those
of the row above and the row below the strip are computed by two programs. All is float32 inside and rounded once.

The backward pass computes the middle anew from the pointwise product: one kernel of the same form gives the cotangent
of the convolution's output, a second one that of ``x`` and each strip's part of the parameters' gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.rows import refuse_float64
from kernels.typing import Array, Float

CHANNELS = 128  # of a program: 2 to each thread of two warps
ROWS = 4
COLUMNS = 16
# Long strips in the second kernel of the backward pass: every one writes 11 sums per channel.
BACKWARD_COLUMNS = 64
SUMS = 11  # the kernel's nine taps, its bias, and the bias before it
COMPILER_PARAMS = plgpu.CompilerParams(num_warps=2, num_stages=1)


class Strip(NamedTuple):
    """Where a program is, as numbers that are known when it runs, and the sizes known before.

    Attributes:
        sample: index of the picture.
        row: first row of the strip.
        column: first column.
        channels: indices of its block of channels.
        own: which of them there are.
        height, width: of the picture.
    """

    sample: Any
    row: Any
    column: Any
    channels: Any
    own: Any
    height: int
    width: int

    def inside(self, row: Any, column: Any) -> Any:
        """Mask of the channels, all false outside the picture."""
        return self.own & (row >= 0) & (row < self.height) & (column >= 0) & (column < self.width)

    def load(self, ref: Any, row: Any, column: Any, inside: Any, first_channel: int = 0) -> Any:
        """Float32 values of a pixel, zero where not ``inside``."""
        pixel = ref.at[self.sample, row, column, self.channels + first_channel]
        return plgpu.load(pixel, mask=inside, other=0).astype(jnp.float32)

    def store(self, ref: Any, values: Any, row: Any, column: Any, inside: Any, first_channel: int = 0) -> None:
        """Rounds values to the output's dtype and writes them where ``inside``."""
        pixel = ref.at[self.sample, row, column, self.channels + first_channel]
        plgpu.store(pixel, values.astype(ref.dtype), mask=inside)

    def vector(self, ref: Any, *index: int, first_channel: int = 0) -> Any:
        """Float32 values of a parameter."""
        row = ref.at[(*index, self.channels + first_channel)]
        return plgpu.load(row, mask=self.own, other=0).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def mix_ffn(
    x: Float[Array, "B H W E"],
    bias: Float[Array, " E"],
    kernel: Float[Array, "3 3 E"],
    depth_bias: Float[Array, " E"],
    interpret: bool = False,
) -> Float[Array, "B H W F"]:
    """Same value as the reference, in ``x``'s dtype; differentiable in reverse mode, once.

    ``interpret`` runs it with plain JAX operations, on any platform.
    """
    batch, height, width, channels = x.shape
    out = jax.ShapeDtypeStruct((batch, height, width, channels // 2), x.dtype)
    return _call(_forward, (x, bias, kernel, depth_bias), out, (height, width), channels // 2, COLUMNS, interpret)


def _keep_inputs(x: Array, bias: Array, kernel: Array, depth_bias: Array, interpret: bool) -> tuple[Array, tuple]:
    return mix_ffn(x, bias, kernel, depth_bias, interpret), (x, bias, kernel, depth_bias)


def _gradients(interpret: bool, kept: tuple[Array, ...], cotangent: Float[Array, "B H W F"]) -> tuple[Array, ...]:
    x, bias, kernel, depth_bias = kept
    batch, height, width, channels = x.shape
    size, same = (height, width), jax.ShapeDtypeStruct(x.shape, x.dtype)
    middle = _call(_middle_cotangent, (*kept, cotangent), same, size, channels // 2, COLUMNS, interpret)
    strips = (pl.cdiv(height, ROWS), pl.cdiv(width, BACKWARD_COLUMNS))
    sums = jax.ShapeDtypeStruct((batch, *strips, SUMS, channels), jnp.float32)
    operands = (x, bias, kernel, middle)
    found, sums = _call(_input_cotangent, operands, (same, sums), size, channels, BACKWARD_COLUMNS, interpret)
    sums = sums.sum((0, 1, 2))
    taps = sums[:9].reshape(3, 3, channels)
    return found, sums[10].astype(bias.dtype), taps.astype(kernel.dtype), sums[9].astype(depth_bias.dtype)


mix_ffn.defvjp(_keep_inputs, _gradients)


def _call(
    kernel: Callable,
    operands: tuple[Array, ...],
    out: Any,
    size: tuple[int, int],
    channels: int,
    columns: int,
    interpret: bool,
) -> Any:
    """Runs ``kernel`` for every strip of every picture and every block of ``channels``."""
    refuse_float64(operands)
    height, width = size
    grid = (pl.cdiv(channels, CHANNELS), pl.cdiv(width, columns), pl.cdiv(height, ROWS), operands[0].shape[0])

    def run(*refs: Any) -> None:
        block, strip_column, strip_row, sample = (pl.program_id(axis) for axis in range(4))
        own_channels = block * CHANNELS + jnp.arange(CHANNELS)
        strip = Strip(
            sample, strip_row * ROWS, strip_column * columns, own_channels, own_channels < channels, height, width
        )
        kernel(strip, channels, columns, *refs)

    return pl.pallas_call(
        run, out_shape=out, grid=grid, interpret=interpret, compiler_params=COMPILER_PARAMS, name=kernel.__name__
    )(*operands)


# -- the two sweeps ----------------------------------------------------------------------------------------------------


def _forward(
    strip: Strip, hidden: int, columns: int, x: Any, bias: Any, kernel: Any, depth_bias: Any, out: Any
) -> None:
    def write(row: Any, column: Any, inside: Any, value: Any, gate: Any) -> None:
        strip.store(out, value * gate * _sigmoid(gate), row, column, inside)

    _sweep(strip, hidden, columns, x, bias, kernel, depth_bias, write)


def _middle_cotangent(
    strip: Strip, hidden: int, columns: int, x: Any, bias: Any, kernel: Any, depth_bias: Any, cotangent: Any, out: Any
) -> None:
    def write(row: Any, column: Any, inside: Any, value: Any, gate: Any) -> None:
        own, sigmoid = strip.load(cotangent, row, column, inside), _sigmoid(gate)
        strip.store(out, own * gate * sigmoid, row, column, inside)
        strip.store(out, own * value * _silu_slope(gate, sigmoid), row, column, inside, first_channel=hidden)

    _sweep(strip, hidden, columns, x, bias, kernel, depth_bias, write)


def _sweep(
    strip: Strip, hidden: int, columns: int, x: Any, bias: Any, kernel: Any, depth_bias: Any, write: Callable
) -> None:
    """Calls ``write(row, column, inside, value, gate)`` with the convolved channels of every pixel of the strip."""
    halves = (0, hidden)
    offsets = [strip.vector(bias, first_channel=first) for first in halves]
    taps = [_taps(strip, kernel, first) for first in halves]
    depth_offsets = [strip.vector(depth_bias, first_channel=first) for first in halves]

    def step(index: Any, sums: tuple) -> tuple:
        column = strip.column - 1 + index  # of the input; its left neighbour is finished by it
        results, kept = [], []
        for first, offset, tap, depth_offset, unfinished in zip(halves, offsets, taps, depth_offsets, sums):
            seen = [_silu_at(strip, x, offset, first, strip.row - 1 + i, column) for i in range(ROWS + 2)]
            parts = [[_column_sum(tap, j, seen[row : row + 3]) for j in range(3)] for row in range(ROWS)]
            results.append([left + part[2] + depth_offset for (left, _), part in zip(unfinished, parts)])
            kept.append(tuple((own + part[1], part[0]) for (_, own), part in zip(unfinished, parts)))
        for row, (value, gate) in enumerate(zip(*results)):
            place = strip.row + row, column - 1
            write(*place, strip.inside(*place) & (index >= 2), value, gate)
        return tuple(kept)

    nothing = jnp.zeros(CHANNELS, jnp.float32)
    jax.lax.fori_loop(0, columns + 2, step, (((nothing, nothing),) * ROWS,) * 2)


def _input_cotangent(
    strip: Strip,
    channels: int,
    columns: int,
    x: Any,
    bias: Any,
    kernel: Any,
    middle: Any,
    out: Any,
    sums: Any,
) -> None:
    """``dx``, and the strip's sums; here values and gates are channels like any other."""
    offset, taps = strip.vector(bias), [tap for row in _taps(strip, kernel, 0) for tap in row]

    def load_column(column: Any) -> list:
        rows = [strip.row - 1 + i for i in range(ROWS + 2)]
        return [strip.load(middle, row, column, strip.inside(row, column)) for row in rows]

    def step(index: Any, carry: tuple) -> tuple:
        *held, totals = carry
        column = strip.column + index
        held = [*held, load_column(column + 1)]  # of three columns: the left neighbour, the own, the right one
        totals = list(totals)
        for i in range(ROWS):
            row = strip.row + i
            inside = strip.inside(row, column)
            wide = strip.load(x, row, column, inside) + offset
            sigmoid = _sigmoid(wide)
            # A tap's weight took this pixel to the one that lies opposite.
            opposite = [held[2 - b][i + 2 - a] for a in range(3) for b in range(3)]
            back = sum(tap * seen for tap, seen in zip(taps, opposite))
            found = jnp.where(inside, back * _silu_slope(wide, sigmoid), 0)
            strip.store(out, found, row, column, inside)
            activated = jnp.where(inside, wide * sigmoid, 0)
            terms = [*(activated * seen for seen in opposite), jnp.where(inside, held[1][i + 1], 0), found]
            totals = [total + term for total, term in zip(totals, terms)]
        return tuple(held[1]), tuple(held[2]), tuple(totals)

    nothing = jnp.zeros(CHANNELS, jnp.float32)
    start = tuple(load_column(strip.column - 1)), tuple(load_column(strip.column)), (nothing,) * SUMS
    *_, totals = jax.lax.fori_loop(0, columns, step, start)
    place = strip.sample, pl.program_id(2), pl.program_id(1)
    for number, total in enumerate(totals):
        plgpu.store(sums.at[(*place, number, strip.channels)], total, mask=strip.own)


def _taps(strip: Strip, kernel: Any, first_channel: int) -> list[list]:
    return [[strip.vector(kernel, i, j, first_channel=first_channel) for j in range(3)] for i in range(3)]


def _column_sum(taps: list[list], column: int, seen: list) -> Any:
    """What one column of the kernel makes of three pixels above each other."""
    return sum(taps[i][column] * seen[i] for i in range(3))


def _silu_at(strip: Strip, x: Any, offset: Any, first_channel: int, row: Any, column: Any) -> Any:
    inside = strip.inside(row, column)
    wide = strip.load(x, row, column, inside, first_channel) + offset
    return jnp.where(inside, wide * _sigmoid(wide), 0)


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + jnp.exp(-x))


def _silu_slope(x: Any, sigmoid: Any) -> Any:
    """Derivative of ``x · sigmoid(x)``."""
    return sigmoid * (1 + x * (1 - sigmoid))
