"""Fused form for NVIDIA GPUs, in Pallas through its Triton lowering.

Kernels, all of which read and write (tokens, heads, head size) arrays in place, without a transposition:

- the summary: ``Σ_m relu(k_m) v_mᵀ`` and ``Σ_m relu(k_m)`` in one pass over keys and values;
- the read: numerator, normaliser and their quotient in one pass over the queries;
- their gradients: one pass over queries and the output's gradient, one over keys and values; two passes over each for
  large heads, where the programs of one would ask for more shared memory and registers than there are.

A program works on one head of one example and on a run of tokens, block after block. Sums over tokens that several
programs share are added up outside. Channels are padded to a power of two inside by masks. Where positions rotate
adjacent channels, even and odd channels are read as two parts of half the size, so that nothing is interleaved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.linear_attention import xla
from kernels.linear_attention.blocks import Blocks, check_inputs, is_half
from kernels.typing import Array, Float

Rotation = tuple[Array, Array]  # cosine and sine of every token and channel pair
Sums = dict[str, list[Array]]  # over tokens: a "matrix" and a "vector" for each part, as far as they are wanted


def relu_linear_attention(
    query: Float[Array, "B N h d"],
    key: Float[Array, "B M h d"],
    value: Float[Array, "B M h e"],
    epsilon: float = 1e-15,
    *,
    interpret: bool = False,
) -> Float[Array, "B N h e"]:
    """Same value as the reference; differentiable in reverse mode alone; the result keeps ``value``'s dtype.

    Args:
        query: queries before the ReLU: float32, bfloat16 or float16, like the others.
        key: keys before the ReLU.
        value: values.
        epsilon: added to the normaliser.
        interpret: runs on a CPU what is else compiled for a GPU, for tests.

    Raises:
        ValueError: for another dtype, a head size over 128, or no tokens at all.
    """
    check_inputs("pallas", query, key, value)
    return _attention(query, key, value, None, epsilon, interpret)


def rope_linear_attention(
    query: Float[Array, "B N h d"],
    key: Float[Array, "B N h d"],
    value: Float[Array, "B N h e"],
    cos: Float[Array, "N p"],
    sin: Float[Array, "N p"],
    epsilon: float = 1e-15,
    *,
    interpret: bool = False,
) -> Float[Array, "B N h e"]:
    """Same value as the reference; differentiable in reverse mode alone; ``relu_linear_attention`` has the rest.

    The gradients of ``cos`` and ``sin``, which nothing trains, are those of the XLA form.
    """
    check_inputs("pallas", query, key, value)
    return _attention(query, key, value, (cos, sin), epsilon, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    query: Array, key: Array, value: Array, rotation: Rotation | None, epsilon: float, interpret: bool
) -> Array:
    return _forward(query, key, value, rotation, epsilon, interpret)[0]


def _forward(
    query: Array, key: Array, value: Array, rotation: Rotation | None, epsilon: float, interpret: bool
) -> tuple[Array, Any]:
    parts = 1 if rotation is None else 2
    keys, queries = Blocks.of(key, value, parts), Blocks.of(query, value, parts)
    run = functools.partial(_run, rotation=rotation, interpret=interpret)
    _, summary = run(_summary_kernel, keys, [_in_parts(key, parts), value], [], [], ("matrix", "vector"))
    kernel = functools.partial(_read_kernel, epsilon=epsilon)
    out = jax.ShapeDtypeStruct((*query.shape[:3], value.shape[3]), value.dtype)
    (out,), _ = run(kernel, queries, [_in_parts(query, parts)], summary, [out])
    return out, (query, key, value, rotation, summary)


def _backward(epsilon: float, interpret: bool, residuals: Any, cotangent: Array) -> tuple[Any, ...]:
    query, key, value, rotation, summary = residuals
    parts = 1 if rotation is None else 2
    keys, queries = Blocks.of(key, value, parts), Blocks.of(query, value, parts)
    key_parts, query_parts = _in_parts(key, parts), _in_parts(query, parts)
    run = functools.partial(_run, rotation=rotation, interpret=interpret)
    dqueries, dmatrices, dvectors = _query_gradients(run, queries, query_parts, cotangent, summary, epsilon)
    dkeys, dvalue = _key_gradients(run, keys, key_parts, value, [dmatrices, dvectors])
    drotation = None
    if rotation is not None:
        # The compiler drops this wherever nobody asks for the gradient of an angle.
        _, pull = jax.vjp(lambda cos, sin: xla.rope_linear_attention(query, key, value, cos, sin, epsilon), *rotation)
        drotation = pull(cotangent)
    return dqueries.reshape(query.shape), dkeys.reshape(key.shape), dvalue, drotation


_attention.defvjp(_forward, _backward)


def _query_gradients(
    run: Callable, blocks: Blocks, query: Array, cotangent: Array, summary: Sequence[Array], epsilon: float
) -> tuple[Array, Array, Array]:
    """Gradients of the queries and of both sums over keys; in two passes where a program cannot hold both matrices."""
    kernel = functools.partial(_query_gradient_kernel, epsilon=epsilon)
    if not blocks.large:
        (dquery,), (dmatrices, dvectors) = run(
            kernel, blocks, [query, cotangent], summary, [query], ("matrix", "vector")
        )
        return dquery, dmatrices, dvectors
    (dquery,), (dvectors,) = run(kernel, blocks, [query, cotangent], summary, [query], ("vector",))
    kernel = functools.partial(_matrix_gradient_kernel, epsilon=epsilon)
    _, (dmatrices,) = run(kernel, blocks, [query, cotangent], summary[1:], [], ("matrix",))
    return dquery, dmatrices, dvectors


def _key_gradients(
    run: Callable, blocks: Blocks, key: Array, value: Array, dsummary: Sequence[Array]
) -> tuple[Array, Array]:
    """Gradients of keys and values; in two passes where one program cannot hold the matrix both ways round."""
    if not blocks.large:
        (dkey, dvalue), _ = run(_key_gradient_kernel, blocks, [key, value], dsummary, [key, value])
        return dkey, dvalue
    (dkey,), _ = run(_key_gradient_kernel, blocks, [key, value], dsummary, [key])
    (dvalue,), _ = run(_value_gradient_kernel, blocks, [key], dsummary[:1], [value])
    return dkey, dvalue


# -- kernels: what a program does with one block of tokens -------------------------------------------------------------


def _summary_kernel(block: _Block, refs: _References, sums: Sums) -> Sums:
    """Adds ``(R k) vᵀ`` and ``k`` to the sums."""
    key = [jnp.maximum(x, 0) for x in block.parts(refs.inputs[0])]
    value = block.values(refs.inputs[1])
    return block.add(sums, matrix=(block.rotated(key), value), vector=key)


def _read_kernel(block: _Block, refs: _References, sums: Sums, *, epsilon: float) -> Sums:
    """``(R q)·Σ (R k) vᵀ / (q·Σ k + ε)``."""
    query = _relu(block.parts(refs.inputs[0]))
    numerator = block.through(block.rotated(query), refs.matrices)
    block.store_values(refs.outputs[0], numerator / block.normaliser(query, refs.vectors, epsilon))
    return sums


def _query_gradient_kernel(block: _Block, refs: _References, sums: Sums, *, epsilon: float) -> Sums:
    """Gradients of the queries; adds those of the sums over keys."""
    before = block.parts(refs.inputs[0])
    query = _relu(before)
    rotated, normaliser = block.rotated(query), block.normaliser(query, refs.vectors, epsilon)
    dnumerator = block.values(refs.inputs[1]).astype(jnp.float32) / normaliser
    drotated = block.back_through(dnumerator, refs.matrices)
    dnormaliser = -sum((q * d).sum(1, keepdims=True) for q, d in zip(rotated, drotated)) / normaliser
    dquery = [d + dnormaliser * v for d, v in zip(block.turned_back(drotated), refs.vectors)]
    block.store_parts(refs.outputs[0], [_slope(x) * d for x, d in zip(before, dquery)])
    return block.add(sums, matrix=(rotated, dnumerator), vector=[dnormaliser * q for q in query])


def _matrix_gradient_kernel(block: _Block, refs: _References, sums: Sums, *, epsilon: float) -> Sums:
    """Adds the gradients of the first sum over keys alone."""
    query = _relu(block.parts(refs.inputs[0]))
    normaliser = block.normaliser(query, refs.vectors, epsilon)
    return block.add(sums, matrix=(block.rotated(query), block.values(refs.inputs[1]).astype(jnp.float32) / normaliser))


def _key_gradient_kernel(block: _Block, refs: _References, sums: Sums) -> Sums:
    """Gradients of the keys from those of both sums over them; those of the values too where there is room for them."""
    before = block.parts(refs.inputs[0])
    drotated = block.back_through(block.values(refs.inputs[1]), refs.matrices)
    dkey = [d + v for d, v in zip(block.turned_back(drotated), refs.vectors)]
    block.store_parts(refs.outputs[0], [_slope(x) * d for x, d in zip(before, dkey)])
    if len(refs.outputs) > 1:
        block.store_values(refs.outputs[1], block.through(block.rotated(_relu(before)), refs.matrices))
    return sums


def _value_gradient_kernel(block: _Block, refs: _References, sums: Sums) -> Sums:
    """Gradients of the values from that of the first sum."""
    key = block.rotated(_relu(block.parts(refs.inputs[0])))
    block.store_values(refs.outputs[0], block.through(key, refs.matrices))
    return sums


def _relu(parts: Sequence[Array]) -> list[Array]:
    return [jnp.maximum(x, 0).astype(jnp.float32) for x in parts]


def _slope(x: Array) -> Array:
    """Of the ReLU; a half at 0, as JAX has it for ``maximum``."""
    return jnp.where(x > 0, 1.0, jnp.where(x < 0, 0.0, 0.5))


# -- inside a kernel ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _References:
    """What a program reads and writes: arrays over its tokens, and both sums over keys, or the gradients of these."""

    inputs: Sequence[Any]
    outputs: Sequence[Any]
    matrices: list[Array]
    vectors: list[Array]


class _Block:
    """The tokens that a program works on at once; what lies beyond the last token or channel reads as 0."""

    def __init__(self, blocks: Blocks, first: Array, turn: Array, tables: Sequence[Any], precision: Any):
        start = turn * blocks.block
        self.blocks, self.rows, self.precision = blocks, pl.ds(start, blocks.block), precision
        self.inside = ((first + start + jnp.arange(blocks.block)) < blocks.tokens)[:, None]
        self.part_mask = self.inside & _columns(blocks.size, blocks.padded)
        self.value_mask = self.inside & _columns(blocks.value_size, blocks.padded_value)
        self.angles = [plgpu.load(ref.at[self.rows, :], mask=self.part_mask, other=0) for ref in tables]

    def parts(self, ref: Any) -> list[Array]:
        each = range(self.blocks.parts)
        return [plgpu.load(ref.at[self.rows, :, jnp.int32(part)], mask=self.part_mask, other=0) for part in each]

    def values(self, ref: Any) -> Array:
        return plgpu.load(ref.at[self.rows, :], mask=self.value_mask, other=0)

    def store_parts(self, ref: Any, parts: Sequence[Array]) -> None:
        for part, x in enumerate(parts):
            plgpu.store(ref.at[self.rows, :, jnp.int32(part)], x.astype(ref.dtype), mask=self.part_mask)

    def store_values(self, ref: Any, x: Array) -> None:
        plgpu.store(ref.at[self.rows, :], x.astype(ref.dtype), mask=self.value_mask)

    def normaliser(self, query: Sequence[Array], vectors: Sequence[Array], epsilon: float) -> Array:
        total = sum((q * v).sum(1, keepdims=True) for q, v in zip(query, vectors))
        return jnp.where(self.inside, total + epsilon, 1.0)

    def rotated(self, parts: Sequence[Array]) -> Sequence[Array]:
        if not self.angles:
            return parts
        (even, odd), (cos, sin) = parts, self.angles
        return [even * cos - odd * sin, even * sin + odd * cos]

    def turned_back(self, parts: Sequence[Array]) -> Sequence[Array]:
        if not self.angles:
            return parts
        (even, odd), (cos, sin) = parts, self.angles
        return [even * cos + odd * sin, odd * cos - even * sin]

    def through(self, parts: Sequence[Array], matrices: Sequence[Array]) -> Array:
        return sum(_product(x, m, (1, 0), self.precision) for x, m in zip(parts, matrices))

    def back_through(self, x: Array, matrices: Sequence[Array]) -> list[Array]:
        return [_product(x, m, (1, 1), self.precision) for m in matrices]

    def add(
        self, sums: Sums, matrix: tuple[Sequence[Array], Array] | None = None, vector: Sequence[Array] = ()
    ) -> Sums:
        """Adds products and sums over the block's tokens to those sums that the pass wants."""
        added = dict(sums)
        if "matrix" in sums:
            parts, x = matrix
            products = (_product(part, x, (0, 0), self.precision) for part in parts)
            added["matrix"] = [total + product for total, product in zip(sums["matrix"], products)]
        if "vector" in sums:
            added["vector"] = [total + x.astype(jnp.float32).sum(0) for total, x in zip(sums["vector"], vector)]
        return added


