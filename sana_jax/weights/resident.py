"""One network's parameters, on the device for as long as they are needed there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from kernels.typing import PyTree
from sana_jax.host_memory import available_host_bytes
from sana_jax.weights.trees import tree_bytes


class Resident:
    """Parameters that are on the device between the first ``params`` and ``free``.

    Attributes:
        name: of the network, for messages.
        num_bytes: what they take on the device.
        stays: whether someone else holds them, so that ``free`` frees nothing.
        host_bytes: what they take in host memory beside that.
        abstract: their shapes, dtypes and shardings.
        open_tree: gives them as LazyArrays, which are read one by one; None where only ``params`` has them.
        directory: which they are read from; None where that is not one component's own.
    """

    host_bytes: int = 0
    directory: Path | None = None

    def __init__(
        self,
        name: str,
        num_bytes: int,
        read: Callable[[], PyTree],
        abstract: PyTree | None = None,
        open_tree: Callable[[], PyTree] | None = None,
    ) -> None:
        """Parameters that are not there yet.

        Args:
            name: see above.
            num_bytes: see above.
            read: reads them onto the device.
            abstract: see above; None where no one will ask.
            open_tree: see above.
        """
        self.name = name
        self.num_bytes = num_bytes
        self.abstract, self.open_tree = abstract, open_tree
        self._read = read
        self._params: PyTree | None = None
        self._on_host: PyTree | None = None
        self.stays = False

    @classmethod
    def of(cls, name: str, params: PyTree) -> Resident:
        """Parameters that someone else holds: always in memory, whatever is freed."""
        resident = cls(name, tree_bytes(params), lambda: params, params)
        resident.stays = True
        return resident

    @property
    def params(self) -> PyTree:
        """The parameters; the first call reads them, or takes them from host memory where they were kept there."""
        if self._params is None:
            self._params = self._read() if self._on_host is None else jax.tree.map(_put, self._on_host)
        return self._params

    def take(self) -> PyTree:
        """The parameters, let go of: each array is freed as soon as the caller lets go of it too."""
        params = self.params
        self.free()
        return params

    @property
    def loaded(self) -> bool:
        """Whether they are in memory."""
        return self.stays or self._params is not None

    def free(self) -> None:
        """Lets go of them; the next ``params`` reads them again, unless they were kept in host memory."""
        self._params = None

    def keep_on_host(self) -> bool:
        """Copies them to host memory, for the ``params`` after the next ``free``; returns whether that was done now.

        It is not where someone else holds them, where they are there already or in no memory at all, on a CPU, whose
        memory is the host's, and where host memory has less room than they take and half as much again.
        """
        if self.stays or self._params is None or self._on_host is not None or is_host_memory(self._params):
            return False
        room = available_host_bytes()
        if room is None or room < 1.5 * self.num_bytes:
            return False
        self._on_host = jax.tree.map(lambda leaf: _Kept(np.asarray(leaf), leaf.sharding), self._params)
        return True


@dataclasses.dataclass(frozen=True)
class _Kept:
    """An array in host memory and where it goes on the device."""

    array: np.ndarray
    sharding: jax.sharding.Sharding


def _put(kept: _Kept) -> jax.Array:
    return jax.device_put(kept.array, kept.sharding)


def is_host_memory(params: PyTree) -> bool:
    """Whether arrays lie in the host's memory."""
    devices = {device for leaf in jax.tree.leaves(params) for device in getattr(leaf, "devices", set)()}
    return all(device.platform == "cpu" for device in devices)
