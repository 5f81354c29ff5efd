"""Checkpoints whose tensors have other names, or are several of ours joined: read under the names that we know."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from sana_jax.errors import CheckpointError
from sana_jax.weights.messages import describe_array
from sana_jax.weights.safetensors_files import TensorInfo, TensorSource

LAYER = "{layer}"


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
        compiled = [
            (re.compile(re.escape(rename.original).replace(r"\{layer\}", r"(\d+)")), rename) for rename in table
        ]
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
