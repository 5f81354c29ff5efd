"""What folders that a run goes on from have in common: telling runs apart, blocks, and files that cannot be read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kernels.typing import Array, Float
from sana_jax.errors import UserError, reason_of
from sana_jax.files import atomic_file, read_json, write_json

_FORMAT = 2  # 1 said less of the networks: not how they are quantised, nor which autoencoder draws


# what is told apart by digests, which say nothing to a user
_ARRAYS = {
    "image": "the image differs",
    "poses": "the camera's path differs",
    "intrinsics": "the lens (intrinsics) differs",
    "latents": "the latents differ",
    "noise": "the noise differs",
    "prompt_embeds": "the embeddings of the prompt differ",
    "negative_prompt_embeds": "the embeddings of the negative prompt differ",
}
_CONFIGURATIONS = ("transformer", "sampler")  # written as Python writes a dataclass


def told_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """All settings in which the run of the folder and this one differ, in words; empty where there are none."""
    names = [*now, *(name for name in before if name not in now)]
    pairs = ((name, before.get(name), now.get(name)) for name in names)
    return "; ".join(_told_difference(*pair) for pair in pairs if pair[1] != pair[2])


def _told_difference(name: str, before: Any, now: Any) -> str:
    """Of arrays that they differ, of configurations which fields do, of everything else how."""
    if name in _ARRAYS:
        return _ARRAYS[name]
    if name.removeprefix("refiner ") in _CONFIGURATIONS and isinstance(before, str) and isinstance(now, str):
        there, here = (set(text.partition("(")[2].removesuffix(")").split(", ")) for text in (before, now))
        only = [", ".join(sorted(fields)) for fields in (there - here, here - there)]
        if all(only) and before.partition("(")[0] == now.partition("(")[0]:
            return f"{name} with {only[0]} there and {only[1]} here"
    return f"{name} {before!r} there and {now!r} here"


def damaged_file(path: pathlib.Path, folder: pathlib.Path, reason: Any) -> UserError:
    """The error about a file of the folder that cannot be gone on from."""
    return UserError(f"{path} is damaged ({reason_of(reason)}); remove {folder} and begin anew")


def write_manifest(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Writes what a run's folder says of it: its settings and where it computes.

    Raises:
        OSError: it cannot be written.
    """
    write_json(path, {"format": _FORMAT, "computed_on": computing_device(), "settings": settings})


def check_manifest(
    path: pathlib.Path, settings: Mapping[str, Any], what: str, advice: str, say: Callable[[str], None]
) -> None:
    """Compares a run's settings with those of the folder that ``path`` lies in; another device is said.

    Raises:
        UserError: ``what`` is of a run with other settings, which are told, or the file is damaged.
    """
    folder, manifest = path.parent, read_json(path)
    before = manifest.get("settings")
    if manifest.get("format") != _FORMAT or not isinstance(before, dict):
        raise damaged_file(path, folder, "it describes no run of this version")
    if differ := told_differences(before, as_json(settings)):
        raise UserError(f"{what} with other settings: {differ}; give the same, or name another {advice}")
    say_other_device(folder, manifest.get("computed_on"), say)


def say_other_device(folder: pathlib.Path, before: str | None, say: Callable[[str], None]) -> None:
    """Prints a line where a run goes on on another device than ``before``, or with another version of JAX."""
    if before != (here := computing_device()):
        say(
            f"{folder} comes from {before or 'a device that it does not name'} and goes on on {here}: later blocks "
            "will not be the same to the last bit as if it had stayed there"
        )


def check_no_other_files(folder: pathlib.Path, patterns: Sequence[str]) -> None:
    """Raises ``UserError`` if a run's folder has anything that no run has left, or is a file; it may be missing.

    ``patterns`` are the names of a run's files.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and a folder is needed there: move it, or name another output")
    own = set(_own_files(folder, patterns))
    if others := sorted(path.name for path in folder.glob("*") if path not in own):
        more = "" if len(others) == 1 else f" and {len(others) - 1} more"
        raise UserError(
            f"{folder} has files that no video of this kind has left, {others[0]}{more}: move them away, or name "
            "another output"
        )


def remove_own_files(folder: pathlib.Path, patterns: Sequence[str], say: Callable[[str], None] = print) -> None:
    """Removes what a run has left, and the folder; files that are not its own stay, which a line says."""
    for path in _own_files(folder, patterns):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
    if folder.is_dir():
        say(f"{folder} stays, since it has files that are not of this video")


def _own_files(folder: pathlib.Path, patterns: Sequence[str]) -> Iterator[pathlib.Path]:
    """Those of these names, whole or under the temporary name that they are written with."""
    for pattern in patterns:
        yield from folder.glob(pattern)
        yield from folder.glob(f".{pattern}.*.tmp")


def save_block(path: pathlib.Path, latents: Float[Array, "B T h w C"], advice: str) -> None:
    """Writes a block's latents in float32; until the file is renamed, what was there before holds.

    Raises:
        UserError: it cannot be written; ``advice`` says what to do then.
    """
    try:
        with atomic_file(path) as file:
            np.save(file, np.asarray(latents, np.float32))
    except OSError as error:
        raise UserError(f"writing {path} failed ({error.strerror or error}); {advice}") from error


def load_block(path: pathlib.Path, folder: pathlib.Path, shape: tuple[int, ...]) -> Float[np.ndarray, "B T h w C"]:
    """A block's latents; raises ``UserError`` if they cannot be read or are others."""
    try:
        latents = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy has several
        raise damaged_file(path, folder, error) from error
    if latents.shape != tuple(shape) or latents.dtype != np.float32:
        raise damaged_file(path, folder, f"{latents.dtype} of shape {latents.shape}, not float32 of {tuple(shape)}")
    return latents


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


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a file gives them back; NumPy's numbers, which calls take too, become Python's."""
    return json.loads(json.dumps(settings, default=lambda value: value.item()))


def computing_device() -> str:
    """What a run computes on, for telling whether another one will give the same last bits."""
    return f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
