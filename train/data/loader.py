"""The order of samples, as a checkpointable Grain pipeline.

The order is one global sequence, a function of the seed: process p reads its rows of every global batch. A position
therefore means the same on any number of processes, and a resumed run sees the batches it would have seen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from kernels.typing import Float, Int
from sana_jax.errors import CheckpointError, UserError
from train.batch import Batch

Shape = tuple[int, ...]
_BATCHES = 1 << 40  # more than any run has
# What the random numbers of a position are for.
_BUCKETS, _SAMPLES, _CHOICES, _OFFSETS = range(4)


class Dataset(Protocol):
    """What training asks of data. One with an order of its own also has ``order(seed, batch_size)``, which gives
    something with ``plan`` as ``BatchOrder`` has it; one whose batches differ in size has ``batch_rows(shape,
    batch_size)``, a multiple of the batch size."""

    @property
    def buckets(self) -> Mapping[Shape, Sequence[int]]:
        """The samples' indices by the shape ([T,] H, W, C) of their latents; a batch has samples of one bucket."""
        ...

    def __len__(self) -> int:
        """Samples."""
        ...

    def batch(self, indices: Int[np.ndarray, " B"], choices: Float[np.ndarray, "B 2"]) -> Batch:
        """The samples of these indices, as arrays.

        ``choices`` are uniform in [0, 1): with the first a sample picks one of its captions, with the second one of its
        pictures' variants (crops, mirrored ones).
        """
        ...


class Plan(NamedTuple):
    """One global batch: which samples it has, and the numbers with which they pick caption and variant."""

    indices: Int[np.ndarray, " B"]
    choices: Float[np.ndarray, "B 2"]


class BatchOrder:
    """Which samples the n-th batch has, for every n, as a function of (buckets, seed, batch size).

    Every bucket is an endless sequence of epochs, each in an order of its own, from which batches are cut one after
    another, across the ends of epochs. Buckets take turns just as often as their share of the samples says: after round
    r, which is about an epoch of all samples, a bucket of n samples has had (n r + o) // batch size turns, with an
    offset o of its own, so that rare buckets do not come all at once. The turns of a round are in a random order.
    """

    def __init__(self, buckets: Mapping[Shape, Sequence[int]], seed: int, batch_size: int):
        self.shapes = [shape for shape in sorted(buckets) if len(buckets[shape])]
        self._buckets = [np.asarray(buckets[shape]) for shape in self.shapes]
        self._counts = np.asarray([len(bucket) for bucket in self._buckets], np.int64)
        self._seed, self._batch_size = seed, batch_size
        self._offsets = self._generator(_OFFSETS).integers(0, batch_size, len(self._buckets))

    def plan(self, number: int) -> Plan:
        """The batch of this number, from 0."""
        return Plan(self.samples(*self.turn(number)), self.choices(number))

    def turn(self, number: int) -> tuple[Shape, int]:
        """The bucket that a batch is of, by its shape, and how many batches of that bucket come before."""
        first = self._round_of(number)
        before, order = self._turns_before(first), self._round(first)
        place = number - int(before.sum())
        bucket = int(order[place])
        return self.shapes[bucket], int(before[bucket] + np.count_nonzero(order[:place] == bucket))

    def samples(self, shape: Shape, turn: int) -> Int[np.ndarray, " B"]:
        """The samples of a bucket's batch of this number, from 0."""
        bucket = self.shapes.index(shape)
        samples, first = self._buckets[bucket], turn * self._batch_size
        epochs, places = np.divmod(np.arange(first, first + self._batch_size), len(samples))
        chosen = np.empty(self._batch_size, np.int64)
        for epoch in np.unique(epochs):
            own = epochs == epoch
            chosen[own] = samples[self._epoch(bucket, int(epoch))[places[own]]]
        return chosen

    def choices(self, number: int) -> Float[np.ndarray, "B 2"]:
        """The numbers with which the samples of a batch pick caption and variant."""
        return self._generator(_CHOICES, number).random((self._batch_size, 2))

    def _turns_before(self, round_number: int) -> Int[np.ndarray, " K"]:
        """The turns of every bucket before a round."""
        return (self._counts * round_number + self._offsets) // self._batch_size

    def _round_of(self, number: int) -> int:
        """The last round that has no more than this many batches before it."""
        samples, around = int(self._counts.sum()), len(self._counts)
        low = max(0, (number - around) * self._batch_size // samples)
        high = (number + around) * self._batch_size // samples + 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._turns_before(middle).sum() <= number else (low, middle)
        return low

    @functools.lru_cache(maxsize=4)  # noqa: B019 - the order lives as long as the run
    def _round(self, number: int) -> np.ndarray:
        turns = self._turns_before(number + 1) - self._turns_before(number)
        return self._generator(_BUCKETS, number).permutation(np.repeat(np.arange(len(turns)), turns))

    @functools.lru_cache(maxsize=128)  # noqa: B019
    def _epoch(self, bucket: int, epoch: int) -> np.ndarray:
        return self._generator(_SAMPLES, bucket, epoch).permutation(len(self._buckets[bucket]))

    def _generator(self, *name: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed, *name))))


