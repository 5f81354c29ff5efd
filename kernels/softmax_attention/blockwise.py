"""Softmax attention whose memory does not grow with queries times keys, in both passes.

Keys are taken block by block with a running maximum and sum ("online softmax", arXiv 1805.02867; FlashAttention, arXiv
2205.14135): no array has an entry for every pair of a query and a key. The backward pass computes the weights of a
block again from each query's logarithm of its sum.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.refusal import Refusal
from kernels.softmax_attention.visibility import keys_by_length
from kernels.typing import Array, Bool, Float, Int

# Scores of one block are float32: at 20 heads these take 21 MB per example.
QUERY_BLOCK, KEY_BLOCK = 512, 512
# For GPUs, which start a dozen programs for every pair of blocks: a quarter as many pairs, of 84 MB. Their products
# read rows of 16 halves; a block of another length is copied before every product, to be filled up.
LARGE_BLOCK, WHOLE_ROWS = 1024, 16
_LOWEST = -1e30  # a maximum of no scores: finite, so that differences from it are numbers


class _Form(NamedTuple):
    """What is known when the program is compiled.

    Attributes:
        scale: factor of the scores.
        sizes: queries and keys of a block.
        rows: rows of the folded queries that stand for one query, see ``attend``.
        causal: whether a query sees no key behind its own.
    """

    scale: float
    sizes: tuple[int, int]
    rows: int
    causal: bool


def attend(
    query: Float[Array, "B M h d"],
    key: Float[Array, "B N k d"],
    value: Float[Array, "B N k e"],
    mask: Bool[Array, "#B P Q"] | None = None,
    bias: Float[Array, "#B #h #M #N"] | None = None,
    key_lengths: Int[Array, " B"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    soft_cap: float | None = None,
    *,
    query_block: int = QUERY_BLOCK,
    key_block: int = KEY_BLOCK,
    multiple: int = 1,
) -> Float[Array, "B M h e"]:
    """Same value as the reference; differentiable in reverse mode alone.

    Products and sums are float32 whatever the inputs are; the weights are rounded to ``value``'s dtype before they
    multiply it, as fused attention does. Blocks of keys that no query of a block sees are skipped.

    Args:
        query_block: queries taken at a time, at most.
        key_block: keys taken at a time, at most.
        multiple: what the number of tokens in a block is a multiple of, where there are as many.

    Raises:
        Refusal: for a bias, which has an entry for every pair, or a soft cap.
    """
    for name, given in (("bias", bias), ("soft_cap", soft_cap)):
        if given is not None:
            raise Refusal(f"implementation='blockwise': it takes no {name}; use 'xla'")
    mask = keys_by_length(key_lengths, key.shape[1]) if mask is None else mask
    batch, queries, heads, size = query.shape
    shared = key.shape[2]
    rows = heads // shared
    if rows > 1:  # heads that share keys become further rows of one head
        query = query.reshape(batch, queries, shared, rows, size).swapaxes(2, 3)
        query = query.reshape(batch, queries * rows, shared, size)
    sizes = tuple(_block_size(x.shape[1], most, multiple) for x, most in ((query, query_block), (key, key_block)))
    out = _attention(query, key, value, mask, _Form(size**-0.5 if scale is None else float(scale), sizes, rows, causal))
    if rows > 1:
        out = out.reshape(batch, queries, rows, shared, -1).swapaxes(2, 3)
    return out.reshape(batch, queries, heads, value.shape[-1])


attend_in_large_blocks = functools.partial(attend, query_block=LARGE_BLOCK, key_block=LARGE_BLOCK, multiple=WHOLE_ROWS)


def _block_size(tokens: int, most: int, multiple: int) -> int:
    """The largest block that leaves no rest, if it has half of ``most`` tokens or more; else blocks of about one size.

    Where nothing is filled up, no score has to be left out, which costs as much as the products do on a CPU.
    """
    for size in range(min(tokens, most), most // 2, -1):
        if tokens % size == 0 and size % multiple == 0:
            return size
    about = math.ceil(tokens / math.ceil(tokens / most))
    return about if tokens < multiple else math.ceil(about / multiple) * multiple


def _blocks(arrays: tuple[Array, ...], size: int) -> tuple[Array, ...]:
    """(B, N, h, ...) -> (blocks, B, h, size, ...), filled up with zeros.

    Heads come before tokens here, once, since products inside the loops would turn every block around.
    """

    def cut(x: Array) -> Array:
        count = math.ceil(x.shape[1] / size)
        padding = [(0, 0)] * x.ndim
        padding[1] = (0, count * size - x.shape[1])
        blocks = jnp.pad(x, padding).reshape(x.shape[0], count, size, *x.shape[2:])
        return jnp.moveaxis(blocks, (1, 3), (0, 2))

    return tuple(cut(x) for x in arrays)


def _joined(blocks: Array, tokens: int) -> Array:
    """The inverse of ``_blocks``, without what was filled up."""
    moved = jnp.moveaxis(blocks, (0, 2), (1, 3))
    return moved.reshape(moved.shape[0], -1, *moved.shape[3:])[:, :tokens]


def _seen(mask: Array | None, queries: Array, keys: Array, counts: tuple[int, int], form: _Form) -> Array | None:
    """Whether query rows see key tokens, both given by number: (B or 1, 1, rows or 1, keys); None for all."""
    if mask is None and not form.causal and counts[1] % form.sizes[1] == 0:
        return None
    seen = (keys < counts[1])[None, None, None, :]
    if form.causal:
        seen = seen & (keys <= queries[:, None] // form.rows)
    if mask is None:
        return seen
    frame_of_query = jnp.minimum(queries, counts[0] - 1) // (counts[0] // mask.shape[1])
    frame_of_key = jnp.minimum(keys, counts[1] - 1) // (counts[1] // mask.shape[2])
    return seen & mask[:, frame_of_query][:, :, frame_of_key][:, None]


def _scores(query: Array, key: Array, scale: float) -> Array:
    return _product("bhmd,bhnd->bhmn", query, key) * scale


def _product(equation: str, a: Array, b: Array) -> Array:
    work = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(equation, a, b, precision="highest", preferred_element_type=work)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(query, key, value, mask, form):
    return _forward(query, key, value, mask, form)[0]


def _forward(query, key, value, mask, form):
    """The result, and of every query the logarithm of the sum of its exponentials (B, M, h)."""
    scale, sizes = form.scale, form.sizes
    counts = (query.shape[1], key.shape[1])
    work = jnp.promote_types(query.dtype, jnp.float32)
    keys, values = _blocks((key, value), sizes[1])
    query, mask, query_starts, starts = _tied(query, mask, counts, sizes)

    def one_query_block(_, inputs):
        own, first = inputs
        numbers = first + jnp.arange(sizes[0])
        rows = own.shape[:3]
        begin = (
            jnp.full(rows, _LOWEST, work),
            jnp.zeros(rows, work),
            jnp.zeros((*rows, value.shape[-1]), work),
        )

        def one_key_block(carry, inputs):
            their_keys, their_values, start = inputs
            seen = _seen(mask, numbers, start + jnp.arange(sizes[1]), counts, form)

            def attend(carry):
                highest, total, summed = carry
                scores = _hidden(_scores(own, their_keys, scale), seen)
                higher = jnp.maximum(highest, scores.max(-1))
                weights = jnp.exp(scores - higher[..., None])
                shrink = jnp.exp(highest - higher)
                added = _product("bhmn,bhne->bhme", weights.astype(value.dtype), their_values)
                return higher, total * shrink + weights.sum(-1), summed * shrink[..., None] + added

            return _if_any(mask is None and not form.causal, seen, attend, carry), None

        (highest, total, summed), _ = jax.lax.scan(one_key_block, begin, (keys, values, starts))
        nothing = total == 0
        out = summed / jnp.where(nothing, 1, total)[..., None]
        log_sum = jnp.where(nothing, 0, highest + jnp.log(jnp.where(nothing, 1, total)))
        return None, (out.astype(query.dtype), log_sum)

    (queries,) = _blocks((query,), sizes[0])
    _, (out, log_sum) = jax.lax.scan(one_query_block, None, (queries, query_starts))
    return _joined(out, counts[0]), _joined(log_sum, counts[0])


def _tied(
    query: Array, mask: Array | None, counts: tuple[int, int], sizes: tuple[int, int]
) -> tuple[Array, Array | None, Array, Array]:
    """The queries, the mask, and where blocks of queries and of keys start.

    What does not depend on a network's layers, as masks do not, JAX computes before a scan over the layers, for the
    gradients of all of them: of these loops that would be what is seen of every pair at once. A barrier makes it
    depend on the queries.
    """
    starts = (jnp.arange(math.ceil(count / size)) * size for count, size in zip(counts, sizes))
    return jax.lax.optimization_barrier((query, mask, *starts))


def _hidden(scores: Array, seen: Array | None) -> Array:
    """Scores with minus infinity where nothing is seen, by a sum: another constant would be kept for every pair."""
    return scores if seen is None else scores + jnp.where(seen, 0.0, -jnp.inf).astype(scores.dtype)


def _if_any(all_seen: bool, seen: Array | None, attend: Any, carry: Any) -> Any:
    """``attend(carry)``, or ``carry`` where nothing of the block is seen."""
    return attend(carry) if all_seen else jax.lax.cond(seen.any(), attend, lambda carry: carry, carry)


def _forward_rule(query, key, value, mask, form):
    out, log_sum = _forward(query, key, value, mask, form)
    return out, (query, key, value, mask, out, log_sum)


def _backward_rule(form, kept, cotangent):
    query, key, value, mask, out, log_sum = kept
    scale, sizes = form.scale, form.sizes
    counts = (query.shape[1], key.shape[1])
    work = jnp.promote_types(query.dtype, jnp.float32)
    along = (out.astype(work) * cotangent.astype(work)).sum(-1)  # (B, M, h)
    query, mask, query_starts, starts = _tied(query, mask, counts, sizes)
    rows = (query, cotangent.astype(query.dtype), log_sum, along)
    queries = _blocks(rows, sizes[0])

    def one_key_block(query_gradient, inputs):
        own_keys, own_values, first = inputs
        numbers = first + jnp.arange(sizes[1])

        def one_query_block(carry, inputs):
            their, upstream, log_sum, along, start, gradient = inputs
            seen = _seen(mask, start + jnp.arange(sizes[0]), numbers, counts, form)

            def attend(carry):
                key_gradient, value_gradient, gradient = carry
                scores = _hidden(_scores(their, own_keys, scale), seen)
                weights = jnp.exp(scores - log_sum[..., None])
                added = _product("bhmn,bhme->bhne", weights.astype(value.dtype), upstream)
                towards = _product("bhme,bhne->bhmn", upstream, own_values)
                slope = (weights * (towards - along[..., None])).astype(query.dtype)
                key_gradient = key_gradient + scale * _product("bhmn,bhmd->bhnd", slope, their)
                gradient = gradient + scale * _product("bhmn,bhnd->bhmd", slope, own_keys)
                return key_gradient, value_gradient + added, gradient

            carry = _if_any(mask is None and not form.causal, seen, attend, (*carry, gradient))
            return carry[:2], carry[2]

        begin = jnp.zeros(own_keys.shape, work), jnp.zeros(own_values.shape, work)
        found, query_gradient = jax.lax.scan(one_query_block, begin, (*queries, query_starts, query_gradient))
        return query_gradient, found

    keys, values = _blocks((key, value), sizes[1])
    query_gradient = jnp.zeros(queries[0].shape, work)
    query_gradient, (key_gradient, value_gradient) = jax.lax.scan(one_key_block, query_gradient, (keys, values, starts))
    gradients = (
        _joined(query_gradient, counts[0]).astype(query.dtype),
        _joined(key_gradient, counts[1]).astype(key.dtype),
        _joined(value_gradient, counts[1]).astype(value.dtype),
    )
    return *gradients, None if mask is None else np.zeros(mask.shape, jax.dtypes.float0)


_attention.defvjp(_forward_rule, _backward_rule)
