"""The formats of a quantised kernel: its leaves, how they are made, and what they stand for.

A kernel (C, D) is stored as a dictionary of leaves in place of the one leaf ``kernel``:

- ``int8``: ``kernel_int8`` (D, C) times ``kernel_scale`` (D,) float32: -127..127 of the output's largest value.
- ``fp8``: ``kernel_fp8`` (D, C) in float8_e4m3fn, times ``kernel_scale`` (D,) float32; 448 is the output's largest.
- ``int4``: ``kernel_int4`` (C/2, D) uint8, -7..7 in each half of a byte, times ``kernel_block_scale`` (C/32, D)
  bfloat16.
- ``nvfp4``: ``kernel_nvfp4`` (C/2, D) uint8, an e2m1 value in each half of a byte, times ``kernel_block_scale``
  (C/16, D) float8_e4m3fn, times ``kernel_tensor_scale`` () float32.

An output's values of 8 bits lie side by side, since that is how GPUs multiply them: the other way round, XLA would turn
all kernels around before a network's first layer, into as much memory again.

Two neighbouring inputs share a byte, the even one in the low half. Inputs that do not fill the last block are filled up
with zeros; how many there are is known from what is multiplied. Stacked layers have all this behind a leading axis.

Sources: float8 e4m3 and e2m1 are those of the OCP formats FP8 (2023) and MX v1.0 (2023); blocks of 16 with an e4m3
scale each and a float32 scale of the whole are NVIDIA's NVFP4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int, UInt8

FORMATS = ("int8", "fp8", "int4", "nvfp4")
WEIGHT_ONLY = ("int4", "nvfp4")  # the activations keep their dtype
OUTPUTS_FIRST = ("int8", "fp8")
BLOCK_INPUTS = {"int4": 32, "nvfp4": 16}  # inputs that share a scale; without one, a whole column does

SCALE, BLOCK_SCALE, TENSOR_SCALE = "kernel_scale", "kernel_block_scale", "kernel_tensor_scale"
LARGEST_INT8, LARGEST_INT4 = 127, 7
LARGEST_E4M3, LARGEST_E2M1 = 448.0, 6.0
# More inputs than these could add up to more than an int32 holds.
MOST_INPUTS_INT8 = (2**31 - 1) // LARGEST_INT8**2

_SCALE_DTYPES = {"int8": jnp.float32, "fp8": jnp.float32, "int4": jnp.bfloat16, "nvfp4": jnp.float8_e4m3fn}
_CODE_DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "int4": jnp.uint8, "nvfp4": jnp.uint8}


def codes_name(format_name: str) -> str:
    """The leaf that holds the values."""
    return f"kernel_{format_name}"


# Every name that a leaf of a quantised kernel can have.
LEAVES = (*map(codes_name, FORMATS), SCALE, BLOCK_SCALE, TENSOR_SCALE)


def format_of(names: Iterable[str]) -> str | None:
    """The format of a layer by the names of its leaves; None where it is not quantised."""
    given = set(names)
    return next((name for name in FORMATS if codes_name(name) in given), None)


def leaf_shapes(shape: tuple[int, ...], format_name: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the leaves of a kernel (..., C, D)."""
    *stack, inputs, outputs = shape
    codes, scale, scale_name = (outputs, inputs), (outputs,), SCALE
    if format_name in BLOCK_INPUTS:
        scale_name = BLOCK_SCALE
        blocks = -(-inputs // BLOCK_INPUTS[format_name])
        codes, scale = (blocks * BLOCK_INPUTS[format_name] // 2, outputs), (blocks, outputs)
    leaves = {
        codes_name(format_name): jax.ShapeDtypeStruct((*stack, *codes), _CODE_DTYPES[format_name]),
        scale_name: jax.ShapeDtypeStruct((*stack, *scale), _SCALE_DTYPES[format_name]),
    }
    if format_name == "nvfp4":
        leaves[TENSOR_SCALE] = jax.ShapeDtypeStruct(tuple(stack), jnp.float32)
    return leaves


def quantize_kernel(kernel: Float[Array, "C D"], format_name: str) -> dict[str, Array]:
    """The leaves of a kernel in a format; every value is rounded to the nearest that the format has.

    Raises:
        ValueError: a format that is not known, or a kernel with more inputs than its sums have room for.
    """
    if format_name not in FORMATS:
        raise ValueError(f"format {format_name!r} is not known; choose one of {', '.join(FORMATS)}")
    if format_name == "int8" and kernel.shape[0] > MOST_INPUTS_INT8:
        raise ValueError(
            f"int8 for {kernel.shape[0]} inputs; their products add up to more than an int32 holds from "
            f"{MOST_INPUTS_INT8 + 1} on: choose fp8 or int4"
        )
    kernel = kernel.astype(jnp.float32)
    if format_name in BLOCK_INPUTS:
        return _quantize_blocks(kernel, format_name)
    if format_name == "int8":
        codes, scale = int8_codes(kernel.T, axis=1)
    else:
        codes, scale = e4m3_codes(kernel.T, axis=1)
    return {codes_name(format_name): codes, SCALE: scale[:, 0]}


def dequantize_kernel(leaves: Mapping[str, Array], inputs: int) -> Float[Array, "C D"]:
    """The float32 kernel (C, D) that the leaves stand for; ``inputs`` is C."""
    format_name = format_of(leaves)
    codes = leaves[codes_name(format_name)]
    if format_name not in BLOCK_INPUTS:
        return codes.T.astype(jnp.float32) * leaves[SCALE]
    scale = leaves[BLOCK_SCALE].astype(jnp.float32)
    if format_name == "int4":
        values = unpack_int4(codes).astype(jnp.float32)
    else:
        values = decode_e2m1(unpack_nibbles(codes))
        scale = scale * leaves[TENSOR_SCALE]
    outputs = codes.shape[-1]
    values = values.reshape(-1, BLOCK_INPUTS[format_name], outputs) * scale[:, None]
    return values.reshape(-1, outputs)[:inputs]


def int8_codes(values: Float[Array, "A B"], axis: int) -> tuple[Int[Array, "A B"], Float[Array, "..."]]:
    """Whole numbers of -127..127 and the float32 scale, kept as an axis of 1, that each line along ``axis`` has."""
    scale = jnp.abs(values).max(axis, keepdims=True) / LARGEST_INT8
    return jnp.round(values / _divisor(scale)).astype(jnp.int8), scale


def e4m3_codes(values: Float[Array, "A B"], axis: int) -> tuple[Float[Array, "A B"], Float[Array, "..."]]:
    """float8_e4m3fn values up to 448 and the float32 scale, kept as an axis of 1, of each line along ``axis``."""
    scale = jnp.abs(values).max(axis, keepdims=True) / LARGEST_E4M3
    # The dtype has no infinity: what is beyond its largest number would become NaN.
    fractions = jnp.clip(values / _divisor(scale), -LARGEST_E4M3, LARGEST_E4M3)
    return fractions.astype(jnp.float8_e4m3fn), scale


def _quantize_blocks(kernel: Float[Array, "C D"], format_name: str) -> dict[str, Array]:
    inputs, outputs = kernel.shape
    length = BLOCK_INPUTS[format_name]
    blocks = jnp.pad(kernel, ((0, -inputs % length), (0, 0))).reshape(-1, length, outputs)
    largest = jnp.abs(blocks).max(1)
    if format_name == "int4":
        scale = (largest / LARGEST_INT4).astype(jnp.bfloat16)
        codes = jnp.round(blocks / _divisor(scale.astype(jnp.float32))[:, None]).astype(jnp.int32)
        # A scale that was rounded down leaves 7.03 for the largest value, which rounds to 7.
        codes = jnp.clip(codes, -LARGEST_INT4, LARGEST_INT4) & 0xF
        return {codes_name(format_name): pack_nibbles(codes.reshape(-1, outputs)), BLOCK_SCALE: scale}
    tensor_scale = largest.max() / (LARGEST_E2M1 * LARGEST_E4M3)
    fractions = largest / LARGEST_E2M1 / _divisor(tensor_scale)
    scale = jnp.minimum(fractions, LARGEST_E4M3).astype(jnp.float8_e4m3fn)
    codes = encode_e2m1(blocks / _divisor(scale.astype(jnp.float32) * tensor_scale)[:, None])
    codes = pack_nibbles(codes.reshape(-1, outputs))
    return {codes_name(format_name): codes, BLOCK_SCALE: scale, TENSOR_SCALE: tensor_scale}


def _divisor(scale: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """A scale to divide by: 1 where all values are 0 or so small that their scale was rounded to 0."""
    return jnp.where(scale > 0, scale, 1.0)


def pack_nibbles(codes: Int[Array, "C D"]) -> UInt8[Array, "half D"]:
    """Codes of 0..15, C even, two to a byte: the even row in the low half."""
    codes = codes.astype(jnp.uint8)
    return codes[0::2] | (codes[1::2] << 4)


def unpack_nibbles(packed: UInt8[Array, "half D"]) -> UInt8[Array, "C D"]:
    """What ``pack_nibbles`` packed."""
    return _interleave(packed & 0xF, packed >> 4)


def unpack_int4(packed: UInt8[Array, "half D"]) -> Int[Array, "C D"]:
    """The same as signed numbers of -8..7, int8."""
    signed = jax.lax.bitcast_convert_type(packed, jnp.int8)
    return _interleave((signed << 4) >> 4, signed >> 4)


def _interleave(even: Array, odd: Array) -> Array:
    return jnp.stack([even, odd], axis=1).reshape(2 * even.shape[0], even.shape[1])


# Where the codes 0 to 7 meet, 0, 0.5, 1, 1.5, 2, 3, 4 and 6: half-way, which goes to the even code.
_E2M1_BOUNDARIES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


def encode_e2m1(values: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """The nearest e2m1 number's code, the sign in bit 3; beyond 6 it is 6."""
    size = jnp.abs(values)
    code = sum((size >= at if included else size > at).astype(jnp.uint8) for at, included in _E2M1_BOUNDARIES)
    return code | (jnp.signbit(values).astype(jnp.uint8) << 3)


def decode_e2m1(codes: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The float32 numbers of e2m1 codes."""
    exponent, mantissa = ((codes >> 1) & 3).astype(jnp.int8), (codes & 1).astype(jnp.int8)
    halves = jnp.where(exponent == 0, mantissa, (2 + mantissa) << jnp.maximum(exponent - 1, 0))
    signed = jnp.where(codes & 8, -halves, halves)
    return signed.astype(jnp.float32) * np.float32(0.5)
