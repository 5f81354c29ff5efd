"""What a refinement leaves after every block, so that it can go on after any end.

::

    manifest.json          all that decides what the refined latents are, and where they were computed
    block-00000.npy, ...   every block's refined latents (B, T, h, w, C), float32; 1.4 MB each at 704x1280
    first-stage.npz        where the pipeline has made both stages, the first one's latents and what decides them

Each file appears whole or not at all, the manifest first. The network's keys and values are not written: at 704x1280
they take 0.7 GB per frame in bfloat16, 7.6 GB in all after the fourth block. Reading a block again gives its own back,
bit for bit on the same device, for a quarter of the work that refining it took.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kernels.typing import Array, Float
from sana_jax.errors import UserError
from sana_jax.files import atomic_file
from sana_jax.pipelines.resumed_folder import (
    as_json,
    check_manifest,
    damaged_file,
    load_block,
    save_block,
    told_differences,
    write_manifest,
)

_MANIFEST, _FIRST_STAGE = "manifest.json", "first-stage.npz"


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
        self._settings = as_json(settings)
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
        what = f"checkpoint_dir {self.path} is of a refinement"
        check_manifest(self.path / _MANIFEST, self._settings, what, "directory", self._say)
        blocks: list[np.ndarray] = []
        while len(blocks) < len(shapes) and self._file(len(blocks)).exists():
            blocks.append(load_block(self._file(len(blocks)), self.path, shapes[len(blocks)]))
        return blocks

    def save(self, block: int, latents: Float[Array, "B T h w C"]) -> None:
        """Keeps a refined block; until its file is renamed, what was there before holds.

        Raises:
            UserError: it cannot be written.
        """
        advice = "the blocks before it are there: make room on the disk and call again with the same arguments to go on"
        save_block(self._file(block), latents, advice)

    def _begin(self) -> None:
        check_new(self.path)
        try:
            write_manifest(self.path / _MANIFEST, self._settings)
        except OSError as error:
            raise UserError(
                f"checkpoint_dir {self.path} cannot be written ({error.strerror or error}); name another directory"
            ) from error

    def _file(self, block: int) -> pathlib.Path:
        return self.path / f"block-{block:05d}.npy"


class FirstStage:
    """The first stage's latents, kept beside the blocks of their refinement.

    Args:
        path: the refinement's folder.
        settings: all that decides what the latents are, as values of JSON.
        say: prints a line.
    """

    def __init__(
        self, path: str | os.PathLike[str], settings: Mapping[str, Any], say: Callable[[str], None] = print
    ) -> None:
        self._folder = pathlib.Path(path)
        self._file = self._folder / _FIRST_STAGE
        self._settings = as_json(settings)
        self._say = say

    def load(self, shape: tuple[int, ...]) -> Float[np.ndarray, "B T h w C"] | None:
        """What an earlier call has sampled; None where there is nothing yet.

        Raises:
            UserError: latents of another call, which is told with all differences; a damaged file, or a folder that is
                something else, a refinement of latents that were given among them.
        """
        if not self._file.is_file():
            # The latents are kept before a refinement of them begins: one without them is not of this call.
            if (self._folder / _MANIFEST).exists():
                raise UserError(
                    f"checkpoint_dir {self._folder} is of a refinement without its first stage: it has {_MANIFEST} and "
                    f"no {_FIRST_STAGE}, as SanaWMRefiner alone leaves it; name a new or empty directory"
                )
            check_new(self._folder)
            return None
        try:
            with np.load(self._file, allow_pickle=False) as arrays:
                before, latents = json.loads(str(arrays["settings"])), arrays["latents"]
        except Exception as error:  # zip, NumPy and JSON have each their own
            raise damaged_file(self._file, self._folder, error) from error
        if differ := told_differences(before, self._settings):
            raise UserError(
                f"checkpoint_dir {self._folder} is of a video with another first stage: {differ}; give the same, or "
                "name another directory"
            )
        if latents.shape != shape or latents.dtype != np.float32:
            raise damaged_file(self._file, self._folder, f"{latents.dtype} of shape {latents.shape}")
        self._say(f"first stage: taken from {self._file}, where an earlier call has left it")
        return latents

    def save(self, latents: Float[Array, "B T h w C"]) -> None:
        """Keeps the latents; raises ``UserError`` if they cannot be written."""
        settings = np.array(json.dumps(self._settings))
        try:
            with atomic_file(self._file) as file:
                np.savez(file, settings=settings, latents=np.asarray(latents, np.float32))
        except OSError as error:
            raise UserError(
                f"checkpoint_dir {self._folder} cannot be written ({error.strerror or error}); name another directory"
            ) from error


def check_new(path: pathlib.Path) -> None:
    """Raises ``UserError`` for a place that is neither new nor empty; what a refinement may begin with is nothing."""
    own = (f".{_MANIFEST}.", f".{_FIRST_STAGE}.")  # of one that was ended while it wrote
    if path.exists() and (
        not path.is_dir() or any(file.name != _FIRST_STAGE and not file.name.startswith(own) for file in path.iterdir())
    ):
        raise UserError(
            f"checkpoint_dir {path} is no refinement's: it has no {_MANIFEST} and is not empty; name a new or "
            "empty directory"
        )
