"""What queries find in the memories of their frames, as Pallas kernels for Triton, and its gradient."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.gated_delta_rule import tiles
from kernels.gated_delta_rule.pallas_update import Angles
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def read(
    sizes: Sizes,
    dtype: Any,
    epsilon: float,
    query: Float[Array, "B T S h d"],
    memory: Float[Array, "B T h 2 p e"],
    normaliser: Float[Array, "B T h 2 p 1"] | None,
    angles: Angles | None,
) -> Float[Array, "B T S h e"]:
    """Rotated queries times the memory of their frame, over un-rotated queries times the normaliser's plus epsilon.

    The gradient by queries and memories takes two kernels: one with a program per block of tokens, one that sums over a
    frame's tokens. The tables of angles have none.

    Args:
        sizes: of the kernels.
        dtype: of the result; sums and the division are float32.
        epsilon: added to the normaliser.
        query: un-rotated queries.
        memory: of every frame, in the order of the kernels' channels.
        normaliser: the same, of one column; None to divide by nothing.
        angles: of every token; None for no rotation.
    """
    inputs, block = _inputs(sizes, query, memory, normaliser, angles)
    outputs = {"out": (jax.ShapeDtypeStruct((*inputs["query"][0].shape[:3], sizes.value), dtype), block)}
    kernel = functools.partial(_read, sizes=sizes, epsilon=epsilon)
    grid = sizes.batch * sizes.frames, sizes.heads, pl.cdiv(sizes.tokens, block.block_shape[1])
    found = tiles.launch(kernel, grid, inputs, outputs, interpret=sizes.interpret)
    return found["out"].reshape(*query.shape[:4], sizes.value)


def _inputs(sizes, query, memory, normaliser, angles):
    """Inputs of a kernel with a program per frame, head and block of tokens; and the block of a program's values."""
    frames, half, columns = sizes.batch * sizes.frames, sizes.key_side, 2 * sizes.half_value_side
    tokens = tiles.side(sizes.tokens, tiles.OWN_TOKENS)
    inputs = {
        "query": (
            tiles.split_tokens(query, sizes),
            tiles.tokens_block(sizes, tokens, lambda frame, head, block: (frame, block, head)),
        ),
        "memory": (
            memory.reshape(frames, *memory.shape[2:]),
            pl.BlockSpec((None, None, 2, half, columns), lambda frame, head, block: (frame, head, 0, 0, 0)),
        ),
    }
    if normaliser is not None:
        inputs["normaliser"] = (
            normaliser.reshape(frames, sizes.heads, 2, sizes.pairs),
            pl.BlockSpec((None, None, 2, half), lambda frame, head, block: (frame, head, 0, 0)),
        )
    if angles is not None:
        turns = pl.BlockSpec((None, tokens, half), lambda frame, head, block: (frame % sizes.frames, block, 0))
        inputs |= {"cos": (angles[0], turns), "sin": (angles[1], turns)}
    return inputs, pl.BlockSpec((None, tokens, None, columns), lambda frame, head, block: (frame, block, head, 0))


def _load(refs: Mapping[str, Any], valid: Array, sizes: Sizes, epsilon: float):
    """Rotated queries, the factor 1 / (denominator + epsilon) and the normaliser, None without one."""
    plain = tiles.load_halves(refs["query"], 0, valid, sizes)
    turned = tiles.rotate(plain, tiles.load_angles(refs, 0, valid, sizes))
    if "normaliser" not in refs:
        return turned, None, None
    channels = within(0, sizes.key_side, sizes.pairs)
    normaliser = [masked_load(refs["normaliser"].at[row], channels)[None, :] for row in HALVES]
    denominator = sum((x * y).sum(1) for x, y in zip(plain, normaliser))
    return turned, 1 / (denominator + epsilon), normaliser


def _memory(refs: Mapping[str, Any], half: Any, sizes: Sizes):
    """One half of the memory's columns, and where they are in a value."""
    columns, own = tiles.value_columns(half, sizes)
    channels = within(0, sizes.key_side, sizes.pairs)
    return [masked_load(refs["memory"].at[row, :, columns], channels, own) for row in HALVES], columns, own


def _read(refs: Mapping[str, Any], sizes: Sizes, epsilon: float) -> None:
    tokens = refs["query"].shape[0]
    valid = within(pl.program_id(2) * tokens, tokens, sizes.tokens)
    turned, factor, _ = _load(refs, valid, sizes, epsilon)
    for half in HALVES:
        memory, columns, own = _memory(refs, half, sizes)
        out = sum(product(x, y, sizes) for x, y in zip(turned, memory))
        masked_store(refs["out"].at[:, columns], out if factor is None else out * factor[:, None], valid, own)


# -- gradient ----------------------------------------------------------------------------------------------------------


def _forward(sizes, dtype, epsilon, *inputs):
    return read(sizes, dtype, epsilon, *inputs), inputs


def _backward(sizes, dtype, epsilon, kept, d_out):
    query, memory, normaliser, angles = kept
    frames, tokens = sizes.batch * sizes.frames, sizes.tokens
    d_out = d_out.reshape(frames, tokens, sizes.heads, sizes.value)
    inputs, block = _inputs(sizes, query, memory, normaliser, angles)
    rows = pl.BlockSpec(block.block_shape[:3], lambda frame, head, block: (frame, block, head))
    split = inputs["query"][0]
    outputs = {"d_query": (jax.ShapeDtypeStruct(split.shape, split.dtype), inputs["query"][1])}
    if normaliser is not None:
        outputs |= {name: (float32(frames, tokens, sizes.heads), rows) for name in ("factor", "d_denominator")}
    kernel = functools.partial(_query_gradient, sizes=sizes, epsilon=epsilon)
    grid = frames, sizes.heads, pl.cdiv(tokens, block.block_shape[1])
    found = tiles.launch(kernel, grid, inputs | {"d_out": (d_out, block)}, outputs, interpret=sizes.interpret)
    d_query = found.pop("d_query").reshape(query.shape)
    d_memory, d_normaliser = _memory_gradients(sizes, split, angles, d_out, found)
    d_normaliser = None if normaliser is None else d_normaliser.reshape(normaliser.shape)
    return d_query, d_memory.reshape(memory.shape), d_normaliser, jax.tree.map(jnp.zeros_like, angles)


