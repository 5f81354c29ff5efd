"""Timing of functions beside each other: warmed up, interleaved, with the spread."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of every repetition of one function."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    def summary(self) -> dict[str, Any]:
        p10, p90 = np.percentile(self.seconds, [10, 90])
        return {
            "median_s": self.median,
            "p10_s": float(p10),
            "p90_s": float(p90),
            "minimum_s": self.minimum,
            "repetitions": len(self.seconds),
        }


def time_interleaved(
    functions: Mapping[str, Callable[[], Any]], repetitions: int, wait: Callable[[Any], Any]
) -> dict[str, Timing]:
    """Runs all functions in turn, so that a slow phase of the machine meets all of them.

    Args:
        functions: what to time; each is run once beforehand.
        repetitions: how often the round is repeated.
        wait: blocks until a result is computed.
    """
    for function in functions.values():
        wait(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            start = time.perf_counter()
            wait(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def ratio(numerator: Timing, denominator: Timing) -> float:
    """How many times longer the first takes, from the least disturbed repetition of each."""
    return numerator.minimum / denominator.minimum


def paired_ratio(numerator: Timing, denominator: Timing) -> float:
    """The median over rounds of two interleaved functions' ratio."""
    return float(np.median(np.divide(numerator.seconds, denominator.seconds)))