def batch_rows(dataset: Dataset, shape: Shape, batch_size: int) -> int:
    """Samples of a batch of latents of this shape."""
    own = getattr(dataset, "batch_rows", None)
    return batch_size if own is None else own(shape, batch_size)


def own_rows(rows: tuple[int, int], batch_size: int, total: int) -> slice:
    """A process's rows of a batch of ``total`` samples, a multiple of the batch size, of which it has ``rows``."""
    return slice(*(row * (total // batch_size) for row in rows))


class Loader(Iterator[Batch]):
    """Endless batches of this process's rows, shuffled anew in every epoch.

    Args:
        dataset: the samples.
        seed: of the order.
        batch_size: rows of a global batch.
        rows: this process's rows [first, end) of it.

    Raises:
        UserError: the dataset is empty.
    """

    def __init__(self, dataset: Dataset, *, seed: int, batch_size: int, rows: tuple[int, int]):
        if len(dataset) == 0:
            raise UserError("the data set is empty: 0 samples, at least 1 is needed; check --data")
        first, end = rows
        own = getattr(dataset, "order", None)
        order = own(seed, batch_size) if own is not None else BatchOrder(dataset.buckets, seed, batch_size)

        def load(number: int) -> Batch:
            # Plans are cheap: every process makes them whole and loads its own rows alone.
            plan = order.plan(int(number))
            own = own_rows((first, end), batch_size, len(plan.indices))
            return dataset.batch(plan.indices[own], plan.choices[own])

        batches = grain.MapDataset.range(_BATCHES).map(load)
        # Threads, not processes: no worker can then take hold of an accelerator.
        self._iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
        self._fingerprint = {"samples": len(dataset), "seed": seed, "batch_size": batch_size}

    def __next__(self) -> Batch:
        return next(self._iterator)

    def position(self) -> dict[str, Any]:
        """Where the sequence stands: JSON-able, the same on every process."""
        return {**self._fingerprint, "iterator": self._iterator.get_state()}

    def restore(self, position: dict[str, Any]) -> None:
        """Continues from a position.

        Raises:
            CheckpointError: it is a position in another sequence.
        """
        if not isinstance(position, dict) or "iterator" not in position:
            raise CheckpointError(
                f"the checkpoint's data position is {str(position)[:80]}, no position of this loader's; resume "
                "from another checkpoint, or start a new run"
            )
        fingerprint = {name: position.get(name) for name in self._fingerprint}
        if fingerprint != self._fingerprint:
            raise CheckpointError(
                f"the checkpoint's data position belongs to {fingerprint}, this run reads {self._fingerprint}; resume "
                "with the run's own data, seed and batch size, or start a new run"
            )
        self._iterator.set_state(position["iterator"])
