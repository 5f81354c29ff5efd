"""How far a long piece of work is, and what its numbers look like."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

PROGRESS_SECONDS = 10.0

Say = Callable[[str], None]


def _clock(seconds: float) -> str:
    from train.metrics import clock  # which imports all of training

    return clock(seconds)


class Meter:
    """Says now and then how far it is, how fast, and how long it will still take."""

    def __init__(self, what: str, total: int, say: Say):
        self._what, self._total, self._say = what, total, say
        self._done = 0
        self._started = self._said = time.monotonic()

    def advance(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        now = time.monotonic()
        if now - self._said >= PROGRESS_SECONDS and self._done < self._total:
            speed = self._done / (now - self._started)
            left = _clock((self._total - self._done) / speed)
            self._say(f"{self._what}: {self._done:,}/{self._total:,}, {speed:.2f} {self._what}/s, ETA {left}")
            self._said = now

    def close(self) -> None:
        """Says how long it took."""
        seconds = time.monotonic() - self._started
        if self._total:
            speed = self._done / max(seconds, 1e-9)
            self._say(f"{self._what}: {self._done:,} in {_clock(seconds)}, {speed:.2f} {self._what}/s")


class Moments:
    """Mean and standard deviation of all values seen."""

    def __init__(self):
        self.count, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        """More values."""
        values = values.astype(np.float64)
        self.count += values.size
        self._sum += float(values.sum())
        self._squares += float(np.square(values).sum())

    @property
    def mean(self) -> float:
        """Of all values."""
        return self._sum / max(self.count, 1)

    @property
    def deviation(self) -> float:
        """The standard deviation of all values."""
        return max(self._squares / max(self.count, 1) - self.mean**2, 0.0) ** 0.5
