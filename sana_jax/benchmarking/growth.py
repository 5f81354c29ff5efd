"""How cost grows with the number of tokens: time of linear attention, memory of blockwise softmax attention.

Both are claimed to be linear: the exponent of a power law fitted to the measurements is 1, and at most 1.05.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.benchmarking.timing import compile_timed, random_like, time_interleaved
from kernels.linear_attention import relu_linear_attention
from kernels.softmax_attention import softmax_attention
from sana_jax.benchmarking.sides import OURS, Setting

LIMIT = 1.05  # of the exponents
TOKENS = {"full": (1024, 2048, 4096, 8192, 16384), "tiny": (1024, 2048, 4096)}
HEADS = {"full": (70, 32), "tiny": (4, 32)}
SOFTMAX_HEADS = {"full": (20, 112), "tiny": (2, 16)}


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Of the power law that fits best: the slope of log cost over log size."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def time_case(setting: Setting) -> list[dict[str, Any]]:
    """Linear attention of SANA 1.6B's heads at 1024 to 16384 tokens, all lengths in turn."""
    tokens, (heads, size) = TOKENS[setting.size], HEADS[setting.size]
    functions, compilations = {}, {}
    for count in tokens:
        shape = jax.ShapeDtypeStruct((1, count, heads, size), jnp.dtype(setting.dtype))
        arrays = random_like([shape] * 3, 1.0)
        compiled, compilations[count] = compile_timed(relu_linear_attention, *arrays)
        functions[str(count)] = functools.partial(compiled, *arrays)
    timings = time_interleaved(functions, max(5, setting.repetitions), at_least=0.05)
    rows = [
        {
            "case": "growth of time: linear attention",
            "what": "forward",
            "shape": f"{count} tokens, {heads} heads of {size}",
            "dtype": setting.dtype,
            "implementation": OURS,
            **timings[str(count)].summary(),
            **compilations[count],
            "figures": {"tokens": count},
        }
        for count in tokens
    ]
    _add_exponent(rows, tokens, [timings[str(count)].median for count in tokens])
    return rows


def memory_case(setting: Setting) -> list[dict[str, Any]]:
    """Temporary memory of blockwise softmax attention with its gradients, by the compiler's own analysis."""
    heads, size = SOFTMAX_HEADS[setting.size]
    tokens = TOKENS[setting.size]

    def gradients(query: Any, key: Any, value: Any) -> Any:
        def scalar(*inputs: Any) -> Any:
            return softmax_attention(*inputs, bounded_memory=True).astype(jnp.float32).sum()

        return jax.grad(scalar, argnums=(0, 1, 2))(query, key, value)

    rows = []
    for count in tokens:
        shapes = [jax.ShapeDtypeStruct((1, count, heads, size), jnp.dtype(setting.dtype))] * 3
        _, compilation = compile_timed(gradients, *shapes)
        row = {"case": "growth of memory: softmax attention", "what": "gradients", "dtype": setting.dtype,
               "shape": f"{count} tokens, {heads} heads of {size}", "implementation": OURS, **compilation,
               "figures": {"tokens": count, "all scores, MB": heads * count**2 * 4 / 1e6}}  # fmt: skip
        rows.append(row)
    _add_exponent(rows, tokens, [row["temporary_MB"] for row in rows])
    return rows


def _add_exponent(rows: list[dict[str, Any]], sizes: Sequence[int], costs: Sequence[float]) -> None:
    rows[-1]["figures"] |= {"exponent": exponent(sizes, costs), "exponent allowed": LIMIT}


def series(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """By the plot's panel, tokens and milliseconds or megabytes of the growth rows of a report."""
    panels: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        kind = {"growth of time: linear attention": "median_s", "growth of memory: softmax attention": "temporary_MB"}
        if key := kind.get(row["case"]):
            unit, factor = ("ms", 1e3) if key == "median_s" else ("MB", 1)
            name = f"{row['case'].removeprefix('growth of ')}, {row['what']} ({unit})"
            xs, ys = panels.setdefault(name, ([], []))
            xs.append(row["figures"]["tokens"])
            ys.append(row[key] * factor)
    return panels
