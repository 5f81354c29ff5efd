"""Shards that are functions of a list: whatever was interrupted, the files that there are at the end are the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from train.data.cache import CacheWriter, Name, shard_name


class Wanted(NamedTuple):
    """A record that is to be there.

    Attributes:
        name: of the record.
        signature: what it depends on beside the cache's identity.
    """

    name: Name
    signature: str = ""


class NumberedShards:
    """The records of one kind of a cache: shard k has the k-th ``size`` of a list.

    ``ShardFiller`` ends its shards by the clock; these are the same files on every machine.

    Args:
        cache: that has them.
        kind: of the records.
        records: all of them.
        size: records in a shard.
    """

    def __init__(self, cache: CacheWriter, kind: str, records: Sequence[Wanted], size: int):
        self._cache, self._kind, self.size = cache, kind, size
        self._records = list(records)

    def __len__(self) -> int:
        return -(-len(self._records) // self.size)

    def part(self, number: int) -> list[Wanted]:
        """The records of a shard."""
        return self._records[number * self.size : (number + 1) * self.size]

    def missing(self) -> list[int]:
        """The shards that are not there, or lack some of their records."""
        there = {shard.path.name: set(zip(shard.names, shard.signatures)) for shard in self._cache.shards}
        empty: set = set()
        return [
            number
            for number in range(len(self))
            if not set(self.part(number)) <= there.get(shard_name(self._kind, number), empty)
        ]

    def write(self, number: int, arrays: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Writes a shard, or replaces it; ``arrays`` are those of its records, in order, and may be made meanwhile.

        Raises:
            UserError: the folder can't be written to.
        """
        shard = self._cache.numbered_shard(self._kind, number)
        try:
            for wanted, own in zip(self.part(number), arrays, strict=True):
                shard.add(wanted.name, own, wanted.signature)
        except BaseException:
            shard.abandon()
            raise
        self._cache.keep(shard.close())
