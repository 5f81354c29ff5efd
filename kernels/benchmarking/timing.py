"""Timing of functions beside each other: warmed up, interleaved, with the spread; compiling is timed apart."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

_MOST_CALLS = 2000  # of one sample


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call of every sample of one function."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the samples, in seconds."""
        return float(np.median(self.seconds))

    @property
    def minimum(self) -> float:
        """The least disturbed sample, in seconds."""
        return min(self.seconds)

    def summary(self) -> dict[str, Any]:
        """Median, 10th and 90th percentile and minimum in seconds, and the number of samples."""
        p10, p90 = np.percentile(self.seconds, [10, 90])
        return {
            "median_s": self.median,
            "p10_s": float(p10),
            "p90_s": float(p90),
            "minimum_s": self.minimum,
            "repetitions": len(self.seconds),
        }


def time_interleaved(
    functions: Mapping[str, Callable[[], Any]],
    repetitions: int,
    wait: Callable[[Any], Any] = jax.block_until_ready,
    *,
    at_least: float = 0.0,
) -> dict[str, Timing]:
    """Runs all functions in turn, so that a slow phase of the machine meets all of them.

    Args:
        functions: what to time; each is run once beforehand.
        repetitions: how often the round is repeated.
        wait: blocks until a result is computed.
        at_least: seconds of one sample. A function that takes less is called several times in a row and waited for
            once, so that on a device that works through a queue the time of starting a call is hidden where it can be.

    Raises:
        ValueError: no repetitions.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions={repetitions}: allowed is 1 or more; 5 is usual")
    calls = {}
    for name, function in functions.items():
        wait(function())
        calls[name] = _calls_of_a_sample(function, wait, at_least) if at_least > 0 else 1
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            seconds[name].append(_sample(function, wait, calls[name]) / calls[name])
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def _sample(function: Callable[[], Any], wait: Callable[[Any], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = function()
    wait(result)
    return time.perf_counter() - start


def _calls_of_a_sample(function: Callable[[], Any], wait: Callable[[Any], Any], at_least: float) -> int:
    calls = 1
    while calls < _MOST_CALLS:
        taken = _sample(function, wait, calls)
        if taken >= at_least:
            break
        calls = min(_MOST_CALLS, max(2 * calls, math.ceil(calls * at_least / max(taken, 1e-9))))
    return calls


def ratio(numerator: Timing, denominator: Timing) -> float:
    """How many times longer the first takes, from the least disturbed sample of each."""
    return numerator.minimum / denominator.minimum


def paired_ratio(numerator: Timing, denominator: Timing) -> float:
    """The median over rounds of two interleaved functions' ratio."""
    return float(np.median(np.divide(numerator.seconds, denominator.seconds)))


def compile_timed(
    function: Callable, *arguments: Any, donate: tuple[int, ...] = ()
) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """Compiles for these arguments (arrays or shapes) and says how long that took and what memory the program needs.

    Returns:
        The compiled function, and ``compile_s`` (tracing included) and ``temporary_MB`` (beside arguments and results;
        0 where the backend does not report it).
    """
    start = time.perf_counter()
    compiled = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return compiled, {"compile_s": seconds, "temporary_MB": memory.temp_size_in_bytes / 1e6 if memory else 0.0}


def random_like(tree: Any, standard_deviation: float = 0.02) -> Any:
    """Arrays of a tree's shapes and dtypes with normal numbers, quickly: a supply of four million is used in turn.

    Leaves of integers are zeros.
    """
    supply = np.random.default_rng(0).standard_normal(1 << 22, np.float32) * np.float32(standard_deviation)
    used = 0

    def draw(leaf: Any) -> jax.Array:
        nonlocal used
        if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
            return jax.numpy.zeros(leaf.shape, leaf.dtype)
        numbers = np.roll(supply, -used)[: math.prod(leaf.shape)].astype(leaf.dtype)
        used = (used + 1_000_003) % supply.size
        return jax.device_put(np.resize(numbers, leaf.shape))

    return jax.tree.map(draw, tree)
