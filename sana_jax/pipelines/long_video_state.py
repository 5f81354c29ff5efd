"""What a long video leaves beside its file after every block, so that it can go on after any end: ``out.mp4.resume/``.

::

    state.npz               the network's state after the last whole block, the settings, and where it was computed
    prompts.json            which prompt acts from which block on, those that a callback gave among them
    latents-00000.npy, ...  every block's clean latents (1, T, h, w, C); 4 MB each at 480p

Each file is replaced atomically. The autoencoder's state is not written: at 480p it has 3.8 GB in float32, which would
have to be written anew after every block of 2.5 seconds. Decoding as many latents as the decoder looks back gives it
again, bit for bit on the same device, and the file's own frames where the end came before they were all there.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, PyTree
from sana_jax.errors import UserError
from sana_jax.files import atomic_file, read_json, write_json
from sana_jax.pipelines.prompt_schedule import BlockPrompts
from sana_jax.pipelines.resumed_folder import (
    as_json,
    check_no_other_files,
    computing_device,
    damaged_file,
    remove_own_files,
    save_block,
    say_other_device,
    told_differences,
)

_STATE, _PROMPTS = "state.npz", "prompts.json"
_OWN_FILES = (_STATE, _PROMPTS, "latents-*.npy")
_ADVICE = "the video is there as far as it has come: make room on the disk and go on with --resume (resume=True)"


class Progress(NamedTuple):
    """How far a video has come: whole blocks, and the network's state after them."""

    blocks: int
    state: PyTree


class ResumeFolder:
    """The folder beside a video's file.

    Args:
        output: the video's file or folder.
        settings: all but the prompts that decides what the frames are, as values of JSON.
        say: prints a line.
    """

    def __init__(
        self, output: str | os.PathLike[str], settings: Mapping[str, Any], say: Callable[[str], None] = print
    ) -> None:
        output = pathlib.Path(output)
        self.path = output.with_name(f"{output.name}.resume")
        self._settings, self._say = as_json(settings), say

    def begin(self) -> None:
        """Raises ``UserError`` if a video that was not finished is there, or files that no video has left."""
        if (self.path / _STATE).is_file():
            raise UserError(
                f"{self.path} is there from a video that was not finished; go on with it with --resume (resume=True), "
                "remove the folder, or name another output"
            )
        check_no_other_files(self.path, _OWN_FILES)
        self.remove()  # of a video that ended within its first block

    def save(self, block: int, latents: Float[Array, "1 T h w C"], state: PyTree) -> None:
        """Notes that a block is whole; until the last file is renamed, what was there before holds.

        Raises:
            UserError: it cannot be written.
        """
        arrays = {f"leaf{index}": _to_bits(leaf) for index, leaf in enumerate(jax.tree.leaves(state))}
        notes = {"blocks": block + 1, "settings": self._settings, "computed_on": computing_device()}
        save_block(self._latents(block), latents, _ADVICE)
        try:
            with atomic_file(self.path / _STATE) as file:
                np.savez(file, notes=np.array(json.dumps(notes)), **arrays)
        except OSError as error:
            raise UserError(
                f"writing {self.path} failed ({error.strerror or error}) after block {block + 1}; {_ADVICE}"
            ) from error

    def save_prompts(self, prompts: BlockPrompts) -> None:
        """Notes which prompt acts when; to be called before the first block that they decide is saved.

        Raises:
            UserError: it cannot be written.
        """
        try:
            write_json(self.path / _PROMPTS, prompts.to_dict())
        except OSError as error:
            raise UserError(f"writing {self.path} failed ({error.strerror or error}); {_ADVICE}") from error

    def load_prompts(self) -> BlockPrompts:
        """What was noted last; raises ``UserError`` if the file is missing or damaged."""
        path = self.path / _PROMPTS
        try:
            return BlockPrompts.from_dict(read_json(path))
        except (ValueError, FileNotFoundError) as error:
            raise self._damaged(path, error) from error

    def load(self, abstract_state: PyTree) -> Progress:
        """Where an earlier video has ended; a line says if it was on another device.

        Args:
            abstract_state: the state's shapes and dtypes.

        Raises:
            FileNotFoundError: there is nothing to go on with.
            UserError: it was made with other settings, or is damaged.
        """
        path = self.path / _STATE
        if not path.is_file():
            raise FileNotFoundError(
                f"nothing to resume: {path} is not there, so the video was finished, or ended within its first block; "
                "leave --resume (resume=True) out"
            )
        try:
            with np.load(path, allow_pickle=False) as arrays:
                notes = json.loads(str(arrays["notes"]))
                stored = [arrays[f"leaf{index}"] for index in range(len(arrays.files) - 1)]
            blocks, settings = int(notes["blocks"]), dict(notes["settings"])
        except Exception as error:  # zip, NumPy and JSON have each their own
            raise self._damaged(path, error) from error
        self._check(settings)
        leaves, structure = jax.tree.flatten(abstract_state)
        fits = len(leaves) == len(stored) and all(
            own.shape == leaf.shape and own.dtype == _bits_of(leaf.dtype) for own, leaf in zip(stored, leaves)
        )
        if not fits:
            raise self._damaged(path, "a state of another shape")
        say_other_device(self.path, notes.get("computed_on"), self._say)
        own = [jnp.asarray(array.view(leaf.dtype)) for array, leaf in zip(stored, leaves)]
        return Progress(blocks, jax.tree.unflatten(structure, own))

    def latents(self, block: int) -> Float[np.ndarray, "1 T h w C"]:
        """A block's clean latents; raises ``UserError`` if the file is missing or damaged."""
        path = self._latents(block)
        try:
            return np.load(path, allow_pickle=False)
        except Exception as error:
            raise self._damaged(path, error) from error

    def remove(self) -> None:
        """Removes what the run has left: the video is finished."""
        remove_own_files(self.path, _OWN_FILES, self._say)

    def _latents(self, block: int) -> pathlib.Path:
        return self.path / f"latents-{block:05d}.npy"

    def _check(self, before: Mapping[str, Any]) -> None:
        differ = told_differences(before, self._settings)
        if differ:
            raise UserError(
                f"{self.path} is of a video with other settings: {differ}; give the same, or name another output"
            )

    def _damaged(self, path: pathlib.Path, reason: Any) -> UserError:
        return damaged_file(path, self.path, reason)


def _bits_of(dtype: Any) -> np.dtype:
    """The dtype that NumPy's files hold in place of one that they do not know (bfloat16)."""
    dtype = np.dtype(dtype)
    return dtype if dtype.kind in "fiub" else np.dtype(f"u{dtype.itemsize}")


def _to_bits(leaf: Array) -> np.ndarray:
    array = np.asarray(leaf)
    return array.view(_bits_of(array.dtype))
