"""Checkpoints whose tensors have other names, or are several of ours joined: read by our names, and by theirs again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

import numpy as np

from sana_jax.errors import CheckpointError
from sana_jax.weights.messages import describe_array, first_few
from sana_jax.weights.safetensors_files import TensorInfo, TensorSource

LAYER = "{layer}"


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{layer\}", r"(\d+)"))


@dataclasses.dataclass(frozen=True)
class Rename:
    """One tensor's name in an original checkpoint and in a published one; ``{layer}`` stands for a number in both.

    Attributes:
        original: its name.
        published: the new name; several where the tensor is that many equal parts joined along its first axis.
        pointwise: whether the tensor is a matrix that the published checkpoint has as a 1x1 convolution.
    """

    original: str
    published: tuple[str, ...]
    pointwise: bool = False


def both(original: str, *published: str) -> tuple[Rename, Rename]:
    """The renames of a layer's ``weight`` and ``bias``."""
    return tuple(
        Rename(f"{original}.{part}", tuple(f"{name}.{part}" for name in published)) for part in ("weight", "bias")
    )


class RenamedSource:
    """A source under published names. Names that no rename knows stay as they are, so that they are reported.

    Attributes:
        location: the original's.
        tensors: published name -> dtype and shape.
        dropped: original names that carry no weights of the network, with their shapes.

    Raises:
        CheckpointError: a joined tensor cannot be split, or two tensors want one name.
    """

    def __init__(self, source: TensorSource, table: Sequence[Rename], dropped: Sequence[str]) -> None:
        self.location = source.location
        self.tensors: dict[str, TensorInfo] = {}
        self.dropped: dict[str, tuple[int, ...]] = {}
        self._source = source
        self._parts: dict[str, tuple[str, int, Rename]] = {}
        compiled = [(_pattern(rename.original), rename) for rename in table]
        for name, info in source.tensors.items():
            if any(re.fullmatch(pattern, name) for pattern in dropped):
                self.dropped[name] = info.shape
                continue
            found = [(match, rename) for pattern, rename in compiled if (match := pattern.fullmatch(name))]
            match, rename = found[0] if found else (None, Rename(name, (name,)))
            layer = match[1] if match and match.groups() else ""
            self._add(name, info, rename, layer)

    def read(self, name: str) -> np.ndarray:
        """One tensor under its published name."""
        original, part, rename = self._parts[name]
        array = self._source.read(original)
        rows = array.shape[0] // len(rename.published) if len(rename.published) > 1 else None
        if rows is not None:
            array = array[part * rows : (part + 1) * rows]
        return array.reshape(self.tensors[name].shape)

    def _add(self, name: str, info: TensorInfo, rename: Rename, layer: str) -> None:
        count = len(rename.published)
        if count > 1 and (not info.shape or info.shape[0] % count):
            raise CheckpointError(
                f"{self.location}: {name} {describe_array(info)} is not {count} tensors of one size; this is another "
                "network than the SANA family's"
            )
        shape = (info.shape[0] // count, *info.shape[1:]) if count > 1 else info.shape
        shape = (*shape, 1, 1) if rename.pointwise else shape
        for part, published in enumerate(rename.published):
            key = published.replace(LAYER, layer)
            if key in self.tensors:
                raise CheckpointError(f"{self.location}: {name} and {self._parts[key][0]} are both {key}")
            self.tensors[key] = TensorInfo(info.dtype, shape)
            self._parts[key] = (name, part, rename)


class OriginalSource:
    """A published source under original names: ``RenamedSource`` with the same table, the other way.

    Where the table has two originals of one published name, it is the first.

    Attributes:
        location: the published source's.
        tensors: original name -> dtype and shape.

    Raises:
        CheckpointError: names without an original, or tensors that cannot be joined; all of them.
    """

    def __init__(self, source: TensorSource, table: Sequence[Rename], *, keep_others: bool = False) -> None:
        """``keep_others`` keeps names that the table lacks, for a family that spells most names in one way."""
        self.location = source.location
        self.tensors: dict[str, TensorInfo] = {}
        self._source = source
        compiled = [
            (_pattern(published), rename, part) for rename in table for part, published in enumerate(rename.published)
        ]
        joined: dict[str, tuple[Rename, dict[int, str]]] = {}
        unknown = []
        for name in source.tensors:
            found = [(match, rename, part) for pattern, rename, part in compiled if (match := pattern.fullmatch(name))]
            if not found and not keep_others:
                unknown.append(f"{name} {describe_array(source.tensors[name])}")
                continue
            match, rename, part = found[0] if found else (None, Rename(name, (name,)), 0)
            original = rename.original.replace(LAYER, match[1] if match and match.groups() else "")
            joined.setdefault(original, (rename, {}))[1][part] = name
        problems = [f"no original name of {first_few(unknown, 'tensors')}"] if unknown else []
        for original, (rename, parts) in joined.items():
            infos = {source.tensors[name] for name in parts.values()}
            if len(parts) != len(rename.published) or len(infos) > 1:
                problems.append(f"{original} cannot be joined from {', '.join(parts.values())}")
                continue
            dtype, shape = infos.pop()
            shape = shape[:2] if rename.pointwise else shape
            shape = (shape[0] * len(parts), *shape[1:]) if len(parts) > 1 else shape
            self.tensors[original] = TensorInfo(dtype, shape)
        if problems:
            raise CheckpointError(
                f"{self.location} has no original layout: {'; '.join(problems)}; export it to a diffusers directory"
            )
        self._parts = {
            name: (original, part) for original, (_, parts) in joined.items() for part, name in parts.items()
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor under its original name."""
        parts = sorted((part, published) for published, (original, part) in self._parts.items() if original == name)
        arrays = [self._source.read(published) for _, published in parts]
        return (np.concatenate(arrays) if len(arrays) > 1 else arrays[0]).reshape(self.tensors[name].shape)

    def pieces(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """All tensors' bytes, in the source's own order: original name, first byte within it, array.

        Parts are joined along the first axis, so that each of them is a contiguous piece. Stacked layers are read once
        in this order, which is not that of the joined tensors.
        """
        for name in self._source.tensors:
            original, part = self._parts[name]
            array = self._source.read(name)
            yield original, part * array.nbytes, array
