"""What is timed of softmax attention: with few keys, where all scores may be held, and with bounded memory.

Costs as in ``kernels.benchmarking.ops``: two products of every pair of a query and a key, and five operations of its
score; a gradient has four more products.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from kernels.benchmarking.ops import Arrays, Counts, Op, Sizes, draw_normal
from kernels.selection import DEFAULT
from kernels.softmax_attention import reference
from kernels.softmax_attention.api import softmax_attention

_QKV = ("query", "key", "value")


def _draw(sizes: Sizes, dtype: Any) -> Arrays:
    """Of T frames those before are seen, and their own; without frames the first three quarters of the keys."""
    batch, queries, keys, heads, size = (sizes[name] for name in ("B", "M", "N", "h", "d"))
    shapes = (batch, queries, heads, size), (batch, keys, heads, size), (batch, keys, heads, size)
    arrays = dict(zip(_QKV, draw_normal(dtype, *shapes)))
    if frames := sizes.get("T"):
        return arrays | {"mask": jnp.asarray(np.tril(np.ones((1, frames, frames), bool)))}
    kept = jnp.broadcast_to(jnp.arange(keys) < keys - keys // 4, (batch, 1, keys))
    return arrays | {"mask": kept} if sizes.get("padded") else arrays


def _draw_biased(sizes: Sizes, dtype: Any) -> Arrays:
    """Captions' padding as SANA's networks have it: a bias per key."""
    kept = jnp.arange(sizes["N"]) < sizes["N"] - sizes["N"] // 4
    bias = jnp.broadcast_to(jnp.where(kept, 0.0, -10000.0), (sizes["B"], 1, 1, sizes["N"]))
    return _draw(sizes, dtype) | {"bias": bias}


def _narrow(arrays: Arrays) -> Arrays:
    """The first example and head."""
    return {name: x[:1, ..., :1, :] if name in _QKV else x[:1] for name, x in arrays.items()}


def _first_head(result: Any) -> Any:
    return result[:1, ..., :1, :]


def _cost(sizes: Sizes, gradient: bool) -> Counts:
    batch, queries, keys, heads, size = (sizes[name] for name in ("B", "M", "N", "h", "d"))
    frames = sizes.get("T", 0)
    pairs = batch * heads * queries * keys * ((frames + 1) / (2 * frames) if frames else 1)
    flops, elements = pairs * (4 * size + 5), batch * heads * size * (2 * queries + 2 * keys)
    if not gradient:
        return flops, elements, 0
    return 3 * flops, batch * heads * size * (3 * queries + 4 * keys), 0


SOFTMAX = Op(
    "softmax_attention",
    {
        "tiny": {"tiny": {"B": 2, "M": 24, "N": 10, "h": 3, "d": 8}},
        "reduced": {"SANA 1.6B 1024 px, caption": {"B": 1, "M": 1024, "N": 300, "h": 20, "d": 112}},
        "full": {
            "SANA 1.6B 1024 px, caption": {"B": 2, "M": 1024, "N": 300, "h": 20, "d": 112},
            "SANA 0.6B 1024 px, caption, training": {"B": 16, "M": 1024, "N": 300, "h": 16, "d": 72},
        },
    },
    _draw_biased,
    lambda arrays, name: softmax_attention(**arrays, implementation=name),
    lambda arrays: reference.attend(**arrays),
    _cost,
    _QKV,
    _narrow,
    _first_head,
)


def _run_bounded(arrays: Arrays, name: str | None) -> Any:
    return softmax_attention(**arrays, bounded_memory=True, implementation="blockwise" if name == DEFAULT else name)


BOUNDED = Op(
    "bounded_softmax_attention",
    {
        "tiny": {"tiny": {"B": 1, "M": 24, "N": 24, "h": 2, "d": 8, "T": 3}},
        "reduced": {"SANA-WM 704x1280, 2 latent frames": {"B": 1, "M": 1760, "N": 1760, "h": 20, "d": 112}},
        "full": {
            "SANA-WM 704x1280, 21 latent frames": {"B": 1, "M": 21 * 880, "N": 21 * 880, "h": 20, "d": 112},
            "SANA-WM 704x1280, causal blocks": {"B": 1, "M": 21 * 880, "N": 21 * 880, "h": 20, "d": 112, "T": 21},
            "SANA-Video 480p, caption": {"B": 1, "M": 21 * 1560, "N": 300, "h": 20, "d": 112, "padded": 1},
        },
    },
    _draw,
    _run_bounded,
    lambda arrays: reference.attend(**arrays),
    _cost,
    _QKV,
    _narrow,
    _first_head,
)

SOFTMAX_OPS = {op.name: op for op in (SOFTMAX, BOUNDED)}
