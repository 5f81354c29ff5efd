"""Arrays that are read when they are needed, so that a conversion holds a few of them at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

from kernels.typing import PyTree

# Arrays that are read or written together: small ones take longer one by one. A larger array is alone.
GROUP_BYTES = 1 << 26
# Big stacked arrays are stored in pieces of about this size, so that hosts of a mesh read only what they keep.
_CHUNK_BYTES = 1 << 27

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """Shape and dtype of an array, and how it is read; nothing is kept of what was read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: Any) -> LazyArray:
        """A LazyArray as it is, or an array that is there already."""
        return array if isinstance(array, cls) else cls(array.shape, np.dtype(array.dtype), lambda: np.asarray(array))

    @property
    def nbytes(self) -> int:
        """Bytes of the array once it is read."""
        count = self.dtype.itemsize
        for length in self.shape:
            count *= length
        return count


def in_groups(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Consecutive items whose sizes add up to ``GROUP_BYTES`` at most, or a single larger one."""
    group: list[Item] = []
    total = 0
    for item in items:
        if group and total + size(item) > GROUP_BYTES:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group


def write_tree(directory: Any, tree: PyTree) -> None:
    """Writes a tree as Orbax does, a few arrays after others. Leaves are arrays or LazyArrays.

    Orbax's own handlers copy every array first and write all of them at once. What is written is the same.
    """
    import orbax.checkpoint as ocp

    class FewAtATime(ocp.type_handlers.NumpyHandler):
        async def serialize(self, values, infos, args=None):
            args = args or [ocp.SaveArgs()] * len(values)
            for group in in_groups(zip(values, infos, args, strict=True), lambda item: item[0].nbytes):
                arrays = [np.asarray(value.read(), order="C") for value, _, _ in group]
                _, some_infos, some_args = zip(*group)
                for written in await super().serialize(arrays, some_infos, some_args):
                    written.result()
                del arrays, written
            return []

    registry = ocp.type_handlers.create_type_handler_registry((LazyArray, FewAtATime(deepcopy_host_arrays=False)))
    # Uncompressed: float weights shrink by 7% and take 3 times as long.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    lazy = jax.tree.map(LazyArray.of, tree)
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), lazy)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(lazy, save_args), force=True)
