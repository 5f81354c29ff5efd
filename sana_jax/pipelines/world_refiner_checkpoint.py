"""What a refinement leaves after every block, so that it can go on after any end.

::

    manifest.json          all that decides what the refined latents are, and where they were computed
    block-00000.npy, ...   every block's refined latents (B, T, h, w, C), float32; 1.4 MB each at 704x1280

Each file appears whole or not at all, the manifest first. The network's keys and values are not written: at 704x1280
they take 0.7 GB per frame in bfloat16, 7.6 GB in all after the fourth block. Reading a block again gives its own back,
bit for bit on the same device, for a quarter of the work that refining it took.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from kernels.typing import Array, Float
from sana_jax.errors import UserError
from sana_jax.files import atomic_file, read_json, write_json
from sana_jax.pipelines.resumed_folder import damaged_file, told_differences

_MANIFEST, _FORMAT = "manifest.json", 1


class RefinerCheckpoint:
    """The folder of one refinement.

    Args:
        path: the folder; made where there is none.
        settings: all that decides what the refined latents are, as values of JSON.
        say: prints a line.
    """

    def __init__(
        self, path: str | os.PathLike[str], settings: Mapping[str, Any], say: Callable[[str], None] = print
    ) -> None:
        self.path = pathlib.Path(path)
        self._settings = json.loads(json.dumps(settings))
        self._say = say

    def open(self, shapes: list[tuple[int, ...]]) -> list[Float[np.ndarray, "B T h w C"]]:
        """The blocks that an earlier run has refined, from the first on; begins a new folder where there is none.

        Args:
            shapes: of all blocks of the video.

        Raises:
            UserError: the folder is another run's, which is told with all differences; it is damaged, or something
                else; or it cannot be written.
        """
        if not (self.path / _MANIFEST).exists():
            self._begin()
            return []
        manifest = read_json(self.path / _MANIFEST)
        before = manifest.get("settings")
        if manifest.get("format") != _FORMAT or not isinstance(before, dict):
            raise self._damaged(self.path / _MANIFEST, "it describes no refinement of this version")
        self._check(before)
        here = _device()
        if manifest.get("computed_on") != here:
            self._say(
                f"{self.path} was begun on {manifest.get('computed_on')} and goes on on {here}: later blocks will not "
                "be the same to the last bit as if it had stayed there"
            )
        blocks: list[np.ndarray] = []
        while len(blocks) < len(shapes) and self._file(len(blocks)).exists():
            blocks.append(self._read(len(blocks), shapes[len(blocks)]))
        return blocks

    def save(self, block: int, latents: Float[Array, "B T h w C"]) -> None:
        """Keeps a refined block; until its file is renamed, what was there before holds.

        Raises:
            UserError: it cannot be written.
        """
        try:
            with atomic_file(self._file(block)) as file:
                np.save(file, np.asarray(latents, np.float32))
        except OSError as error:
            raise UserError(
                f"writing {self._file(block)} failed ({error.strerror or error}); the blocks before it are there: make "
                "room on the disk and call again with the same arguments to go on"
            ) from error

    def _begin(self) -> None:
        if self.path.exists() and (not self.path.is_dir() or any(self._strange())):
            raise UserError(
                f"checkpoint_dir {self.path} is no refinement's: it has no {_MANIFEST} and is not empty; name a new or "
                "empty directory"
            )
        try:
            manifest = {"format": _FORMAT, "computed_on": _device(), "settings": self._settings}
            write_json(self.path / _MANIFEST, manifest)
        except OSError as error:
            raise UserError(
                f"checkpoint_dir {self.path} cannot be written ({error.strerror or error}); name another directory"
            ) from error

    def _strange(self) -> list[str]:
        """Files that no refinement that was ended while it wrote its manifest has left."""
        return [file.name for file in self.path.iterdir() if not file.name.startswith(f".{_MANIFEST}.")]

    def _file(self, block: int) -> pathlib.Path:
        return self.path / f"block-{block:05d}.npy"

    def _read(self, block: int, shape: tuple[int, ...]) -> Float[np.ndarray, "B T h w C"]:
        path = self._file(block)
        try:
            latents = np.load(path, allow_pickle=False)
        except Exception as error:  # NumPy has several
            raise self._damaged(path, error) from error
        if latents.shape != shape or latents.dtype != np.float32:
            raise self._damaged(path, f"{latents.dtype} of shape {latents.shape}, not float32 of {shape}")
        return latents

    def _check(self, before: Mapping[str, Any]) -> None:
        differ = told_differences(before, self._settings)
        if differ:
            raise UserError(
                f"checkpoint_dir {self.path} is of a refinement with other settings: {differ}; give the "
                "same, or name another directory"
            )

    def _damaged(self, path: pathlib.Path, reason: Any) -> UserError:
        return damaged_file(path, self.path, reason)


def digest(*arrays: Any) -> str | None:
    """A short name for arrays' values; None for none."""
    if arrays[0] is None:
        return None
    found = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        found.update(f"{array.shape} {array.dtype} ".encode())
        found.update(array.tobytes())
    return found.hexdigest()[:12]


def _device() -> str:
    return f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
