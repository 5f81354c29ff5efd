"""Fills a cache's shards one after the other, of a size that little is lost where a process ends, or is asked to."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from train.data.cache import CacheWriter, Name, ShardWriter
from train.preemption import StopRequest

# A shard ends at whichever comes first: what is lost if the process is killed.
SHARD_BYTES, SHARD_SECONDS = 256 << 20, 60.0


class StoppedError(Exception):
    """Someone asked the process to stop; what is finished is on the disk."""


class ShardFiller:
    """Fills shards one after the other; ends one where a batch ends and it is large or old enough."""

    def __init__(self, cache: CacheWriter, kind: str, stop: StopRequest | None):
        self._cache, self._kind, self._stop = cache, kind, stop
        self._shard: ShardWriter | None = None
        self._left_out: dict[Name, str] = {}
        self._started = 0.0

    def add(self, name: Name, arrays: Mapping[str, np.ndarray], signature: str = "") -> None:
        """One record."""
        if self._shard is None:
            if self._stop is not None:
                self._stop.nothing_to_lose = False
            self._shard, self._started = self._cache.new_shard(self._kind), time.monotonic()
        self._shard.add(name, arrays, signature)

    def leave_out(self, name: Name, reason: str) -> None:
        """Notes in the next shard that something can't be used."""
        self._left_out[name] = reason

    def batch_ends(self) -> None:
        """Ends the shard if it is time.

        Raises:
            StoppedError: the process was asked to stop; the shard has been ended.
        """
        asked = self._stop is not None and self._stop.signal is not None
        shard = self._shard
        if shard is not None:
            old = time.monotonic() - self._started >= SHARD_SECONDS
            if asked or old or shard.num_bytes >= SHARD_BYTES:
                self._end()
        if asked:
            raise StoppedError

    def _end(self) -> None:
        shard, self._shard = self._shard, None
        for name, reason in self._left_out.items():
            shard.leave_out(name, reason)
        self._left_out = {}
        self._cache.keep(shard.close())
        if self._stop is not None:
            self._stop.nothing_to_lose = self._stop.signal is None

    def __enter__(self) -> ShardFiller:
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if self._shard is not None and kind is None:
            self._end()
        elif self._shard is not None:
            self._shard.abandon()
        if self._stop is not None and self._stop.signal is None:
            self._stop.nothing_to_lose = True
