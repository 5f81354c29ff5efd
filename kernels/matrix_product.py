"""A product with a weight matrix, in the form that XLA's CPU backend is fast with."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from kernels.typing import Array, Float


def matrix_product(x: Float[Array, "... C"], kernel: Float[Array, "C D"]) -> Float[Array, "... D"]:
    """``x · kernel``, both of one dtype, as one product of two matrices; sums in float32 or better, rounded once.

    The gradient of the kernel is then one as well; over several axes of ``x`` XLA's CPU backend turns both of its
    operands around in memory first, which takes more than twice as long. Differentiable in both modes.
    """
    rows = x.reshape(-1, x.shape[-1])
    multiply = _bfloat16_product if x.dtype == kernel.dtype == jnp.bfloat16 else jnp.matmul
    return multiply(rows, kernel).reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_jvp
def _bfloat16_product(x: Float[Array, "N C"], kernel: Float[Array, "C D"]) -> Float[Array, "N D"]:
    """On a CPU the float32 sums are rounded behind the product.

    Up to jax 0.10 XLA's CPU backend runs products that give bfloat16 as float32 ones, a fifth as fast as the processor
    multiplies bfloat16 where it has units for that. A derivative takes the plain product, as a GPU does: policies of
    rematerialisation know it.
    """
    return jax.lax.platform_dependent(x, kernel, cpu=_rounded_behind, default=jnp.matmul)


def _rounded_behind(x: Float[Array, "N C"], kernel: Float[Array, "C D"]) -> Float[Array, "N D"]:
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)


@functools.partial(_bfloat16_product.defjvp, symbolic_zeros=True)
def _bfloat16_product_jvp(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    """Terms of operands that do not change, as a LoRA's base, are not computed."""
    (x, kernel), (of_x, of_kernel) = primals, tangents
    terms = []
    if not isinstance(of_x, SymbolicZero):
        terms.append(of_x @ kernel)
    if not isinstance(of_kernel, SymbolicZero):
        terms.append(x @ of_kernel)
    return x @ kernel, sum(terms[1:], start=terms[0])
