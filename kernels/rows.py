"""What Pallas kernels share that go through tokens one by one, each as one vector of all its channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.refusal import Refusal

ROWS = 4  # tokens of a program
# Where every program writes sums over its tokens too, more of them.
ROWS_WITH_SUMS = 16


def refuse_float64(operands: tuple) -> None:
    """Raises ``Refusal`` for operands that these kernels, which compute in float32, would make less exact."""
    if any(x.dtype == jnp.float64 for x in operands):
        raise Refusal("implementation='pallas': float64 inputs: it computes in float32; use 'xla' for float64")


def channels_of_block(channels: int) -> Any:
    """Indices of a vector of all channels, filled up to a power of two as Triton wants it."""
    return jnp.arange(pl.next_power_of_2(channels))


def load(ref: Any, index: tuple, own: Any) -> Any:
    """Float32 values at ``index``, whose last entry has the channels; 0 where not ``own``."""
    return plgpu.load(ref.at[index], mask=own, other=0).astype(jnp.float32)


def store(ref: Any, index: tuple, values: Any, own: Any) -> None:
    """Rounds values to the output's dtype and writes them where ``own``."""
    plgpu.store(ref.at[index], values.astype(ref.dtype), mask=own)


def over_tokens(
    kernel: Callable, operands: tuple, out: Any, shape: tuple[int, int, int], rows: int, interpret: bool
) -> Any:
    """Runs ``kernel`` for every group of tokens and every ``rows`` tokens of it.

    Args:
        kernel: gets the group, the number of the program in it, the first token, and references to operands and
            outputs.
        operands: arrays.
        out: shapes of the outputs.
        shape: (groups, tokens of a group, channels).
        rows: tokens of a program.
        interpret: whether to run it with plain JAX operations.

    Raises:
        Refusal: for float64 operands.
    """
    refuse_float64(operands)
    groups, tokens, channels = shape

    def run(*refs: Any) -> None:
        group, block = pl.program_id(1), pl.program_id(0)
        kernel(group, block, block * rows, *refs)

    warps = min(8, max(1, pl.next_power_of_2(channels) // 256))
    return pl.pallas_call(
        run,
        out_shape=out,
        grid=(pl.cdiv(tokens, rows), groups),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        name=kernel.__name__,
    )(*operands)


def each_token(rows: int, first: Any, tokens: int, body: Callable, start: Any) -> Any:
    """``carry = body(token, whether there is one, carry)`` for the ``rows`` tokens from ``first`` on."""
    return jax.lax.fori_loop(0, rows, lambda i, carry: body(first + i, first + i < tokens, carry), start)