def _query_gradient(refs: Mapping[str, Any], sizes: Sizes, epsilon: float) -> None:
    """Of the queries of one block of tokens; writes what the other kernel needs of the division."""
    tokens = refs["query"].shape[0]
    valid = within(pl.program_id(2) * tokens, tokens, sizes.tokens)
    turned, factor, normaliser = _load(refs, valid, sizes, epsilon)
    d_turned, along = [0.0, 0.0], jnp.zeros((tokens,), jnp.float32)
    for half in HALVES:
        memory, columns, own = _memory(refs, half, sizes)
        d_numerator = masked_load(refs["d_out"].at[:, columns], valid, own)
        if factor is not None:
            d_numerator *= factor[:, None]
            along += (d_numerator * sum(product(x, y, sizes) for x, y in zip(turned, memory))).sum(1)
        for row in HALVES:
            d_turned[row] += tiles.columns_product(d_numerator, memory[row], sizes)
    d_query = tiles.rotate(d_turned, tiles.load_angles(refs, 0, valid, sizes), back=True)
    if factor is not None:
        d_denominator = -along * factor
        d_query = tuple(x + d_denominator[:, None] * y for x, y in zip(d_query, normaliser))
        masked_store(refs["factor"].at[...], factor, valid)
        masked_store(refs["d_denominator"].at[...], d_denominator, valid)
    tiles.store_halves(refs["d_query"], d_query, valid, sizes)


def _memory_gradients(sizes, query, angles, d_out, per_token):
    """Sums over a frame's tokens: of the memory, half of its columns per program, and of the normaliser's or None."""
    frames, half, columns = sizes.batch * sizes.frames, sizes.key_side, sizes.half_value_side
    tokens = tiles.side(sizes.tokens, tiles.SUMMED_TOKENS)
    all_tokens = pl.cdiv(sizes.tokens, tokens) * tokens
    inputs = {
        "query": (query, tiles.tokens_block(sizes, all_tokens, lambda frame, head, part: (frame, 0, head))),
        "d_out": (
            d_out,
            pl.BlockSpec((None, all_tokens, None, columns), lambda frame, head, part: (frame, 0, head, part)),
        ),
    }
    rows = pl.BlockSpec((None, all_tokens, None), lambda frame, head, part: (frame, 0, head))
    inputs |= {name: (x, rows) for name, x in per_token.items()}
    if angles is not None:
        turns = pl.BlockSpec((None, all_tokens, half), lambda frame, head, part: (frame % sizes.frames, 0, 0))
        inputs |= {"cos": (angles[0], turns), "sin": (angles[1], turns)}
    outputs = {
        "d_memory": (
            float32(frames, sizes.heads, 2, sizes.pairs, sizes.value),
            pl.BlockSpec((None, None, 2, half, columns), lambda frame, head, part: (frame, head, 0, 0, part)),
        )
    }
    if per_token:
        outputs["d_normaliser"] = (
            float32(frames, sizes.heads, 2, sizes.pairs),
            pl.BlockSpec((None, None, None, half), lambda frame, head, part: (frame, head, part, 0)),
        )
    kernel = functools.partial(_memory_gradient, sizes=sizes, tokens=tokens)
    found = tiles.launch(kernel, (frames, sizes.heads, 2), inputs, outputs, interpret=sizes.interpret)
    return found["d_memory"], found.get("d_normaliser")


def _memory_gradient(refs: Mapping[str, Any], sizes: Sizes, tokens: int) -> None:
    part, half, columns = pl.program_id(2), sizes.key_side, sizes.half_value_side
    channels, own = within(0, half, sizes.pairs), within(part * columns, columns, sizes.value)
    normalised = "factor" in refs

    def add(step, sums):
        start = step * tokens
        valid = within(start, tokens, sizes.tokens)
        plain = tiles.load_halves(refs["query"], start, valid, sizes)
        turned = tiles.rotate(plain, tiles.load_angles(refs, start, valid, sizes))
        d_numerator = masked_load(refs["d_out"].at[pl.ds(start, tokens), :], valid, own)
        if normalised:
            factor, d_denominator = (
                masked_load(refs[name].at[pl.ds(start, tokens)], valid)[:, None] for name in ("factor", "d_denominator")
            )
            d_numerator *= factor
        found = [rows_product(x, d_numerator, sizes) for x in turned]
        if normalised:
            found.append((jnp.where(part == 0, *plain) * d_denominator).sum(0))
        return tuple(total + x for total, x in zip(sums, found, strict=True))

    sums = (jnp.zeros((half, columns), jnp.float32),) * 2
    sums += (jnp.zeros((half,), jnp.float32),) if normalised else ()
    sums = jax.lax.fori_loop(0, pl.cdiv(sizes.tokens, tokens), add, sums)
    for row in HALVES:
        masked_store(refs["d_memory"].at[row], sums[row], channels, own)
    if normalised:
        masked_store(refs["d_normaliser"].at[...], sums[2], channels)


read.defvjp(_forward, _backward)
