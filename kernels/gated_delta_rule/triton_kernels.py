"""Triton programs of the gated delta rule; imports Triton, so that only ``triton.py`` and tests import it, when used.

Arrays are those of ``pallas_update``, ``pallas_scan`` and ``pallas_read``, row by row in memory: F frames of all
examples, each of ``FRAMES`` per example; S tokens; ``HEADS`` heads; two halves of P channels (``tiles``); E channels of
a value. ``SIDE`` and ``COLUMNS`` are tiles' sides, ``BLOCK`` is tokens of a step. Where there is no rotation or
normaliser, its pointers are any array's and are not used. Products are three of TF32 each, with float32's precision.
"""

from __future__ import annotations

from typing import no_type_check  # or what checks annotations in tests stands between Triton and the source

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _load_half(pointer, half, tokens, valid, stride, P: tl.constexpr, SIDE: tl.constexpr, ROTATED: tl.constexpr):
    """One half of the channels of some tokens; ``pointer`` is at a frame's head, ``stride`` from token to token."""
    pairs = tl.arange(0, SIDE)
    if ROTATED:
        channels = 2 * pairs + half
    else:
        channels = pairs + half * P
    mask = valid[:, None] & (pairs < P)[None, :]
    return tl.load(pointer + tokens[:, None] * stride + channels[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _rotated(first, second, cos, sin, frame, tokens, valid, S: tl.constexpr, P: tl.constexpr, SIDE: tl.constexpr):
    """Both halves turned by their tokens' angles; ``frame`` counts those of one example."""
    pairs = tl.arange(0, SIDE)
    at = (frame * S + tokens)[:, None] * P + pairs[None, :]
    mask = valid[:, None] & (pairs < P)[None, :]
    c = tl.load(cos + at, mask=mask, other=0.0)
    s = tl.load(sin + at, mask=mask, other=0.0)
    return first * c - second * s, first * s + second * c


@triton.jit
@no_type_check
def _store_transition(pointer, row, part, gram, decay, key_scale, P: tl.constexpr, SIDE: tl.constexpr):
    """``decay (I - key_scale² gram)``, one of four tiles; ``pointer`` is at a frame's head's matrix (2, P, 2, P)."""
    pairs = tl.arange(0, SIDE)
    identity = ((pairs[:, None] == pairs[None, :]) & (row == part)).to(tl.float32)
    at = ((row * P + pairs)[:, None] * 2 + part) * P + pairs[None, :]
    mask = (pairs < P)[:, None] & (pairs < P)[None, :]
    tl.store(pointer + at, decay * (identity - key_scale * key_scale * gram), mask=mask)


@triton.jit
@no_type_check
def update(
    key, value, beta, decay, cos, sin,
    transition, addition, plain_transition, plain_addition,
    FRAMES: tl.constexpr, S: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, E: tl.constexpr,
    SIDE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    KEY_SCALE: tl.constexpr, ROTATED: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    """The update of a frame's head, half of its matrices' columns, in one pass over the frame's tokens.

    Grid (F, HEADS, 2).
    """
    frame = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    part = tl.program_id(2)
    pairs = tl.arange(0, SIDE)
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    own_key = key + frame * (S * HEADS * 2 * P) + head * (2 * P)
    own_value = value + frame * (S * HEADS * E) + head * E
    gram0 = tl.zeros((SIDE, SIDE), tl.float32)
    gram1 = tl.zeros((SIDE, SIDE), tl.float32)
    added0 = tl.zeros((SIDE, COLUMNS), tl.float32)
    added1 = tl.zeros((SIDE, COLUMNS), tl.float32)
    plain0 = tl.zeros((SIDE, SIDE), tl.float32)
    plain1 = tl.zeros((SIDE, SIDE), tl.float32)
    total = tl.zeros((SIDE,), tl.float32)
    for start in range(0, S, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        valid = tokens < S
        first = _load_half(own_key, 0, tokens, valid, HEADS * 2 * P, P, SIDE, ROTATED)
        second = _load_half(own_key, 1, tokens, valid, HEADS * 2 * P, P, SIDE, ROTATED)
        strength = tl.load(beta + (frame * S + tokens) * HEADS + head, mask=valid, other=0.0).to(tl.float32)[:, None]
        mask = valid[:, None] & (columns < E)[None, :]
        values = tl.load(own_value + tokens[:, None] * (HEADS * E) + columns[None, :], mask=mask, other=0.0)
        values = values.to(tl.float32)
        if NORMALISED:
            own = tl.where(part == 0, first, second)
            plain0 = tl.dot(tl.trans(first * strength), own, plain0, input_precision="tf32x3")
            plain1 = tl.dot(tl.trans(second * strength), own, plain1, input_precision="tf32x3")
            total += tl.sum(own * strength, 0)
        if ROTATED:
            first, second = _rotated(first, second, cos, sin, frame % FRAMES, tokens, valid, S, P, SIDE)
        own = tl.where(part == 0, first, second)
        first = tl.trans(first * strength)
        second = tl.trans(second * strength)
        gram0 = tl.dot(first, own, gram0, input_precision="tf32x3")
        gram1 = tl.dot(second, own, gram1, input_precision="tf32x3")
        added0 = tl.dot(first, values, added0, input_precision="tf32x3")
        added1 = tl.dot(second, values, added1, input_precision="tf32x3")
    at = frame * HEADS + head
    kept = tl.load(decay + at).to(tl.float32)
    matrix = transition + at * (4 * P * P)
    _store_transition(matrix, 0, part, gram0, kept, KEY_SCALE, P, SIDE)
    _store_transition(matrix, 1, part, gram1, kept, KEY_SCALE, P, SIDE)
    out = addition + at * (2 * P * E) + pairs[:, None] * E + columns[None, :]
    mask = (pairs < P)[:, None] & (columns < E)[None, :]
    tl.store(out, KEY_SCALE * added0, mask=mask)
    tl.store(out + P * E, KEY_SCALE * added1, mask=mask)
    if NORMALISED:
        matrix = plain_transition + at * (4 * P * P)
        _store_transition(matrix, 0, part, plain0, kept, KEY_SCALE, P, SIDE)
        _store_transition(matrix, 1, part, plain1, kept, KEY_SCALE, P, SIDE)
        tl.store(plain_addition + at * (2 * P) + part * P + pairs, KEY_SCALE * total, mask=pairs < P)


@triton.jit
@no_type_check
def _applied(pointer, row, first, second, P: tl.constexpr, SIDE: tl.constexpr):
    """One half of the rows of a transition times a memory."""
    pairs = tl.arange(0, SIDE)
    at = pointer + (row * P + pairs)[:, None] * (2 * P) + pairs[None, :]
    mask = (pairs < P)[:, None] & (pairs < P)[None, :]
    out = tl.dot(tl.load(at, mask=mask, other=0.0), first, input_precision="tf32x3")
    return tl.dot(tl.load(at + P, mask=mask, other=0.0), second, out, input_precision="tf32x3")


@triton.jit
@no_type_check
def scan(
    transition, addition, starts_chunk, memory,
    states, last,
    B: tl.constexpr, FRAMES: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr,
    SIDE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of the memory through all frames, in one direction of time.

    Grid (2, B HEADS, blocks of columns). ``states`` is the memory after every frame, and before it going back.
    """
    direction = tl.program_id(0)
    example = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    forward = direction == 0
    pairs = tl.arange(0, SIDE)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (pairs < P)[:, None] & (columns < WIDTH)[None, :]
    tile = pairs[:, None] * WIDTH + columns[None, :]
    size = 2 * P * WIDTH
    at = ((direction * B + example) * HEADS + head) * size
    first = tl.load(memory + at + tile, mask=mask, other=0.0)
    second = tl.load(memory + at + P * WIDTH + tile, mask=mask, other=0.0)
    for index in range(FRAMES):
        frame = tl.where(forward, index, FRAMES - 1 - index)
        place = (example * FRAMES + frame) * HEADS + head
        # what comes before a chunk's first frame knows nothing of the chunk
        kept = forward | (tl.load(starts_chunk + frame) == 0)
        matrix = transition + place * (4 * P * P)
        added = addition + place * size + tile
        after0 = _applied(matrix, 0, first, second, P, SIDE) + tl.load(added, mask=mask, other=0.0)
        after1 = _applied(matrix, 1, first, second, P, SIDE) + tl.load(added + P * WIDTH, mask=mask, other=0.0)
        after0 = tl.where(kept, after0, 0.0)
        after1 = tl.where(kept, after1, 0.0)
        out = states + (direction * B * FRAMES * HEADS + place) * size + tile
        tl.store(out, tl.where(forward, after0, first), mask=mask)
        tl.store(out + P * WIDTH, tl.where(forward, after1, second), mask=mask)
        first = after0
        second = after1
    tl.store(last + at + tile, first, mask=mask)
    tl.store(last + at + P * WIDTH + tile, second, mask=mask)


@triton.jit
@no_type_check
def read(
    query, memory, normaliser, cos, sin,
    out,
    FRAMES: tl.constexpr, S: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, E: tl.constexpr,
    SIDE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    EPSILON: tl.constexpr, ROTATED: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    """What a block of a frame's queries reads of the frame's memory, half of the values' channels after the other.

    Grid (F, HEADS, blocks of tokens).
    """
    frame = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    tokens = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    valid = tokens < S
    pairs = tl.arange(0, SIDE)
    place = frame * HEADS + head
    own = query + frame * (S * HEADS * 2 * P) + head * (2 * P)
    first = _load_half(own, 0, tokens, valid, HEADS * 2 * P, P, SIDE, ROTATED)
    second = _load_half(own, 1, tokens, valid, HEADS * 2 * P, P, SIDE, ROTATED)
    factor = tl.full((BLOCK,), 1.0, tl.float32)
    if NORMALISED:
        sums = normaliser + place * (2 * P) + pairs
        sum0 = tl.load(sums, mask=pairs < P, other=0.0)[None, :]
        sum1 = tl.load(sums + P, mask=pairs < P, other=0.0)[None, :]
        factor = 1.0 / (tl.sum(first * sum0, 1) + tl.sum(second * sum1, 1) + EPSILON)
    if ROTATED:
        first, second = _rotated(first, second, cos, sin, frame % FRAMES, tokens, valid, S, P, SIDE)
    for part in tl.static_range(2):
        columns = part * COLUMNS + tl.arange(0, COLUMNS)
        at = memory + place * (2 * P * E) + pairs[:, None] * E + columns[None, :]
        mask = (pairs < P)[:, None] & (columns < E)[None, :]
        found = tl.dot(first, tl.load(at, mask=mask, other=0.0), input_precision="tf32x3")
        found = tl.dot(second, tl.load(at + P * E, mask=mask, other=0.0), found, input_precision="tf32x3")
        to = out + frame * (S * HEADS * E) + head * E + tokens[:, None] * (HEADS * E) + columns[None, :]
        tl.store(to, (found * factor[:, None]).to(out.dtype.element_ty), mask=valid[:, None] & (columns < E)[None, :])
