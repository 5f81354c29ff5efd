"""The update of every frame and head in one pass over its tokens, as Pallas kernels for Triton, and its gradient."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.gated_delta_rule import tiles
from kernels.gated_delta_rule.tiles import (
    HALVES,
    Sizes,
    float32,
    masked_load,
    masked_store,
    product,
    rows_product,
    within,
)
from kernels.typing import Array, Float

Angles = tuple[Float[Array, "T S p"], Float[Array, "T S p"]]


class Updates(NamedTuple):
    """``M -> transition M + addition`` per frame and head, in the order of the kernels' channels (``tiles``).

    Attributes:
        transition: of the numerator's memory.
        addition: to it.
        plain_transition: of the normaliser's memory, from keys that are not rotated; None without a normaliser.
        plain_addition: to it; one column.
    """

    transition: Float[Array, "B T h 2 p 2 p"]
    addition: Float[Array, "B T h 2 p e"]
    plain_transition: Float[Array, "B T h 2 p 2 p"] | None = None
    plain_addition: Float[Array, "B T h 2 p 1"] | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def update(
    sizes: Sizes,
    normalised: bool,
    key_scale: float,
    key: Float[Array, "B T S h d"],
    value: Float[Array, "B T S h e"],
    beta: Float[Array, "B T S h"],
    decay: Float[Array, "B T h"],
    angles: Angles | None,
) -> Updates:
    """``kernels.gated_delta_rule.updates.frame_update`` of every frame and head, float32.

    One program has one frame and head and half of the matrices' columns. It reads every key once, rotates it, and adds
    its products to sums in registers. The gradient by keys, values, β and decay is a kernel too, with one program per
    block of tokens; the tables of angles have none.
    """
    frames, tokens = sizes.batch * sizes.frames, tiles.side(sizes.tokens, tiles.SUMMED_TOKENS)
    all_tokens = pl.cdiv(sizes.tokens, tokens) * tokens
    half, columns = sizes.key_side, sizes.half_value_side
    inputs = {
        "key": (
            tiles.split_tokens(key, sizes),
            tiles.tokens_block(sizes, all_tokens, lambda frame, head, part: (frame, 0, head)),
        ),
        "value": (
            value.reshape(frames, *value.shape[2:]),
            pl.BlockSpec((None, all_tokens, None, columns), lambda frame, head, part: (frame, 0, head, part)),
        ),
        "beta": (
            beta.reshape(frames, *beta.shape[2:]),
            pl.BlockSpec((None, all_tokens, None), lambda frame, head, part: (frame, 0, head)),
        ),
        "decay": (decay.reshape(frames, -1), pl.BlockSpec((None, None), lambda frame, head, part: (frame, head))),
        **_angles(angles, (None, all_tokens, half), lambda frame, head, part: (frame % sizes.frames, 0, 0)),
    }
    matrix = float32(frames, sizes.heads, 2, sizes.pairs, 2, sizes.pairs)
    matrix_block = pl.BlockSpec(
        (None, None, 2, half, None, half), lambda frame, head, part: (frame, head, 0, 0, part, 0)
    )
    outputs = {
        "transition": (matrix, matrix_block),
        "addition": (
            float32(frames, sizes.heads, 2, sizes.pairs, sizes.value),
            pl.BlockSpec((None, None, 2, half, columns), lambda frame, head, part: (frame, head, 0, 0, part)),
        ),
    }
    if normalised:
        outputs["plain_transition"] = matrix, matrix_block
        outputs["plain_addition"] = (
            float32(frames, sizes.heads, 2, sizes.pairs),
            pl.BlockSpec((None, None, None, half), lambda frame, head, part: (frame, head, part, 0)),
        )
    kernel = functools.partial(_update, sizes=sizes, tokens=tokens, key_scale=key_scale, normalised=normalised)
    found = tiles.launch(kernel, (frames, sizes.heads, 2), inputs, outputs, interpret=sizes.interpret)
    found = {name: x.reshape(sizes.batch, sizes.frames, *x.shape[1:]) for name, x in found.items()}
    if normalised:
        found["plain_addition"] = found["plain_addition"][..., None]
    return Updates(**found)


def _angles(angles: Angles | None, block: tuple, where: Any) -> dict[str, tuple[Array, pl.BlockSpec]]:
    return {} if angles is None else {name: (x, pl.BlockSpec(block, where)) for name, x in zip(("cos", "sin"), angles)}


def _update(refs: Mapping[str, Any], sizes: Sizes, tokens: int, key_scale: float, normalised: bool) -> None:
    part, half, columns = pl.program_id(2), sizes.key_side, sizes.half_value_side
    value_columns = within(part * columns, columns, sizes.value)

    def add(step, sums):
        start = step * tokens
        valid = within(start, tokens, sizes.tokens)
        plain = tiles.load_halves(refs["key"], start, valid, sizes)
        turned = tiles.rotate(plain, tiles.load_angles(refs, start, valid, sizes))
        beta = masked_load(refs["beta"].at[pl.ds(start, tokens)], valid)[:, None]
        value = masked_load(refs["value"].at[pl.ds(start, tokens), :], valid, value_columns)
        own = jnp.where(part == 0, *turned)
        found = [rows_product(x * beta, own, sizes) for x in turned] + [
            rows_product(x * beta, value, sizes) for x in turned
        ]
        if normalised:
            own = jnp.where(part == 0, *plain)
            found += [rows_product(x * beta, own, sizes) for x in plain] + [(own * beta).sum(0)]
        return tuple(total + x for total, x in zip(sums, found, strict=True))

    shapes = [(half, half)] * 2 + [(half, columns)] * 2 + ([(half, half)] * 2 + [(half,)] if normalised else [])
    sums = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    sums = jax.lax.fori_loop(0, pl.cdiv(sizes.tokens, tokens), add, sums)
    decay, channels = refs["decay"][...].astype(jnp.float32), within(0, half, sizes.pairs)
    diagonal = jnp.arange(half)[:, None] == jnp.arange(half)[None, :]

    def store_transition(ref, gram):
        for row in HALVES:
            identity = (diagonal & (part == row)).astype(jnp.float32)
            masked_store(ref.at[row], decay * (identity - key_scale**2 * gram[row]), channels, channels)

    store_transition(refs["transition"], sums[:2])
    for row in HALVES:
        masked_store(refs["addition"].at[row], key_scale * sums[2 + row], channels, value_columns)
    if normalised:
        store_transition(refs["plain_transition"], sums[4:6])
        masked_store(refs["plain_addition"].at[...], key_scale * sums[6], channels)


# -- gradient ----------------------------------------------------------------------------------------------------------


def _forward(sizes, normalised, key_scale, *inputs):
    return update(sizes, normalised, key_scale, *inputs), inputs


def _backward(sizes, normalised, key_scale, inputs, cotangents: Updates):
    """Per token, with P = -c² (dW + dWᵀ), Q = c dU, and k what the frame's matrices are made of.

    ``dk = β (g P k + Q v)``, ``dv = β Qᵀ k``, ``dβ = k·(g P k / 2 + Q v)``; the decay gets ``tr dW + Σ β k·P k / 2``.
    """
    key, value, beta, decay, angles = inputs
    frames, tokens = sizes.batch * sizes.frames, tiles.side(sizes.tokens, tiles.OWN_TOKENS)
    half = sizes.key_side
    own = {
        "key": tiles.tokens_block(sizes, tokens, lambda frame, head, block: (frame, block, head)),
        "value": pl.BlockSpec(
            (None, tokens, None, 2 * sizes.half_value_side), lambda frame, head, block: (frame, block, head, 0)
        ),
        "beta": pl.BlockSpec((None, tokens, None), lambda frame, head, block: (frame, block, head)),
    }
    arrays = {
        "key": tiles.split_tokens(key, sizes),
        "value": value.reshape(frames, *value.shape[2:]),
        "beta": beta.reshape(frames, *beta.shape[2:]),
    }

    def symmetric(x: Array) -> Array:
        x = x.reshape(frames, sizes.heads, sizes.key, sizes.key)
        x = -(key_scale**2) * (x + jnp.swapaxes(x, -1, -2))
        return x.reshape(frames, sizes.heads, 2, sizes.pairs, 2, sizes.pairs)

    matrix = pl.BlockSpec((None, None, 2, half, 2, half), lambda frame, head, block: (frame, head, 0, 0, 0, 0))
    inputs = {name: (x, own[name]) for name, x in arrays.items()}
    inputs["decay"] = decay.reshape(frames, -1), pl.BlockSpec((None, None), lambda frame, head, block: (frame, head))
    inputs |= _angles(angles, (None, tokens, half), lambda frame, head, block: (frame % sizes.frames, block, 0))
    inputs["transition"] = symmetric(cotangents.transition), matrix
    inputs["addition"] = (
        key_scale * cotangents.addition.reshape(frames, sizes.heads, 2, sizes.pairs, sizes.value),
        pl.BlockSpec(
            (None, None, 2, half, 2 * sizes.half_value_side), lambda frame, head, block: (frame, head, 0, 0, 0)
        ),
    )
    if normalised:
        inputs["plain_transition"] = symmetric(cotangents.plain_transition), matrix
        inputs["plain_addition"] = (
            key_scale * cotangents.plain_addition.reshape(frames, sizes.heads, 2, sizes.pairs),
            pl.BlockSpec((None, None, 2, half), lambda frame, head, block: (frame, head, 0, 0)),
        )
    outputs = {f"d_{name}": (jax.ShapeDtypeStruct(x.shape, x.dtype), own[name]) for name, x in arrays.items()}
    outputs["shrinking"] = float32(*arrays["beta"].shape), own["beta"]
    kernel = functools.partial(_update_gradient, sizes=sizes, tokens=tokens, normalised=normalised)
    grid = frames, sizes.heads, pl.cdiv(sizes.tokens, tokens)
    found = tiles.launch(kernel, grid, inputs, outputs, interpret=sizes.interpret)
    d_decay = (beta.astype(jnp.float32) * found["shrinking"].reshape(beta.shape)).sum(2)
    for x in (cotangents.transition, cotangents.plain_transition):
        if x is not None:
            d_decay += jnp.trace(x.reshape(*decay.shape, sizes.key, sizes.key), axis1=-2, axis2=-1)
    gradients = (found[f"d_{name}"].reshape(x.shape) for name, x in (("key", key), ("value", value), ("beta", beta)))
    return *gradients, d_decay.astype(decay.dtype), jax.tree.map(jnp.zeros_like, angles)


def _update_gradient(refs: Mapping[str, Any], sizes: Sizes, tokens: int, normalised: bool) -> None:
    valid = within(pl.program_id(2) * tokens, tokens, sizes.tokens)
    channels = within(0, sizes.key_side, sizes.pairs)
    beta, decay = masked_load(refs["beta"].at[...], valid), refs["decay"][...].astype(jnp.float32)
    along, d_beta = jnp.zeros((tokens,), jnp.float32), jnp.zeros((tokens,), jnp.float32)

    def shrunk(ref, key):
        """P k, which is symmetric: both halves of its columns for both halves of its rows."""
        return [
            sum(product(key[row], masked_load(ref.at[row, :, column, :], channels, channels), sizes) for row in HALVES)
            for column in HALVES
        ]

    # One product after another, and what is cheap to load again is: a program has few registers for so many tiles.
    plain, d_plain = tiles.load_halves(refs["key"], 0, valid, sizes), (0.0, 0.0)
    if normalised:
        shrinking = shrunk(refs["plain_transition"], plain)
        adding = [masked_load(refs["plain_addition"].at[row], channels)[None, :] for row in HALVES]
        along += sum((key * r).sum(1) for key, r in zip(plain, shrinking))
        d_beta += sum((key * w).sum(1) for key, w in zip(plain, adding))
        d_plain = tuple(decay * r + w for r, w in zip(shrinking, adding))
    turned = tiles.rotate(plain, tiles.load_angles(refs, 0, valid, sizes))
    shrinking = shrunk(refs["transition"], turned)
    along += sum((key * r).sum(1) for key, r in zip(turned, shrinking))
    d_turned = [decay * r for r in shrinking]
    for half in HALVES:
        columns, own = tiles.value_columns(half, sizes)
        value, d_value = masked_load(refs["value"].at[:, columns], valid, own), 0.0
        for row in HALVES:
            addition = masked_load(refs["addition"].at[row, :, columns], channels, own)
            adding = tiles.columns_product(value, addition, sizes)
            d_turned[row] += adding
            d_beta += (turned[row] * adding).sum(1)
            d_value += product(turned[row], addition, sizes)
        masked_store(refs["d_value"].at[:, columns], beta[:, None] * d_value, valid, own)
    masked_store(refs["d_beta"].at[...], d_beta + decay * along / 2, valid)
    masked_store(refs["shrinking"].at[...], along / 2, valid)
    d_turned = tiles.rotate(d_turned, tiles.load_angles(refs, 0, valid, sizes), back=True)
    tiles.store_halves(refs["d_key"], tuple(beta[:, None] * (x + y) for x, y in zip(d_turned, d_plain)), valid, sizes)


update.defvjp(_forward, _backward)
