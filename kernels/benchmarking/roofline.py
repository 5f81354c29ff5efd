"""The least time that a computation can take on a machine whose peaks were measured, and the measuring of them.

Source: the roofline model (Williams, Waterman, Patterson, 2009). The peaks are those of a plain matrix product and a
plain copy in the same process, not those of a data sheet: a share of 1 is what this machine does at its best today.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels.benchmarking.timing import compile_timed, random_like, time_interleaved
from kernels.matrix_product import matrix_product

# What products are computed in: the inputs' dtype, and the precision that JAX is asked for. On NVIDIA GPUs float32 at
# default precision is TF32.
PRODUCTS = {
    "float32": (jnp.float32, "default"),
    "float32 highest": (jnp.float32, "highest"),
    "bfloat16": (jnp.bfloat16, "default"),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a computation needs at least.

    Attributes:
        flops: additions and multiplications, each counted once.
        bytes: inputs read once and outputs written once.
        products: a name of ``PRODUCTS``: at which peak the FLOPs are done.
    """

    flops: float
    bytes: float
    products: str = "float32"


def measure_peaks(
    matmul_size: int, copy_bytes: int, products: tuple[str, ...] = tuple(PRODUCTS), repetitions: int = 5
) -> dict[str, Any]:
    """FLOP/s of a square matrix product for each kind of product, and bytes/s of a copy (read and written).

    Args:
        matmul_size: rows and columns of both operands.
        copy_bytes: size of the array that is copied.
        products: names of ``PRODUCTS``.
        repetitions: samples; the median counts.
    """
    peaks: dict[str, Any] = {"flops_per_s": {}, "matmul_size": matmul_size, "copy_bytes": copy_bytes}
    shape = (matmul_size, matmul_size)
    for name in products:
        dtype, precision = PRODUCTS[name]
        operands = random_like([jax.ShapeDtypeStruct(shape, dtype)] * 2)
        with jax.default_matmul_precision(precision):
            compiled, _ = compile_timed(matrix_product, *operands)  # as the networks multiply
        timing = time_interleaved({name: functools.partial(compiled, *operands)}, repetitions, at_least=0.02)[name]
        peaks["flops_per_s"][name] = 2 * matmul_size**3 / timing.median
    x = jnp.zeros(copy_bytes // 4, jnp.float32)
    compiled, _ = compile_timed(lambda x: x + 1, x)
    timing = time_interleaved({"copy": functools.partial(compiled, x)}, repetitions, at_least=0.02)["copy"]
    peaks["bytes_per_s"] = 2 * x.nbytes / timing.median
    return peaks


def roofline(cost: Cost, peaks: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Of a computation that took ``seconds``: its counts, what bounds it, and the share of the bound that it reaches.

    The share can pass 1 where the operands stay in a cache between calls.
    """
    compute, memory = cost.flops / peaks["flops_per_s"][cost.products], cost.bytes / peaks["bytes_per_s"]
    return {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "bound": f"{cost.products} products" if compute > memory else "memory",
        "roofline_share": max(compute, memory) / seconds,
    }
