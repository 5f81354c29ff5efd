"""Formats of quantised kernels: against their definitions in NumPy, and errors against bounds that follow from them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sana_jax.quantization import FORMATS, dequantize_kernel, quantize_kernel, quantized_product
from sana_jax.quantization.formats import (
    BLOCK_INPUTS,
    BLOCK_SCALE,
    OUTPUTS_FIRST,
    SCALE,
    TENSOR_SCALE,
    decode_e2m1,
    encode_e2m1,
    leaf_shapes,
    pack_nibbles,
    unpack_int4,
    unpack_nibbles,
)


def _kernel(inputs: int, outputs: int, seed: int = 0) -> np.ndarray:
    """Columns of very different sizes, one of them zero, and one zero block."""
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((inputs, outputs)) * np.exp(rng.uniform(-3, 3, outputs))
    kernel[:, 1] = 0
    kernel[:32, 2] = 0
    return kernel.astype(np.float32)


def _largest_step_error(leaves: dict, inputs: int, format_name: str, kernel: np.ndarray) -> np.ndarray:
    """What rounding to the nearest number of the format can be wrong by at most, value by value."""
    if format_name == "int8":
        return np.broadcast_to(np.asarray(leaves[SCALE]) / 2, kernel.shape)
    if format_name == "fp8":
        # three bits behind the first one: half of 2^-3 of the value; below 2^-6 steps are 2^-9 wide
        return np.maximum(np.abs(kernel) * 2.0**-4, np.asarray(leaves[SCALE]) * 2.0**-10)
    scale = np.asarray(leaves[BLOCK_SCALE], np.float32).repeat(BLOCK_INPUTS[format_name], 0)[:inputs]
    if format_name == "int4":
        return scale / 2
    scale = scale * np.asarray(leaves[TENSOR_SCALE])
    size = np.abs(kernel) / np.where(scale > 0, scale, 1)
    # steps of 0.5 up to 2, 1 up to 4, 2 up to 6; beyond that, which a scale rounded down allows, it is 6
    step = np.select([size <= 2, size <= 4, size <= 6], [0.25, 0.5, 1.0], size - 6)
    return np.where(scale > 0, step * scale, np.abs(kernel))


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("inputs", [64, 75])
def test_every_value_is_rounded_to_the_nearest(format_name, inputs):
    kernel = _kernel(inputs, 9)
    leaves = quantize_kernel(jnp.asarray(kernel), format_name)
    shapes = leaf_shapes(kernel.shape, format_name)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()} == {
        name: (shape.shape, shape.dtype) for name, shape in shapes.items()
    }
    back = np.asarray(dequantize_kernel(leaves, inputs))
    assert back.shape == kernel.shape
    bound = _largest_step_error(leaves, inputs, format_name, kernel)
    assert (np.abs(back - kernel) <= bound + 1e-6 * np.abs(kernel)).all()  # what is added is float32's own
    assert (back[:, 1] == 0).all()
    assert (back[:32, 2] == 0).all()
    # Scales themselves: the largest of a column or block is within the scale's own rounding of the format's largest.
    largest = {"int8": 127, "fp8": 448, "int4": 7, "nvfp4": 6}[format_name]
    if format_name in BLOCK_INPUTS:
        length = BLOCK_INPUTS[format_name]
        padded = np.pad(np.abs(kernel), ((0, -inputs % length), (0, 0))).reshape(-1, length, 9).max(1)
        scale = np.asarray(leaves[BLOCK_SCALE], np.float32) * np.asarray(leaves.get(TENSOR_SCALE, 1.0))
        rounding, smallest = {"int4": (2.0**-8, 0), "nvfp4": (2.0**-4, 2.0**-10)}[format_name]
        floor = smallest * np.asarray(leaves.get(TENSOR_SCALE, 0.0))
        assert (np.abs(scale - padded / largest) <= (rounding + 1e-6) * padded / largest + floor).all()
    else:
        np.testing.assert_allclose(np.asarray(leaves[SCALE]), np.abs(kernel).max(0) / largest, rtol=1e-6)


def test_quantising_what_was_dequantised_changes_nothing():
    for format_name in ("int8", "fp8"):
        leaves = quantize_kernel(jnp.asarray(_kernel(64, 9)), format_name)
        again = quantize_kernel(dequantize_kernel(leaves, 64), format_name)
        np.testing.assert_array_equal(
            *(np.asarray(own[f"kernel_{format_name}"], np.float32) for own in (leaves, again))
        )


def test_packing_is_undone_to_the_bit_and_the_even_input_lies_in_the_low_half():
    codes = np.random.default_rng(0).integers(0, 16, (10, 7)).astype(np.uint8)
    packed = pack_nibbles(jnp.asarray(codes))
    assert packed.shape == (5, 7)
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(np.asarray(packed) & 15, codes[0::2])
    np.testing.assert_array_equal(np.asarray(unpack_nibbles(packed)), codes)
    np.testing.assert_array_equal(np.asarray(unpack_int4(packed)), (codes.astype(np.int8) ^ 8) - 8)


def test_e2m1_is_that_of_ml_dtypes():
    halves = np.concatenate([np.linspace(-7, 7, 1001), [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.0]])
    values = np.concatenate([halves, -halves]).astype(np.float32)
    expected = values.astype(ml_dtypes.float4_e2m1fn)
    codes = np.asarray(encode_e2m1(jnp.asarray(values)))
    np.testing.assert_array_equal(codes, expected.view(np.uint8) & 15)
    np.testing.assert_array_equal(np.asarray(decode_e2m1(jnp.asarray(codes))), expected.astype(np.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_int8_product_is_its_definition_in_integers(dtype):
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((2, 5, 75)) * 3, dtype).at[0, 1].set(0)
    leaves = quantize_kernel(jnp.asarray(_kernel(75, 9)), "int8")
    wide = np.asarray(x, np.float32).reshape(10, 75)
    own_scale = np.abs(wide).max(1, keepdims=True) / np.float32(127)
    codes = np.round(wide / np.where(own_scale > 0, own_scale, 1)).astype(np.int64)
    sums = codes @ np.asarray(leaves["kernel_int8"], np.int64).T
    expected = (sums.astype(np.float32) * own_scale * np.asarray(leaves[SCALE])).reshape(2, 5, 9)
    got = jax.jit(quantized_product)(x, leaves)
    assert got.dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 2.0**-8
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=tolerance)
    assert (np.asarray(got)[0, 1] == 0).all()


def test_the_fp8_product_is_its_definition_in_float64():
    x = np.random.default_rng(4).standard_normal((10, 75)).astype(np.float32) * 100
    leaves = quantize_kernel(jnp.asarray(_kernel(75, 9)), "fp8")
    own_scale = np.abs(x).max(1, keepdims=True) / np.float32(448)
    codes = (x / own_scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    values = np.asarray(leaves["kernel_fp8"]).astype(np.float64).T
    expected = (codes @ values) * own_scale * np.asarray(leaves[SCALE])
    got = np.asarray(quantized_product(jnp.asarray(x), leaves))
    # sums of float32, against the sum of the absolute products
    np.testing.assert_array_less(
        np.abs(got - expected), 75 * 2.0**-24 * (np.abs(codes) @ np.abs(values)) * own_scale * leaves[SCALE] + 1e-30
    )


@pytest.mark.parametrize("format_name", ["int4", "nvfp4"])
def test_the_weight_only_product_is_that_with_the_dequantised_kernel(format_name):
    x = jnp.asarray(np.random.default_rng(5).standard_normal((3, 75)), jnp.float32)
    leaves = quantize_kernel(jnp.asarray(_kernel(75, 9)), format_name)
    with jax.default_matmul_precision("highest"):
        expected = x @ dequantize_kernel(leaves, 75)
        np.testing.assert_allclose(quantized_product(x, leaves), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format_name", FORMATS)
def test_the_gradient_is_that_of_the_product_with_the_dequantised_kernel(format_name):
    x = jnp.asarray(np.random.default_rng(6).standard_normal((3, 64)), jnp.float32)
    leaves = quantize_kernel(jnp.asarray(_kernel(64, 9)), format_name)
    weights = jnp.arange(9.0)
    with jax.default_matmul_precision("highest"):
        got = jax.grad(lambda x: (quantized_product(x, leaves) * weights).sum())(x)
        expected = jnp.broadcast_to(dequantize_kernel(leaves, 64) @ weights, x.shape)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_format_or_kernel_that_is_not_allowed_is_named():
    with pytest.raises(ValueError, match=r"'int3'.*int8, fp8, int4, nvfp4"):
        quantize_kernel(jnp.zeros((4, 4)), "int3")
    with pytest.raises(ValueError, match=r"133145 inputs.*choose fp8"):
        jax.eval_shape(lambda: quantize_kernel(jnp.zeros((133145, 4)), "int8"))


@pytest.mark.parametrize("format_name", FORMATS)
def test_products_lower_for_cuda(format_name):
    leaves = dict(leaf_shapes((2240, 5600), format_name).items())
    x = jax.ShapeDtypeStruct((1024, 2240), jnp.bfloat16)
    text = jax.jit(quantized_product).trace(x, leaves).lower(lowering_platforms=("cuda",)).as_text()
    operand = {"int8": "xi8>", "fp8": "xf8E4M3FN>", "int4": "xbf16>", "nvfp4": "xbf16>"}[format_name]
    product = next(line for line in text.splitlines() if "dot_general" in line)
    assert product.split(":")[-1].split("->")[0].count(operand) == 2
    # both operands lie along what is summed up: cuBLAS multiplies 8 bits in no other way
    assert format_name not in OUTPUTS_FIRST or "contracting_dims = [1] x [1]" in product
