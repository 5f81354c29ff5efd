"""Pallas kernels for GPUs: each reads a token once and has it in registers from the norm to the rotation.

Where channels are rotated, a token is two vectors, of the first and of the second channels of all pairs; no value
changes its place. Backward, one kernel gives the tokens' cotangents and sums the scale's over a few tokens; these sums
are added up outside.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.qk_norm import xla
from kernels.rows import ROWS, ROWS_WITH_SUMS, channels_of_block, each_token, load, over_tokens, store
from kernels.typing import Array, Float

Tables = tuple[Float[Array, "N p"], Float[Array, "N p"]]


def qk_norm(
    x: Float[Array, "... C"],
    scale: Float[Array, " C"],
    rotation: Tables | None,
    epsilon: float,
    relu: bool,
    interpret: bool = False,
) -> Float[Array, "... C"]:
    """Same value as the reference, in ``x``'s dtype; differentiable in reverse mode, once.

    ``interpret`` runs it with plain JAX operations, on any platform.
    """
    grouped = x.reshape(1, -1, x.shape[-1]) if rotation is None else x
    return _qk_norm(grouped, scale, rotation, epsilon, relu, interpret).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _qk_norm(
    x: Float[Array, "B N C"],
    scale: Float[Array, " C"],
    rotation: Tables | None,
    epsilon: float,
    relu: bool,
    interpret: bool,
) -> Float[Array, "B N C"]:
    tokens, channels = x.shape[1:]
    tables = () if rotation is None else rotation

    def normalise_rows(group: Any, block: Any, first: Any, x: Any, scale: Any, *refs: Any) -> None:
        *tables, out = refs
        parts, own = _parts(channels, bool(tables))
        factors = [load(scale, (part,), own) for part in parts]

        def body(token: Any, there: Any, carry: tuple) -> tuple:
            inside = own & there
            normed, _ = _normed([load(x, (group, token, part), inside) for part in parts], channels, epsilon)
            values = [each * factor for each, factor in zip(normed, factors)]
            values = [jnp.maximum(value, 0) for value in values] if relu else values
            if tables:
                values = _turned(values, *_angles(tables, token, inside))
            for part, value in zip(parts, values):
                store(out, (group, token, part), value, inside)
            return carry

        each_token(ROWS, first, tokens, body, ())

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return over_tokens(normalise_rows, (x, scale, *tables), out, x.shape, ROWS, interpret)


def _keep(
    x: Array, scale: Array, rotation: Tables | None, epsilon: float, relu: bool, interpret: bool
) -> tuple[Array, tuple]:
    return _qk_norm(x, scale, rotation, epsilon, relu, interpret), (x, scale, rotation)


def _gradients(epsilon: float, relu: bool, interpret: bool, kept: tuple, cotangent: Float[Array, "B N C"]) -> tuple:
    x, scale, rotation = kept
    batch, tokens, channels = x.shape
    tables = () if rotation is None else rotation

    def normalise_rows_back(group: Any, block: Any, first: Any, x: Any, scale: Any, cotangent: Any, *refs: Any) -> None:
        *tables, out, sums = refs
        parts, own = _parts(channels, bool(tables))
        factors = [load(scale, (part,), own) for part in parts]

        def body(token: Any, there: Any, totals: tuple) -> tuple:
            inside = own & there
            normed, inverse = _normed([load(x, (group, token, part), inside) for part in parts], channels, epsilon)
            back = [load(cotangent, (group, token, part), inside) for part in parts]
            if tables:
                cos, sin = _angles(tables, token, inside)
                back = _turned(back, cos, -sin)
            if relu:
                back = [jnp.where(each * factor > 0, b, 0) for each, factor, b in zip(normed, factors, back)]
            wanted = [b * factor for b, factor in zip(back, factors)]
            share = sum((w * each).sum() for w, each in zip(wanted, normed)) / channels
            for part, w, each in zip(parts, wanted, normed):
                store(out, (group, token, part), inverse * (w - each * share), inside)
            return tuple(total + b * each for total, b, each in zip(totals, back, normed))

        start = (jnp.zeros(own.shape, jnp.float32),) * len(parts)
        for part, total in zip(parts, each_token(ROWS_WITH_SUMS, first, tokens, body, start)):
            store(sums, (group, block, part), total, own)

    sums = jax.ShapeDtypeStruct((batch, pl.cdiv(tokens, ROWS_WITH_SUMS), channels), jnp.float32)
    outs = (jax.ShapeDtypeStruct(x.shape, x.dtype), sums)
    operands = (x, scale, cotangent, *tables)
    found, sums = over_tokens(normalise_rows_back, operands, outs, x.shape, ROWS_WITH_SUMS, interpret)
    angles = None
    if rotation is not None:
        # Angles are constants, and no network asks for this: it is dropped when the program is compiled.
        _, pull = jax.vjp(lambda rotation: xla.qk_norm(x, scale, rotation, epsilon, relu), rotation)
        (angles,) = pull(cotangent)
    return found, sums.sum((0, 1)).astype(scale.dtype), angles


_qk_norm.defvjp(_keep, _gradients)


def _parts(channels: int, paired: bool) -> tuple[list, Any]:
    """Indices of the channels, in two vectors where they are ``paired``, and which entries of a vector are in use."""
    if not paired:
        index = channels_of_block(channels)
        return [index], index < channels
    pair = channels_of_block(channels // 2)
    return [2 * pair, 2 * pair + 1], pair < channels // 2


def _normed(parts: list, channels: int, epsilon: float) -> tuple[list, Any]:
    """A token divided by its root mean square, and what it was multiplied by for that."""
    inverse = jax.lax.rsqrt(sum((part * part).sum() for part in parts) / channels + epsilon)
    return [part * inverse for part in parts], inverse


def _angles(tables: list, token: Any, own: Any) -> list:
    """Cosines and sines of a token for the pairs of all heads, which have the same ones."""
    pairs = tables[0].shape[1]
    column = jnp.arange(own.shape[0]) % pairs
    return [load(table, (token, column), own) for table in tables]


def _turned(pair: list, cos: Any, sin: Any) -> list:
    first, second = pair
    return [first * cos - second * sin, first * sin + second * cos]
