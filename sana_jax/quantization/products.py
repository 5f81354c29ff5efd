"""Products with quantised kernels."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from kernels.matrix_product import matrix_product
from kernels.typing import Array, Float, Shaped
from sana_jax.quantization.formats import (
    SCALE,
    WEIGHT_ONLY,
    codes_name,
    dequantize_kernel,
    e4m3_codes,
    format_of,
    int8_codes,
)


def quantized_product(x: Float[Array, "... C"], leaves: Mapping[str, Array]) -> Float[Array, "... D"]:
    """``x`` times the kernel that the leaves stand for, in ``x``'s dtype.

    int8 and fp8 quantise ``x`` as well, each row (token) with a scale of its own, and multiply in 8 bits; sums are
    int32 and float32, and the two scales come behind. int4 and nvfp4 turn the kernel into ``x``'s dtype first.

    Differentiable by ``x``: as the product with the kernel, rounding counting as the identity. The leaves are
    constants.
    """
    rows = x.reshape(-1, x.shape[-1])
    format_name = format_of(leaves)
    if format_name in WEIGHT_ONLY:
        constants = jax.lax.stop_gradient(dequantize_kernel(leaves, x.shape[-1]))
        y = matrix_product(rows, constants.astype(x.dtype))
    else:
        y = _product_in_8_bits(rows, leaves[codes_name(format_name)], leaves[SCALE])
    return y.reshape(*x.shape[:-1], y.shape[-1])


@functools.partial(jax.custom_jvp)
def _product_in_8_bits(
    x: Float[Array, "N C"], codes: Shaped[Array, "D C"], scale: Float[Array, " D"]
) -> Float[Array, "N D"]:
    wide = x.astype(jnp.float32)
    whole_numbers = codes.dtype == jnp.int8
    own, own_scale = int8_codes(wide, axis=1) if whole_numbers else e4m3_codes(wide, axis=1)
    sums = jax.lax.dot_general(
        own, codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32 if whole_numbers else jnp.float32
    )
    return (sums.astype(jnp.float32) * own_scale * scale).astype(x.dtype)


@_product_in_8_bits.defjvp
def _product_in_8_bits_jvp(primals, tangents):
    x, codes, scale = primals
    kernel = (codes.T.astype(jnp.float32) * scale).astype(x.dtype)
    return _product_in_8_bits(x, codes, scale), tangents[0] @ kernel
