"""Activations whose inside is float32 whatever the compute dtype is."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.typing import Array, Float


def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x / (1 + exp(-x))``, rounded once to ``x``'s dtype. A backward pass keeps one array of ``x``'s size."""
    return rounded_once(_silu, x)


@jax.custom_jvp
def _silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jax.nn.silu(x)


@_silu.defjvp
def _silu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    sigmoid = jax.nn.sigmoid(x)
    # The slope as one factor: JAX's own rule keeps both x and the sigmoid for the backward pass.
    return _silu(x), dx * (sigmoid * (1 + x * (1 - sigmoid)))


def rounded_once(function: Callable, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``function`` in float32. Written in bfloat16, XLA rounds after every one of its four to eight operations."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return function(x)

    def wide(x: Array) -> Array:
        return function(x.astype(jnp.float32)).astype(x.dtype)

    # A backward pass keeps x alone, not what is float32.
    return jax.checkpoint(wide, prevent_cse=False)(x)
