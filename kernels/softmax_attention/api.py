"""The one function networks call for softmax attention, whichever implementation runs it.

Source: arXiv 1706.03762 §3.2; heads that share keys, arXiv 2305.13245; the soft cap, Gemma 2 (arXiv 2408.00118) §2.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from kernels.over_mesh import Axes
from kernels.selection import choose
from kernels.softmax_attention import blockwise, cudnn, reference, xla
from kernels.softmax_attention.visibility import causal_blocks
from kernels.typing import Array, Bool, Float, Int

_BLOCKS = {"blockwise": blockwise.attend, "large_blocks": blockwise.attend_in_large_blocks}
IMPLEMENTATIONS = {"xla": xla.attend, **_BLOCKS, "cudnn": cudnn.attend}
# An operation of its own in the table of measurements: what is faster with few keys need not be with many. What XLA
# runs there is the form in blocks.
BOUNDED_IMPLEMENTATIONS = {
    "xla": blockwise.attend,
    "large_blocks": blockwise.attend_in_large_blocks,
    "cudnn": functools.partial(cudnn.attend, bounded_memory=True),
}
OPERATIONS = {"softmax_attention": IMPLEMENTATIONS, "bounded_softmax_attention": BOUNDED_IMPLEMENTATIONS}


def softmax_attention(
    query: Float[Array, "B M h d"],
    key: Float[Array, "B N k d"],
    value: Float[Array, "B N k e"],
    *,
    mask: Bool[Array | np.ndarray, "#B P Q"] | None = None,
    key_lengths: Int[Array | np.ndarray, " B"] | None = None,
    bias: Float[Array, "#B #h #M #N"] | None = None,
    causal: bool = False,
    block_starts: tuple[int, ...] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    bounded_memory: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B M h e"]:
    """``softmax(cap(scale · q kᵀ) + bias) v`` over the keys that a query sees; 0 for a query that sees none.

    Args:
        query: M queries of h heads.
        key: N keys of k heads; every h/k heads of queries, one after another, share one of keys.
        value: their values.
        mask: whether the p-th M/P queries see the q-th N/Q keys: (B, M, N) for every pair, (B, 1, N) for keys of
            padding, (B, T, T) for frames of tokens. None for all.
        key_lengths: how many keys every example has, from the first on, in place of a mask.
        bias: added to the scores.
        causal: whether a query sees no key behind its own; there must be as many keys as queries.
        block_starts: in place of a mask, the first token of every causal block, ascending from 0: a query sees the keys
            of its own block and of earlier ones. There must be as many keys as queries.
        scale: factor of the scores; None for 1/√d.
        soft_cap: c in ``cap(x) = c · tanh(x / c)``; None for no cap.
        bounded_memory: whether no array may have an entry for every pair of a query and a key of every head. None then
            picks of such forms alone, ``blockwise`` where the table has nothing.
        implementation: None picks by the table of ``kernels.selection`` (so far ``cudnn`` on NVIDIA GPUs, elsewhere
            ``xla``, or ``blockwise`` with ``bounded_memory``); a name runs just that. ``xla`` has all scores at once,
            and forward-mode derivatives; ``blockwise`` never has all of them, and takes no bias and no soft cap;
            ``large_blocks`` is the same for GPUs; ``cudnn`` is for NVIDIA GPUs and bfloat16 or float16, takes no soft
            cap, values of the keys' size alone, and heads whose size is a multiple of 8 up to 128 (256 from H100 on):
            with None, blocks or ``xla`` run what it does not take. ``reference`` is the definition, in float32.

    Returns:
        In ``query``'s dtype. Scores, softmax and sums are float32; weights are rounded to ``value``'s dtype before
        they multiply it.

    Raises:
        ValueError: shapes or options that do not fit each other, an unknown ``implementation``, or one that cannot run
            what is asked, or not on this device.
    """
    _check_shapes(query.shape, key.shape, value.shape)
    _check_visibility(query.shape, key.shape, mask, key_lengths, bias, causal)
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap}: it must be more than 0, or None for no cap")
    if bounded_memory and implementation in ("xla", "reference"):
        raise ValueError(
            f"implementation={implementation!r} has all scores at once, which bounded_memory=True forbids: use "
            "'blockwise' or 'cudnn', or None to pick one"
        )
    in_cudnn = {}
    if block_starts is not None:
        block_starts = tuple(int(start) for start in block_starts)  # also of an array
        _check_blocks(block_starts, query.shape[1], key.shape[1], mask, key_lengths, causal)
        mask = causal_blocks(block_starts, query.shape[1]) if len(block_starts) > 1 else None
        in_cudnn = {"block_starts": block_starts}
    mask, key_lengths = (None if x is None else jnp.asarray(x) for x in (mask, key_lengths))
    axes = _axes(mask, bias, key_lengths)
    if bounded_memory:
        own = functools.partial(cudnn.attend, bounded_memory=True, **in_cudnn)
        named = {**BOUNDED_IMPLEMENTATIONS, "blockwise": blockwise.attend, "cudnn": own}
        run = choose("bounded_softmax_attention", named, implementation, axes, fallbacks=("large_blocks",))
    else:
        own = functools.partial(cudnn.attend, **in_cudnn)
        named = {**IMPLEMENTATIONS, "reference": reference.attend, "cudnn": own}
        run = choose("softmax_attention", named, implementation, axes)
    return run(query, key, value, mask, bias, key_lengths, causal, scale, soft_cap)


def _axes(mask: Array | None, bias: Array | None, key_lengths: Array | None) -> Axes:
    given = [names if x is not None else None for names, x in (("B P Q", mask), ("B h M N", bias), ("B", key_lengths))]
    return Axes(("B M h d", "B N k d", "B N k e", *given, None, None, None), "B M h e")


def _check_shapes(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> None:
    fits = len(query) == len(key) == len(value) == 4 and key[:3] == value[:3]
    fits = fits and query[0] == key[0] and query[3] == key[3] and min(*query, *key, *value) > 0
    if not fits or query[2] % key[2]:
        raise ValueError(
            f"query {query}, key {key} and value {value}: they must be (B, M, h, d), (B, N, k, d) and (B, N, k, e), no "
            "size 0, and h a multiple of k"
        )


def _check_blocks(
    starts: tuple[int, ...],
    queries: int,
    keys: int,
    mask: Array | np.ndarray | None,
    key_lengths: Array | np.ndarray | None,
    causal: bool,
) -> None:
    if mask is not None or key_lengths is not None or causal:
        raise ValueError("block_starts and mask, key_lengths or causal: give one of them; a mask can hold all")
    if queries != keys or not starts or starts[0] != 0 or (np.diff([*starts, queries]) <= 0).any():
        raise ValueError(
            f"block_starts {starts} for {queries} queries and {keys} keys: it must ascend from 0, below their number, "
            "which is the same for both"
        )


def _check_visibility(
    query: tuple[int, ...],
    key: tuple[int, ...],
    mask: Array | np.ndarray | None,
    key_lengths: Array | np.ndarray | None,
    bias: Array | None,
    causal: bool,
) -> None:
    batch, queries, heads, _ = query
    keys = key[1]
    if mask is not None and key_lengths is not None:
        raise ValueError("mask and key_lengths: give one of them; a mask can hold the lengths")
    if mask is not None:
        shape, kind = tuple(mask.shape), mask.dtype
        fits = len(shape) == 3 and shape[0] in (1, batch) and jnp.issubdtype(kind, jnp.bool_) and min(shape) > 0
        if not fits or queries % shape[1] or keys % shape[2]:
            raise ValueError(
                f"mask {shape} of {kind} for {queries} queries and {keys} keys of {batch} examples: it must be boolean "
                f"with 1 or {batch} examples, a row for every whole number of queries, a column for every one of keys"
            )
    if key_lengths is not None and jnp.shape(key_lengths) != (batch,):
        raise ValueError(f"key_lengths {jnp.shape(key_lengths)}: it must have one number per example, ({batch},)")
    wanted = batch, heads, queries, keys
    if bias is not None and (bias.ndim != 4 or any(size not in (1, own) for size, own in zip(bias.shape, wanted))):
        raise ValueError(f"bias {bias.shape}: it must be {wanted}, or 1 in place of a size")
    if causal and queries != keys:
        raise ValueError(f"causal=True for {queries} queries and {keys} keys: there must be as many; give a mask")
