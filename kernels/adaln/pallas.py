"""Pallas kernels for GPUs: each reads a token once and has it in registers from the mean to the result.

Backward, one kernel gives the tokens' cotangents and sums those of shift, scale and gate over a few tokens; these
sums are added up outside.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.rows import ROWS, ROWS_WITH_SUMS, channels_of_block, each_token, load, over_tokens, store
from kernels.typing import Array, Float


def modulated_norm(
    x: Float[Array, "*B N D"],
    shift: Float[Array, "*#B 1 D"],
    scale: Float[Array, "*#B 1 D"],
    epsilon: float,
    interpret: bool = False,
) -> Float[Array, "*B N D"]:
    """Same value as the reference, in ``x``'s dtype; differentiable in reverse mode, once.

    ``interpret`` runs it with plain JAX operations, on any platform.
    """
    rows = (_by_group(row, x) for row in (shift, scale))
    return _modulated_norm(_groups(x), *rows, epsilon, interpret).reshape(x.shape)


def gated_residual(
    x: Float[Array, "*B N D"],
    gate: Float[Array, "*#B 1 D"],
    update: Float[Array, "*B N D"],
    interpret: bool = False,
) -> Float[Array, "*B N D"]:
    """As ``modulated_norm``."""
    return _gated_residual(_groups(x), _by_group(gate, x), _groups(update), interpret).reshape(x.shape)


def _groups(x: Float[Array, "*B N D"]) -> Float[Array, "G N D"]:
    return x.reshape(-1, *x.shape[-2:])


def _by_group(row: Float[Array, "*#B 1 D"], x: Float[Array, "*B N D"]) -> Float[Array, "G D"]:
    return jnp.broadcast_to(row, (*x.shape[:-2], 1, x.shape[-1])).reshape(-1, x.shape[-1])


def _sums_shape(x: Float[Array, "G N D"]) -> jax.ShapeDtypeStruct:
    groups, tokens, channels = x.shape
    return jax.ShapeDtypeStruct((groups, pl.cdiv(tokens, ROWS_WITH_SUMS), channels), jnp.float32)


# -- norm and modulation -----------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _modulated_norm(
    x: Float[Array, "G N D"], shift: Float[Array, "G D"], scale: Float[Array, "G D"], epsilon: float, interpret: bool
) -> Float[Array, "G N D"]:
    tokens, channels = x.shape[1:]

    def modulate_rows(group: Any, block: Any, first: Any, x: Any, shift: Any, scale: Any, out: Any) -> None:
        index = channels_of_block(channels)
        own = index < channels
        offset, factor = load(shift, (group, index), own), 1 + load(scale, (group, index), own)

        def body(token: Any, there: Any, carry: tuple) -> tuple:
            normed, _ = _normed(load(x, (group, token, index), own & there), own, channels, epsilon)
            store(out, (group, token, index), normed * factor + offset, own & there)
            return carry

        each_token(ROWS, first, tokens, body, ())

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return over_tokens(modulate_rows, (x, shift, scale), out, x.shape, ROWS, interpret)


def _normed(x: Any, own: Any, channels: int, epsilon: float) -> tuple[Any, Any]:
    """A token with mean 0 and variance 1, and what it was multiplied by for that."""
    centred = jnp.where(own, x - x.sum() / channels, 0)
    inverse = jax.lax.rsqrt((centred * centred).sum() / channels + epsilon)
    return centred * inverse, inverse


def _keep(x: Array, shift: Array, scale: Array, epsilon: float, interpret: bool) -> tuple[Array, tuple]:
    return _modulated_norm(x, shift, scale, epsilon, interpret), (x, shift, scale)


def _norm_gradients(epsilon: float, interpret: bool, kept: tuple, cotangent: Float[Array, "G N D"]) -> tuple:
    x, shift, scale = kept
    tokens, channels = x.shape[1:]

    def modulate_rows_back(
        group: Any, block: Any, first: Any, x: Any, scale: Any, cotangent: Any, out: Any, shifts: Any, scales: Any
    ) -> None:
        index = channels_of_block(channels)
        own = index < channels
        factor = 1 + load(scale, (group, index), own)

        def body(token: Any, there: Any, sums: tuple) -> tuple:
            place, inside = (group, token, index), own & there
            normed, inverse = _normed(load(x, place, inside), own, channels, epsilon)
            back = load(cotangent, place, inside)
            wanted = back * factor
            across = wanted - wanted.sum() / channels - normed * ((wanted * normed).sum() / channels)
            store(out, place, inverse * across, inside)
            return sums[0] + back, sums[1] + back * normed

        nothing = jnp.zeros(index.shape, jnp.float32)
        for ref, total in zip((shifts, scales), each_token(ROWS_WITH_SUMS, first, tokens, body, (nothing, nothing))):
            store(ref, (group, block, index), total, own)

    outs = (jax.ShapeDtypeStruct(x.shape, x.dtype), _sums_shape(x), _sums_shape(x))
    operands = (x, scale, cotangent)
    found, shifts, scales = over_tokens(modulate_rows_back, operands, outs, x.shape, ROWS_WITH_SUMS, interpret)
    return found, shifts.sum(1).astype(shift.dtype), scales.sum(1).astype(scale.dtype)


_modulated_norm.defvjp(_keep, _norm_gradients)


# -- gated residual ----------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gated_residual(
    x: Float[Array, "G N D"], gate: Float[Array, "G D"], update: Float[Array, "G N D"], interpret: bool
) -> Float[Array, "G N D"]:
    tokens, channels = x.shape[1:]

    def gate_rows(group: Any, block: Any, first: Any, x: Any, gate: Any, update: Any, out: Any) -> None:
        index = channels_of_block(channels)
        own = index < channels
        factor = load(gate, (group, index), own)

        def body(token: Any, there: Any, carry: tuple) -> tuple:
            place, inside = (group, token, index), own & there
            store(out, place, load(x, place, inside) + factor * load(update, place, inside), inside)
            return carry

        each_token(ROWS, first, tokens, body, ())

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return over_tokens(gate_rows, (x, gate, update), out, x.shape, ROWS, interpret)


def _keep_gated(x: Array, gate: Array, update: Array, interpret: bool) -> tuple[Array, tuple]:
    return _gated_residual(x, gate, update, interpret), (gate, update)


def _gate_gradients(interpret: bool, kept: tuple, cotangent: Float[Array, "G N D"]) -> tuple:
    gate, update = kept
    tokens, channels = update.shape[1:]

    def gate_rows_back(
        group: Any, block: Any, first: Any, gate: Any, update: Any, cotangent: Any, out: Any, gates: Any
    ) -> None:
        index = channels_of_block(channels)
        own = index < channels
        factor = load(gate, (group, index), own)

        def body(token: Any, there: Any, total: Any) -> Any:
            place, inside = (group, token, index), own & there
            back = load(cotangent, place, inside)
            store(out, place, factor * back, inside)
            return total + back * load(update, place, inside)

        nothing = jnp.zeros(index.shape, jnp.float32)
        total = each_token(ROWS_WITH_SUMS, first, tokens, body, nothing)
        store(gates, (group, block, index), total, own)

    outs = (jax.ShapeDtypeStruct(update.shape, update.dtype), _sums_shape(update))
    operands = (gate, update, cotangent)
    found, gates = over_tokens(gate_rows_back, operands, outs, update.shape, ROWS_WITH_SUMS, interpret)
    return cotangent, gates.sum(1).astype(gate.dtype), found


_gated_residual.defvjp(_keep_gated, _gate_gradients)
