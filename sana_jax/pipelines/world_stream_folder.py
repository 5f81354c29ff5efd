"""What a streamed world leaves beside its file as it is made, so that it can go on after any end: ``out.mp4.resume/``.

::

    manifest.json            all that decides what the frames are, and where they were computed; written first
    latents-00000.npy, ...   every block of the first stage (1, T, h, w, C), float32
    refined-00000.npy, ...   with a refiner, every block that it has refined

Each file appears whole or not at all. No state is written: those of the network, the refiner and the autoencoder (at
704x1280 1 GB, 7.6 GB and 2 GB) follow from the blocks, bit for bit on the same device: reading a block again takes one
pass of the network, a fifth of what making it took, and its frames are decoded again.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kernels.typing import Array, Float
from sana_jax.errors import UserError
from sana_jax.pipelines.resumed_folder import (
    check_manifest,
    check_no_other_files,
    load_block,
    remove_own_files,
    save_block,
    write_manifest,
)

_MANIFEST = "manifest.json"
_OWN_FILES = (_MANIFEST, "latents-*.npy", "refined-*.npy")
_ADVICE = "the video is there as far as it has come: make room on the disk and go on with --resume (resume=True)"


class StreamFolder:
    """The folder beside a video's file.

    Args:
        output: the video's file or folder.
        settings: all that decides what the frames are, as values of JSON.
        say: prints a line.
    """

    def __init__(
        self, output: str | os.PathLike[str], settings: Mapping[str, Any], say: Callable[[str], None] = print
    ) -> None:
        output = pathlib.Path(output)
        self.path = output.with_name(f"{output.name}.resume")
        self._settings, self._say = settings, say

    def begin(self) -> None:
        """Begins a new video; raises ``UserError`` if one that was not finished is there, or it cannot be written."""
        if any(self.path.glob("latents-*.npy")):
            raise UserError(
                f"{self.path} is there from a video that was not finished; go on with it with --resume (resume=True), "
                "remove the folder, or name another output"
            )
        check_no_other_files(self.path, _OWN_FILES)
        self.remove()  # of a video that ended within its first block
        try:
            write_manifest(self.path / _MANIFEST, self._settings)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror or error}); name another output"
            ) from error

    def go_on(self) -> None:
        """Looks at a video that was begun.

        Raises:
            FileNotFoundError: there is nothing to go on with.
            UserError: it was made with other settings, or its folder is damaged.
        """
        if not (self.path / _MANIFEST).is_file():
            raise FileNotFoundError(
                f"nothing to resume: {self.path / _MANIFEST} is not there, so the video was finished, or never begun; "
                "leave --resume (resume=True) out"
            )
        check_manifest(self.path / _MANIFEST, self._settings, f"{self.path} is of a video", "output", self._say)

    def blocks(self, kind: str) -> int:
        """How many blocks there are, from the first on: ``latents`` or ``refined``."""
        count = 0
        while self._file(kind, count).is_file():
            count += 1
        return count

    def load(self, kind: str, block: int, shape: tuple[int, ...]) -> Float[np.ndarray, "1 T h w C"]:
        """A block that is there; raises ``UserError`` if its file is damaged."""
        return load_block(self._file(kind, block), self.path, shape)

    def save(self, kind: str, block: int, latents: Float[Array, "1 T h w C"]) -> None:
        """Keeps a block; raises ``UserError`` if it cannot be written."""
        save_block(self._file(kind, block), latents, _ADVICE)

    def remove(self) -> None:
        """Removes what the run has left: the video is finished."""
        remove_own_files(self.path, _OWN_FILES, self._say)

    def _file(self, kind: str, block: int) -> pathlib.Path:
        return self.path / f"{kind}-{block:05d}.npy"
