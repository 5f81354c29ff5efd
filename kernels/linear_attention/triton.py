"""Fused form for NVIDIA GPUs, in Triton through jax-triton: the forward pass; gradients are those of the XLA form.

The same ``@triton.jit`` functions can be called from PyTorch, so that they can be compared there one to one.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels import triton_programs
from kernels.linear_attention import xla
from kernels.linear_attention.blocks import Blocks, check_inputs, is_half
from kernels.typing import Array, Float

Rotation = tuple[Array, Array]  # cosine and sine of every token and channel pair


def relu_linear_attention(
    query: Float[Array, "B N h d"], key: Float[Array, "B M h d"], value: Float[Array, "B M h e"], epsilon: float = 1e-15
) -> Float[Array, "B N h e"]:
    """Same value as the reference; differentiable in reverse mode alone; the result keeps ``value``'s dtype.

    Raises:
        ValueError: where jax-triton cannot be used, for a dtype other than float32, bfloat16 and float16, a head size
            over 128, or no tokens at all.
    """
    check_inputs("triton", query, key, value)
    return _attention(query, key, value, None, epsilon)


def rope_linear_attention(
    query: Float[Array, "B N h d"],
    key: Float[Array, "B N h d"],
    value: Float[Array, "B N h e"],
    cos: Float[Array, "N p"],
    sin: Float[Array, "N p"],
    epsilon: float = 1e-15,
) -> Float[Array, "B N h e"]:
    """Same value as the reference; ``relu_linear_attention`` has the rest."""
    check_inputs("triton", query, key, value)
    return _attention(query, key, value, (cos, sin), epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(query: Array, key: Array, value: Array, rotation: Rotation | None, epsilon: float) -> Array:
    call = functools.partial(triton_programs.call, f"{__package__}.triton_kernels")
    parts = 1 if rotation is None else 2
    tables = (value, value) if rotation is None else rotation  # a pointer that is not followed where nothing rotates
    keys, queries = Blocks.of(key, value, parts), Blocks.of(query, value, parts)
    sizes = (parts, keys.padded, keys.padded_value)
    leading = (keys.programs, keys.batch, keys.heads)
    partial = call(
        "summary_kernel",
        (key, value, *tables),
        [jax.ShapeDtypeStruct((*leading, *shape), jnp.float32) for shape in (sizes, sizes[:2])],
        **_launch(keys),
        BATCH=keys.batch,
        HALF=key.dtype == value.dtype and is_half(key.dtype),
    )
    matrices, vectors = (x.sum(0) for x in partial)
    return call(
        "read_kernel",
        (query, *tables, matrices, vectors, jnp.full((1,), epsilon, jnp.float32)),
        jax.ShapeDtypeStruct((*query.shape[:3], value.shape[3]), value.dtype),
        **_launch(queries),
    )


def _forward(query: Array, key: Array, value: Array, rotation: Rotation | None, epsilon: float) -> tuple[Array, Any]:
    return _attention(query, key, value, rotation, epsilon), (query, key, value, rotation)


def _backward(epsilon: float, residuals: Any, cotangent: Array) -> tuple[Any, ...]:
    *inputs, rotation = residuals
    if rotation is None:
        _, pull = jax.vjp(lambda *x: xla.relu_linear_attention(*x, epsilon), *inputs)
        return (*pull(cotangent), None)
    _, pull = jax.vjp(lambda q, k, v, tables: xla.rope_linear_attention(q, k, v, *tables, epsilon), *inputs, rotation)
    return pull(cotangent)


_attention.defvjp(_forward, _backward)


def _launch(blocks: Blocks) -> dict[str, Any]:
    """The grid of programs, and the constants that both functions are compiled for."""
    return {
        "grid": (blocks.heads, blocks.programs, blocks.batch),
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "TOKENS": blocks.tokens,
        "HEADS": blocks.heads,
        "SIZE": blocks.size,
        "VALUE_SIZE": blocks.value_size,
        "PARTS": blocks.parts,
        "PADDED": blocks.padded,
        "PADDED_VALUE": blocks.padded_value,
        "BLOCK": blocks.block,
        "RUN": blocks.run,
    }