def _columns(size: int, padded: int) -> Array:
    return (jnp.arange(padded) < size)[None, :]


def _product(a: Array, b: Array, contracted: tuple[int, int], precision: Any) -> Array:
    if not (a.dtype == b.dtype and is_half(a.dtype)):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    else:
        precision = None  # exact as it is
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


# -- around a kernel ---------------------------------------------------------------------------------------------------


def _in_parts(x: Float[Array, "B N h d"], parts: int) -> Float[Array, "B N h p parts"]:
    return x.reshape(*x.shape[:3], x.shape[3] // parts, parts)


def _run(
    kernel: Callable,
    blocks: Blocks,
    inputs: Sequence[Array],
    summary: Sequence[Array],
    outputs: Sequence[Any],
    wanted: tuple[str, ...] = (),
    *,
    rotation: Rotation | None,
    interpret: bool,
) -> tuple[list[Array], list[Array]]:
    """Calls a kernel on every head, example and run of tokens.

    Args:
        kernel: one of the above.
        blocks: how the tokens are divided.
        inputs: arrays over tokens.
        summary: the sums over all keys, or their gradients, as far as the kernel needs them.
        outputs: arrays over tokens, of which shape and dtype count.
        wanted: the kinds of sums over its tokens that the kernel adds up, ``matrix`` before ``vector``.
        rotation: the angles' cosines and sines.
        interpret: see ``relu_linear_attention``.

    Returns:
        The arrays over tokens, and the sums over all tokens.
    """
    shapes = {"matrix": (blocks.parts, blocks.padded, blocks.padded_value), "vector": (blocks.parts, blocks.padded)}
    kept = [shapes[kind] for kind in wanted]
    tables = [] if rotation is None else list(rotation)
    leading = (blocks.programs, blocks.batch, blocks.heads)
    results = pl.pallas_call(
        _body(kernel, blocks, (len(inputs), len(summary), len(tables), len(outputs)), wanted, interpret),
        grid=(blocks.heads, blocks.programs, blocks.batch),
        in_specs=[
            *(_token_spec(blocks, x) for x in inputs),
            *(_spec(x.shape[2:], lambda h, s, b: (b, h)) for x in summary),
            *(pl.BlockSpec((blocks.run * blocks.block, blocks.padded), lambda h, s, b: (s, 0)) for _ in tables),
        ],
        out_specs=[
            *(_token_spec(blocks, x) for x in outputs),
            *(_spec(shape, lambda h, s, b: (s, b, h)) for shape in kept),
        ],
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs),
            *(jax.ShapeDtypeStruct((*leading, *shape), jnp.float32) for shape in kept),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name=getattr(kernel, "func", kernel).__name__.strip("_"),
    )(*inputs, *summary, *tables)
    return list(results[: len(outputs)]), [x.sum(0) for x in results[len(outputs) :]]


