"""The order of samples, as a checkpointable Grain pipeline.

The order is one global sequence, a function of the seed: process p reads its rows of every global batch. A position
therefore means the same on any number of processes, and a resumed run sees the batches it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import grain
import numpy as np

from kernels.typing import Int
from sana_jax.errors import CheckpointError, UserError
from train.batch import Batch


class Dataset(Protocol):
    """What training asks of data."""

    def __len__(self) -> int:
        """Samples."""
        ...

    def batch(self, indices: Int[np.ndarray, " B"]) -> Batch:
        """The samples of these indices, as arrays."""
        ...


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
        order = grain.MapDataset.range(len(dataset)).seed(seed).shuffle().repeat().batch(batch_size)
        # Batches of indices are cheap: every process makes them whole and loads its own rows alone.
        batches = order.map(lambda indices: dataset.batch(np.asarray(indices)[first:end]))
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
