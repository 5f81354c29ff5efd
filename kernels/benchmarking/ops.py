"""What is timed of the attention operations: sizes, inputs, reference, the FLOPs and bytes that they need at least.

FLOPs are those of the formula, one addition or multiplication each, whatever an implementation does beside them; bytes
are inputs read once and outputs written once. A gradient is of all inputs, by one cotangent, with the forward pass that
it needs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from kernels.benchmarking.roofline import Cost
from kernels.block_linear_attention import api as block_linear_attention
from kernels.block_linear_attention import reference as block_linear_attention_reference
from kernels.block_linear_attention.state import init_block_sums
from kernels.gated_delta_rule import api as gated_delta_rule
from kernels.gated_delta_rule import reference as gated_delta_rule_reference
from kernels.gated_delta_rule.state import init_state
from kernels.linear_attention import api as linear_attention
from kernels.linear_attention import reference as linear_attention_reference

Sizes = dict[str, Any]
Arrays = dict[str, Any]
Counts = tuple[int | float, int | float, int | float]
"""FLOPs, elements of the inputs' dtype, and float32 elements whatever the inputs are."""


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation as the benchmark sees it.

    Attributes:
        name: as ``kernels.selection`` calls it.
        cases: by size (tiny, reduced, full) and the model that has them, the sizes.
        draw: sizes and dtype to inputs; those that a gradient is taken by are named in ``differentiable``.
        run: inputs and the implementation's name to the result.
        reference: the definition, of inputs that ``narrow`` has cut.
        narrow: the part of inputs that suffices for a part of the result: the first head.
        narrow_result: that part of the result.
        cost: sizes and whether a gradient is taken, to FLOPs and to elements of the inputs' dtype and of float32.
        differentiable: names of inputs.
    """

    name: str
    cases: Mapping[str, Mapping[str, Sizes]]
    draw: Callable[[Sizes, Any], Arrays]
    run: Callable[[Arrays, str | None], Any]
    reference: Callable[[Arrays], Any]
    cost: Callable[[Sizes, bool], Counts]
    differentiable: tuple[str, ...]
    narrow: Callable[[Arrays], Arrays] = dict
    narrow_result: Callable[[Any], Any] = lambda result: result

    def least(self, sizes: Sizes, dtype: str, gradient: bool) -> Cost:
        """What the computation needs at least; float32 inputs are multiplied in full float32."""
        flops, elements, wide = self.cost(sizes, gradient)
        products = "float32 highest" if dtype == "float32" else dtype
        return Cost(float(flops), float(elements * jnp.dtype(dtype).itemsize + 4 * wide), products)


def describe_sizes(sizes: Sizes) -> str:
    """``B 2, N 1024, h 70, d 32``."""
    return ", ".join(f"{name} {value}" for name, value in sizes.items())


def draw_normal(dtype: Any, *shapes: tuple[int, ...]) -> list[Any]:
    """Normal numbers, the same in every run."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype) for shape in shapes]


