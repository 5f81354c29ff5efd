"""The memory before and after every frame, in both directions of time, as a Pallas kernel for Triton, and its gradient.

Columns of the memory do not mix: a program carries some of them through all frames, in one direction of time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.gated_delta_rule import tiles
from kernels.gated_delta_rule.tiles import HALVES, Sizes, float32, masked_load, masked_store, product, within
from kernels.typing import Array, Float, Int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(
    sizes: Sizes,
    transition: Float[Array, "B T h 2 p 2 p"],
    addition: Float[Array, "B T h 2 p e"],
    starts_chunk: Int[Array, " T"],
    memory: Float[Array, "2 B h 2 p e"],
) -> tuple[Float[Array, "B T h 2 p e"], Float[Array, "2 B h 2 p e"]]:
    """What every frame's queries read: the memory after the frame, and what the later frames of its chunk left.

    The gradient's recurrence is a kernel too; from it, those of the transitions are products that XLA does.

    Args:
        sizes: of the kernels; ``e`` here need not be a value's size, the normaliser has one column.
        transition: of every frame.
        addition: of every frame.
        starts_chunk: 1 where a frame is the first of its chunk, else 0.
        memory: what enters the first frame, and what enters the last one going back.

    Returns:
        What is read, and the memory that leaves the last frame, and the first one going back.
    """
    states, last = _states(sizes, transition, addition, starts_chunk, memory)
    return states.sum(0), last


def _specs(sizes: Sizes, columns: int) -> dict[str, pl.BlockSpec]:
    """Blocks of a program for one direction, one head of one example, and some columns."""
    frames, heads, half = sizes.frames, sizes.heads, sizes.key_side

    def place(direction, head, part):
        return head // heads, 0, head % heads, 0, 0

    return {
        "transition": pl.BlockSpec((None, frames, None, 2, half, 2, half), lambda *ids: (*place(*ids), 0, 0)),
        "per_frame": pl.BlockSpec((None, frames, None, 2, half, columns), lambda *ids: (*place(*ids), ids[2])),
        "starts_chunk": pl.BlockSpec((frames,), lambda *ids: (0,)),
        "memory": pl.BlockSpec(
            (None, None, None, 2, half, columns), lambda d, g, part: (d, g // heads, g % heads, 0, 0, part)
        ),
        "both_ways": pl.BlockSpec(
            (None, None, frames, None, 2, half, columns), lambda d, g, part: (d, g // heads, 0, g % heads, 0, 0, part)
        ),
    }


def _states(sizes, transition, addition, starts_chunk, memory):
    """The memory after every frame, and before it going back, (2, B, T, h, 2, p, e); and those that leave."""
    width = addition.shape[-1]
    columns = tiles.side(width, tiles.MEMORY_COLUMNS)
    specs = _specs(sizes, columns)
    inputs = {
        "transition": (transition, specs["transition"]),
        "addition": (addition, specs["per_frame"]),
        "starts_chunk": (starts_chunk, specs["starts_chunk"]),
        "memory": (memory, specs["memory"]),
    }
    outputs = {
        "states": (float32(2, *addition.shape), specs["both_ways"]),
        "last": (float32(*memory.shape), specs["memory"]),
    }
    kernel = functools.partial(_scan, sizes=sizes, width=width, columns=columns)
    grid = 2, sizes.batch * sizes.heads, pl.cdiv(width, columns)
    found = tiles.launch(kernel, grid, inputs, outputs, interpret=sizes.interpret, num_warps=4)
    return found["states"], found["last"]


def _scan(refs: Mapping[str, Any], sizes: Sizes, width: int, columns: int) -> None:
    forward = pl.program_id(0) == 0
    rows, own = within(0, sizes.key_side, sizes.pairs), within(pl.program_id(2) * columns, columns, width)

    def step(index, memory):
        frame = jnp.where(forward, index, sizes.frames - 1 - index)
        # what comes before a chunk's first frame knows nothing of the chunk
        kept = forward | (refs["starts_chunk"][frame] == 0)
        after = []
        for row in HALVES:
            x = masked_load(refs["addition"].at[frame, row], rows, own)
            for column in HALVES:
                matrix = masked_load(refs["transition"].at[frame, row, :, column, :], rows, rows)
                x += product(matrix, memory[column], sizes)
            after.append(jnp.where(kept, x, 0))
        for row in HALVES:
            stored = jnp.where(forward, after[row], memory[row])
            masked_store(refs["states"].at[frame, row], stored, rows, own)
        return tuple(after)

    memory = tuple(masked_load(refs["memory"].at[row], rows, own) for row in HALVES)
    memory = jax.lax.fori_loop(0, sizes.frames, step, memory)
    for row in HALVES:
        masked_store(refs["last"].at[row], memory[row], rows, own)


# -- gradient ----------------------------------------------------------------------------------------------------------


def _forward(sizes, transition, addition, starts_chunk, memory):
    states, last = _states(sizes, transition, addition, starts_chunk, memory)
    return (states.sum(0), last), (transition, starts_chunk, memory, states)


def _backward(sizes, kept, cotangents):
    transition, starts_chunk, memory, states = kept
    d_read, d_last = cotangents
    width = d_read.shape[-1]
    columns = tiles.side(width, tiles.MEMORY_COLUMNS)
    specs = _specs(sizes, columns)
    inputs = {
        "transition": (transition, specs["transition"]),
        "d_read": (d_read, specs["per_frame"]),
        "starts_chunk": (starts_chunk, specs["starts_chunk"]),
        "d_last": (d_last, specs["memory"]),
    }
    outputs = {
        "d_addition": (float32(*states.shape), specs["both_ways"]),
        "d_memory": (float32(*memory.shape), specs["memory"]),
    }
    kernel = functools.partial(_scan_gradient, sizes=sizes, width=width, columns=columns)
    grid = 2, sizes.batch * sizes.heads, pl.cdiv(width, columns)
    found = tiles.launch(kernel, grid, inputs, outputs, interpret=sizes.interpret, num_warps=4)
    d_addition = found["d_addition"]
    before = jnp.concatenate([memory[0][:, None], states[0][:, :-1]], axis=1)
    d_transition = sum(
        jnp.einsum("bthire,bthjce->bthirjc", by, of, precision="highest")
        for by, of in ((d_addition[0], before), (d_addition[1], states[1]))
    )
    return d_transition, d_addition.sum(0), None, found["d_memory"]


def _scan_gradient(refs: Mapping[str, Any], sizes: Sizes, width: int, columns: int) -> None:
    """The recurrence of ``_scan`` the other way around; carries the gradient of the memory after a frame."""
    forward = pl.program_id(0) == 0
    rows, own = within(0, sizes.key_side, sizes.pairs), within(pl.program_id(2) * columns, columns, width)

    def step(index, d_memory):
        frame = jnp.where(forward, sizes.frames - 1 - index, index)
        kept = forward | (refs["starts_chunk"][frame] == 0)
        d_read = [masked_load(refs["d_read"].at[frame, row], rows, own) for row in HALVES]
        d_after = [jnp.where(kept, x + jnp.where(forward, y, 0), 0) for x, y in zip(d_memory, d_read)]
        d_before = []
        for column in HALVES:
            masked_store(refs["d_addition"].at[frame, column], d_after[column], rows, own)
            x = jnp.where(forward, 0, d_read[column])
            for row in HALVES:
                matrix = masked_load(refs["transition"].at[frame, row, :, column, :], rows, rows)
                x += tiles.rows_product(matrix, d_after[row], sizes)
            d_before.append(x)
        return tuple(d_before)

    d_memory = tuple(masked_load(refs["d_last"].at[row], rows, own) for row in HALVES)
    d_memory = jax.lax.fori_loop(0, sizes.frames, step, d_memory)
    for row in HALVES:
        masked_store(refs["d_memory"].at[row], d_memory[row], rows, own)


scan.defvjp(_forward, _backward)
