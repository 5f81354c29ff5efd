"""What the GPU kernels of this package share: sizes of their tiles, masked loads, rotation, products, and their launch.

Triton works on tiles whose sides are powers of two. A head's channels are therefore taken as two halves of p = d/2
channels, each filled up to a tile's side with zeros that are neither read nor written: 112 channels are two halves of
56 in tiles of 64. Where keys are rotated, the halves are the first and the second channels of all pairs, so that
rotation is arithmetic between tiles; else they are the lower and the upper channels. Matrices between the kernels keep
that order, (2, p) in place of d.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.typing import Array, Float

# Tokens of one step where a kernel sums over them, and of one program where it does not; columns of the memory that one
# program of the scan carries. Chosen by what Triton's compiler says of registers; none of them is timed on a device.
SUMMED_TOKENS, OWN_TOKENS, MEMORY_COLUMNS = 16, 64, 32
# A float32 product as three of tensor cores' TF32 products: of each factor's rounded value and of what that leaves out.
# Its error is that of float32 products (TF32 alone: a thousand times that), and its operands do not fill the registers
# as those of Triton's scalar float32 products do.
THREE_PRODUCTS = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
# Triton's products have no smaller side.
SMALLEST_SIDE = 16
# A tile of this many channels by as many is the largest whose sums stay in a program's registers.
LARGEST_HEAD = 128

# Numbers of the two halves: as arrays, since Pallas' interpreter (jax 0.10.2) does not take Python's integers in masked
# loads.
HALVES = np.int32(0), np.int32(1)

Tile = Float[Array, "_ _"]
Halves = Sequence[Float[Array, "rows columns"]]  # two of them


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a kernel has to know when it is compiled.

    Attributes:
        batch, frames, tokens, heads: B, T, S, h.
        key: d, an even number of channels.
        value: e.
        rotated: whether queries and keys are rotated, and halves are those of pairs.
        interpret: whether Pallas interprets the kernels, for tests without a GPU.
    """

    batch: int
    frames: int
    tokens: int
    heads: int
    key: int
    value: int
    rotated: bool
    interpret: bool

    @property
    def pairs(self) -> int:
        """p: channels of one half."""
        return self.key // 2

    @property
    def key_side(self) -> int:
        """The side of a tile that holds one half of a key's channels."""
        return side(self.pairs)

    @property
    def half_value_side(self) -> int:
        """The side of a tile that holds one half of a value's channels."""
        return side(-(-self.value // 2))


def side(size: int, largest: int | None = None) -> int:
    """The smallest side of a tile that holds ``size``, or ``largest`` where that is smaller."""
    found = max(SMALLEST_SIDE, pl.next_power_of_2(size))
    return found if largest is None else min(found, largest)


def launch(
    kernel: Callable[[Mapping[str, Any]], None],
    grid: tuple[int, ...],
    inputs: Mapping[str, tuple[Array, pl.BlockSpec]],
    outputs: Mapping[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    *,
    interpret: bool,
    num_warps: int = 8,
) -> dict[str, Array]:
    """Runs a kernel, which finds its inputs and outputs by name; returns the outputs by name."""
    names = [*inputs, *outputs]

    def body(*refs):
        kernel(dict(zip(names, refs, strict=True)))

    body.__name__ = f"gated_delta_rule_{getattr(kernel, 'func', kernel).__name__.strip('_')}"
    found = pl.pallas_call(
        body,
        grid=grid,
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()],
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
    )(*(array for array, _ in inputs.values()))
    return dict(zip(outputs, found, strict=True))


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    """An output of this shape."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# -- arrays as the kernels take them: F counts the frames of all examples ----------------------------------------------


def split_tokens(x: Float[Array, "B T S h d"], sizes: Sizes) -> Float[Array, "F S h *halves"]:
    """Queries or keys, their channels as pairs of two halves or halves of p channels; no copy."""
    halves = (sizes.pairs, 2) if sizes.rotated else (2, sizes.pairs)
    return x.reshape(-1, sizes.tokens, sizes.heads, *halves)


def tokens_block(sizes: Sizes, tokens: int, where: Callable) -> pl.BlockSpec:
    """``tokens`` tokens of one head of ``split_tokens``; ``where`` gives frame, block of tokens and head."""
    halves = (sizes.key_side, 2) if sizes.rotated else (2, sizes.key_side)
    return pl.BlockSpec((None, tokens, None, *halves), lambda *ids: (*where(*ids), 0, 0))


def split_rows(x: Float[Array, "*A d e"], sizes: Sizes) -> Float[Array, "*A 2 p e"]:
    """A memory in the order of the kernels' channels."""
    if not sizes.rotated:
        return x.reshape(*x.shape[:-2], 2, sizes.pairs, x.shape[-1])
    return jnp.swapaxes(x.reshape(*x.shape[:-2], sizes.pairs, 2, x.shape[-1]), -3, -2)


def join_rows(x: Float[Array, "*A 2 p e"], sizes: Sizes) -> Float[Array, "*A d e"]:
    """The inverse of ``split_rows``."""
    x = jnp.swapaxes(x, -3, -2) if sizes.rotated else x
    return x.reshape(*x.shape[:-3], sizes.key, x.shape[-1])


# -- inside kernels ----------------------------------------------------------------------------------------------------


def within(start: Any, count: int, size: int) -> Array:
    """Which of ``count`` numbers from ``start`` are below ``size``."""
    return start + jnp.arange(count, dtype=jnp.int32) < size


def masked_load(ref: Any, *masks: Array) -> Float[Array, "..."]:
    """A vector or tile in float32, zeros outside of the masks of its axes."""
    return plgpu.load(ref, mask=_all(masks), other=0).astype(jnp.float32)


def masked_store(ref: Any, x: Array, *masks: Array) -> None:
    """Writes a vector or tile where the masks of its axes are true."""
    plgpu.store(ref, x.astype(ref.dtype), mask=_all(masks))


def _all(masks: tuple[Array, ...]) -> Array:
    if len(masks) == 1:
        return masks[0]
    rows, columns = masks
    return rows[:, None] & columns[None, :]


def value_columns(half: Any, sizes: Sizes) -> tuple[Any, Array]:
    """Where half of a value's channels are in a block that has all of them, and which of these there are."""
    start = int(half) * sizes.half_value_side
    return pl.ds(start, sizes.half_value_side), within(start, sizes.half_value_side, sizes.value)


def load_halves(ref: Any, start: Any, tokens: Array, sizes: Sizes) -> Halves:
    """Two tiles of a block of ``tokens_block``: of as many tokens as the mask ``tokens`` has, from ``start``."""
    rows, channels = pl.ds(start, tokens.shape[0]), within(0, sizes.key_side, sizes.pairs)
    views = [ref.at[rows, :, half] if sizes.rotated else ref.at[rows, half, :] for half in HALVES]
    return tuple(masked_load(view, tokens, channels) for view in views)


def store_halves(ref: Any, halves: Halves, tokens: Array, sizes: Sizes) -> None:
    """Writes all of a block of ``tokens_block``."""
    channels = within(0, sizes.key_side, sizes.pairs)
    for half in HALVES:
        masked_store(ref.at[:, :, half] if sizes.rotated else ref.at[:, half, :], halves[half], tokens, channels)


def load_angles(refs: Mapping[str, Any], start: Any, tokens: Array, sizes: Sizes) -> Halves | None:
    """Cosines and sines of these tokens; None where nothing is rotated."""
    if not sizes.rotated:
        return None
    rows, channels = pl.ds(start, tokens.shape[0]), within(0, sizes.key_side, sizes.pairs)
    return tuple(masked_load(refs[name].at[rows, :], tokens, channels) for name in ("cos", "sin"))


def rotate(halves: Halves, angles: Halves | None, back: bool = False) -> Halves:
    """Every pair turned by its angle; ``back`` by the angle's negative, which is the gradient's way."""
    if angles is None:
        return halves
    (first, second), (cos, sin) = halves, angles
    sin = -sin if back else sin
    return first * cos - second * sin, first * sin + second * cos


def product(left: Float[Array, "m k"], right: Float[Array, "k n"], sizes: Sizes) -> Float[Array, "m n"]:
    """``left right``."""
    return _contracted(left, right, 1, 0, sizes)


def rows_product(left: Float[Array, "k m"], right: Float[Array, "k n"], sizes: Sizes) -> Float[Array, "m n"]:
    """``leftᵀ right``: summed over the rows of both, which are tokens or channels."""
    return _contracted(left, right, 0, 0, sizes)


def columns_product(left: Float[Array, "m k"], right: Float[Array, "n k"], sizes: Sizes) -> Float[Array, "m n"]:
    """``left rightᵀ``: summed over the columns of both."""
    return _contracted(left, right, 1, 1, sizes)


def _contracted(left: Tile, right: Tile, left_axis: int, right_axis: int, sizes: Sizes) -> Tile:
    def contracted(left, right, precision):
        return jax.lax.dot_general(left, right, (((left_axis,), (right_axis,)), ((), ())), precision=precision)

    if not sizes.interpret:
        return contracted(left, right, THREE_PRODUCTS)
    # the same arithmetic on a CPU, which has no such products
    (left, left_rest), (right, right_rest) = _in_two(left), _in_two(right)
    small = contracted(left, right_rest, "highest") + contracted(left_rest, right, "highest")
    return small + contracted(left, right, "highest")


def _in_two(x: Tile) -> tuple[Tile, Tile]:
    """``x`` rounded to TF32's ten bits after the point, and what that leaves out, rounded likewise."""

    def rounded(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        return jax.lax.bitcast_convert_type((bits + jnp.uint32(0x1000)) & jnp.uint32(0xFFFFE000), jnp.float32)

    return rounded(x), rounded(x - rounded(x))