def draw_rotation(tokens: int, size: int) -> tuple[Any, Any]:
    """Cosines and sines (tokens, size/2) of random angles."""
    angles = jnp.asarray(np.random.default_rng(1).uniform(0, 2 * math.pi, (tokens, size // 2)).astype(np.float32))
    return jnp.cos(angles), jnp.sin(angles)


def _head(names: tuple[str, ...]) -> Callable[[Arrays], Arrays]:
    """Cuts the named arrays (B, ..., h, d) down to the first example and head."""
    return lambda arrays: {name: x[:1, ..., :1, :] if name in names else x for name, x in arrays.items()}


def _first_head(result: Any) -> Any:
    return result[:1, ..., :1, :]


# -- linear attention --------------------------------------------------------------------------------------------------

_QKV = ("query", "key", "value")


def _qkv(sizes: Sizes, dtype: Any) -> Arrays:
    shape = (sizes["B"], sizes["N"], sizes["h"], sizes["d"])
    return dict(zip(_QKV, draw_normal(dtype, shape, shape, shape)))


def _qkv_rotation(sizes: Sizes, dtype: Any) -> Arrays:
    cos, sin = draw_rotation(sizes["N"], sizes["d"])
    return _qkv(sizes, dtype) | {"cos": cos, "sin": sin}


def _linear_cost(sizes: Sizes, gradient: bool) -> Counts:
    """Two products of N x d x d per head and two sums; three times that and twice the arrays with gradients."""
    heads, tokens, size = sizes["B"] * sizes["h"], sizes["N"], sizes["d"]
    flops, elements = heads * tokens * (4 * size * size + 3 * size), 4 * heads * tokens * size
    return (3 * flops, 7 / 4 * elements, 0) if gradient else (flops, elements, 0)


def _rope_cost(sizes: Sizes, gradient: bool) -> Counts:
    """Beside ``_linear_cost`` the rotation of queries and keys, three operations a channel, and its tables."""
    flops, elements, _ = _linear_cost(sizes, gradient)
    turned = 2 * sizes["B"] * sizes["h"] * sizes["N"] * sizes["d"]
    return flops + 3 * turned * (2 if gradient else 1), elements, sizes["N"] * sizes["d"]


RELU = Op(
    "relu_linear_attention",
    {
        "tiny": {"tiny": {"B": 2, "N": 48, "h": 3, "d": 8}},
        "reduced": {"SANA 1.6B 1024 px": {"B": 1, "N": 1024, "h": 70, "d": 32}},
        "full": {
            "SANA 1.6B 1024 px": {"B": 2, "N": 1024, "h": 70, "d": 32},
            "SANA 1.6B 2048 px": {"B": 2, "N": 4096, "h": 70, "d": 32},
            "SANA 0.6B 1024 px, training": {"B": 16, "N": 1024, "h": 36, "d": 32},
        },
    },
    _qkv,
    lambda arrays, name: linear_attention.relu_linear_attention(**arrays, implementation=name),
    lambda arrays: linear_attention_reference.relu_linear_attention(**arrays),
    _linear_cost,
    _QKV,
    _head(_QKV),
    _first_head,
)

ROPE = Op(
    "rope_linear_attention",
    {
        "tiny": {"tiny": {"B": 1, "N": 48, "h": 3, "d": 8}},
        "reduced": {"SANA-Video 480p, 3 latent frames": {"B": 1, "N": 3 * 30 * 52, "h": 20, "d": 112}},
        "full": {"SANA-Video 480p, 81 frames": {"B": 1, "N": 21 * 30 * 52, "h": 20, "d": 112}},
    },
    _qkv_rotation,
    lambda arrays, name: linear_attention.rope_linear_attention(**arrays, implementation=name),
    lambda arrays: linear_attention_reference.rope_linear_attention(**arrays),
    _rope_cost,
    _QKV,
    _head(_QKV),
    _first_head,
)


def _run_block(arrays: Arrays, name: str | None) -> Any:
    batch, _, heads, size = arrays["query"].shape
    state = init_block_sums(batch, heads, size)
    run = block_linear_attention.block_linear_attention
    return run(**arrays, state=state, implementation=name)[0]


BLOCK = Op(
    "block_linear_attention",
    {
        "tiny": {"tiny": {"B": 1, "N": 48, "h": 3, "d": 8}},
        "reduced": {"LongSANA 480p, block of 3 latent frames": {"B": 1, "N": 3 * 30 * 52, "h": 20, "d": 112}},
        "full": {"LongSANA 480p, block of 10 latent frames": {"B": 1, "N": 10 * 30 * 52, "h": 20, "d": 112}},
    },
    _qkv_rotation,
    _run_block,
    lambda arrays: block_linear_attention_reference.block_linear_attention(**arrays, block_starts=(0,)),
    _rope_cost,
    _QKV,
    _head(_QKV),
    _first_head,
)


# -- the gated delta rule ----------------------------------------------------------------------------------------------


def _draw_delta(sizes: Sizes, dtype: Any) -> Arrays:
    """Queries and keys after their norm and ReLU, as the network gives them."""
    batch, frames, tokens, heads, size = (sizes[name] for name in ("B", "T", "S", "h", "d"))
    shape = (batch, frames, tokens, heads, size)
    query, key, value = draw_normal(dtype, shape, shape, shape)
    rng = np.random.default_rng(2)
    beta = jnp.asarray(rng.uniform(0.1, 0.9, shape[:-1]), dtype)
    decay = jnp.asarray(rng.uniform(0.8, 1, (batch, frames, heads)), dtype)
    cos, sin = draw_rotation(frames * tokens, size)
    query, key = jnp.maximum(query, 0), jnp.maximum(key, 0)
    arrays = {"query": query, "key": key, "value": value, "beta": beta, "decay": decay}
    return arrays | {"cos": cos, "sin": sin}


def _key_scale(arrays: Arrays) -> float:
    return float(arrays["query"].shape[-1] * arrays["query"].shape[2]) ** -0.5


def _run_delta(arrays: Arrays, name: str | None) -> Any:
    rest = [arrays[name] for name in (*_QKV, "beta", "decay")]
    rotation = arrays["cos"], arrays["sin"]
    scale = _key_scale(arrays)
    return gated_delta_rule.gated_delta_rule(*rest, rotation, key_scale=scale, implementation=name)[0]


def _delta_reference(arrays: Arrays) -> Any:
    rest = [arrays[name] for name in (*_QKV, "beta", "decay")]
    batch, _, _, heads, size = arrays["query"].shape
    state, rotation = init_state(batch, heads, size), (arrays["cos"], arrays["sin"])
    return gated_delta_rule_reference.gated_delta_rule(*rest, rotation, (0,), state, _key_scale(arrays))[0]


def _narrow_delta(arrays: Arrays) -> Arrays:
    cut = _head(_QKV)(arrays)
    return cut | {"beta": cut["beta"][:1, ..., :1], "decay": cut["decay"][:1, ..., :1]}


def _delta_cost(sizes: Sizes, gradient: bool) -> Counts:
    """Per frame and head: of S tokens the products k kᵀ twice (numerator, normaliser), k vᵀ and what queries read; of
    d x d matrices one product in each direction; three times that with gradients."""
    programs, tokens, size = sizes["B"] * sizes["h"] * sizes["T"], sizes["S"], sizes["d"]
    flops = programs * (8 * tokens * size * size + 2 * 2 * size**3 + 4 * tokens * size + 6 * tokens * size)
    elements = programs * (4 * tokens * size + tokens + 1)
    return (3 * flops, 7 / 4 * elements, 0) if gradient else (flops, elements, sizes["T"] * tokens * size)


DELTA = Op(
    "gated_delta_rule",
    {
        "tiny": {"tiny": {"B": 1, "T": 3, "S": 10, "h": 2, "d": 8}},
        "reduced": {"SANA-WM 704x1280, 3 latent frames": {"B": 1, "T": 3, "S": 22 * 40, "h": 20, "d": 112}},
        "full": {
            "SANA-WM 704x1280, chunk of 3 latent frames": {"B": 1, "T": 3, "S": 22 * 40, "h": 20, "d": 112},
            "SANA-WM 704x1280, 21 latent frames": {"B": 1, "T": 21, "S": 22 * 40, "h": 20, "d": 112},
        },
    },
    _draw_delta,
    _run_delta,
    _delta_reference,
    _delta_cost,
    (*_QKV, "beta", "decay"),
    _narrow_delta,
    _first_head,
)


ATTENTION_OPS = {op.name: op for op in (RELU, ROPE, BLOCK, DELTA)}