def _body(
    kernel: Callable, blocks: Blocks, counts: tuple[int, ...], wanted: Sequence[str], interpret: bool
) -> Callable:
    """A program: block after block of its tokens through ``kernel``, and the sums over them written at the end."""
    # Three TF32 products make up a float32 one to its last bits; the interpreter has float32 itself.
    precision = jax.lax.Precision.HIGHEST if interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    shapes = {"matrix": (blocks.padded, blocks.padded_value), "vector": (blocks.padded,)}
    parts = range(blocks.parts)

    def run(*refs: Any) -> None:
        groups, rest = [], list(refs)
        for count in counts:
            groups.append(rest[:count])
            rest = rest[count:]
        inputs, summary, tables, outputs = groups
        loaded = {len(ref.shape): [ref[jnp.int32(part)] for part in parts] for ref in summary}
        vectors = [vector[None, :] for vector in loaded.get(2, ())]
        given = _References(inputs, outputs, loaded.get(3, []), vectors)
        first = pl.program_id(1) * (blocks.run * blocks.block)

        def step(turn: Array, sums: Sums) -> Sums:
            return kernel(_Block(blocks, first, turn, tables, precision), given, sums)

        zeros = {kind: [jnp.zeros(shapes[kind], jnp.float32) for _ in parts] for kind in wanted}
        sums = jax.lax.fori_loop(0, blocks.run, step, zeros)
        for ref, kind in zip(rest, wanted):
            for part in parts:
                ref[jnp.int32(part)] = sums[kind][part]

    return run


def _token_spec(blocks: Blocks, x: Any) -> pl.BlockSpec:
    """One head of one example and the tokens of one program, of (B, N, h, p, parts) or (B, N, h, e)."""
    channels = (blocks.padded, blocks.parts) if len(x.shape) == 5 else (blocks.padded_value,)
    zeros = (0,) * len(channels)
    return pl.BlockSpec((None, blocks.run * blocks.block, None, *channels), lambda h, s, b: (b, s, h, *zeros))


def _spec(shape: tuple[int, ...], index: Callable) -> pl.BlockSpec:
    """All of ``shape``, at an index of the axes before it."""
    found = len(index(0, 0, 0))
    zeros = (0,) * len(shape)
    return pl.BlockSpec((*(None,) * found, *shape), lambda h, s, b: (*index(h, s, b), *zeros))
