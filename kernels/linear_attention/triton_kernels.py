"""The two forward passes of ReLU linear attention as Triton functions, for whatever can call these.

Programs are numbered (head, run of tokens, example). Arrays over tokens are (B, N, h, size·PARTS) and contiguous; where
adjacent channels are rotated, PARTS is 2 and even and odd channels are read apart. ``kernels.linear_attention.triton``
calls them; this file imports Triton and is imported only there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def summary_kernel(
    key_ptr,
    value_ptr,
    cos_ptr,
    sin_ptr,
    matrix_ptr,
    vector_ptr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BATCH: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    HALF: tl.constexpr,
):
    """``Σ (R k) vᵀ`` and ``Σ k`` over the program's tokens, float32: (runs, B, h, PARTS, PADDED[, PADDED_VALUE])."""
    head, program, example = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key_ptr += example.to(tl.int64) * TOKENS * HEADS * SIZE * PARTS
    value_ptr += example.to(tl.int64) * TOKENS * HEADS * VALUE_SIZE
    matrix = tl.zeros((PADDED, PADDED_VALUE), tl.float32)
    vector = tl.zeros((PADDED,), tl.float32)
    second_matrix = tl.zeros((PADDED, PADDED_VALUE), tl.float32)
    second_vector = tl.zeros((PADDED,), tl.float32)
    for turn in range(RUN):
        rows = (program * RUN + turn) * BLOCK + tl.arange(0, BLOCK)
        key = _relu(_load(key_ptr, rows, head, TOKENS, HEADS, SIZE, PARTS, 0, PADDED))
        value = _load(value_ptr, rows, head, TOKENS, HEADS, VALUE_SIZE, 1, 0, PADDED_VALUE)
        vector += tl.sum(key, 0)
        if PARTS == 2:
            odd = _relu(_load(key_ptr, rows, head, TOKENS, HEADS, SIZE, PARTS, 1, PADDED))
            cos = _load(cos_ptr, rows, 0, TOKENS, 1, SIZE, 1, 0, PADDED)
            sin = _load(sin_ptr, rows, 0, TOKENS, 1, SIZE, 1, 0, PADDED)
            matrix += _product(tl.trans(key * cos - odd * sin), value, False)
            second_matrix += _product(tl.trans(key * sin + odd * cos), value, False)
            second_vector += tl.sum(odd, 0)
        else:
            matrix += _product(tl.trans(key), value, HALF)
    at = ((program * BATCH + example) * HEADS + head).to(tl.int64) * PARTS
    channels, values = tl.arange(0, PADDED), tl.arange(0, PADDED_VALUE)
    cells = channels[:, None] * PADDED_VALUE + values[None, :]
    tl.store(matrix_ptr + at * PADDED * PADDED_VALUE + cells, matrix)
    tl.store(vector_ptr + at * PADDED + channels, vector)
    if PARTS == 2:
        tl.store(matrix_ptr + (at + 1) * PADDED * PADDED_VALUE + cells, second_matrix)
        tl.store(vector_ptr + (at + 1) * PADDED + channels, second_vector)


@triton.jit
def read_kernel(
    query_ptr,
    cos_ptr,
    sin_ptr,
    matrix_ptr,
    vector_ptr,
    epsilon_ptr,
    out_ptr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
):
    """``(R q)·Σ (R k) vᵀ / (q·Σ k + ε)`` of the program's tokens, from both sums over all keys."""
    head, program, example = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    query_ptr += example.to(tl.int64) * TOKENS * HEADS * SIZE * PARTS
    out_ptr += example.to(tl.int64) * TOKENS * HEADS * VALUE_SIZE
    at = (example * HEADS + head).to(tl.int64) * PARTS
    channels, values = tl.arange(0, PADDED), tl.arange(0, PADDED_VALUE)
    cells = channels[:, None] * PADDED_VALUE + values[None, :]
    matrix = tl.load(matrix_ptr + at * PADDED * PADDED_VALUE + cells)
    vector = tl.load(vector_ptr + at * PADDED + channels)
    if PARTS == 2:
        second_matrix = tl.load(matrix_ptr + (at + 1) * PADDED * PADDED_VALUE + cells)
        second_vector = tl.load(vector_ptr + (at + 1) * PADDED + channels)
    epsilon = tl.load(epsilon_ptr)
    for turn in range(RUN):
        rows = (program * RUN + turn) * BLOCK + tl.arange(0, BLOCK)
        query = _relu(_load(query_ptr, rows, head, TOKENS, HEADS, SIZE, PARTS, 0, PADDED))
        normaliser = tl.sum(query * vector[None, :], 1)
        if PARTS == 2:
            odd = _relu(_load(query_ptr, rows, head, TOKENS, HEADS, SIZE, PARTS, 1, PADDED))
            cos = _load(cos_ptr, rows, 0, TOKENS, 1, SIZE, 1, 0, PADDED)
            sin = _load(sin_ptr, rows, 0, TOKENS, 1, SIZE, 1, 0, PADDED)
            normaliser += tl.sum(odd * second_vector[None, :], 1)
            numerator = _product(query * cos - odd * sin, matrix, False)
            numerator += _product(query * sin + odd * cos, second_matrix, False)
        else:
            numerator = _product(query, matrix, False)
        out = numerator / tl.where(rows < TOKENS, normaliser + epsilon, 1.0)[:, None]
        cells_out = (rows[:, None] * HEADS + head) * VALUE_SIZE + values[None, :]
        mask = (rows < TOKENS)[:, None] & (values < VALUE_SIZE)[None, :]
        tl.store(out_ptr + cells_out, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load(
    ptr,
    rows,
    head,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One part of some tokens' channels; 0 beyond the last token or channel."""
    channels = tl.arange(0, PADDED)
    offsets = (rows[:, None] * HEADS + head) * (SIZE * PARTS) + channels[None, :] * PARTS + PART
    return tl.load(ptr + offsets, mask=(rows < TOKENS)[:, None] & (channels < SIZE)[None, :], other=0.0)


@triton.jit
def _relu(x):
    return tl.maximum(x.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _product(a, b, HALF: tl.constexpr):
    """In ``b``'s half precision where ``a`` fits it too, which is exact; else as three TF32 products."""
    if HALF:
        return tl.dot(a.to(b.dtype), b)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")
