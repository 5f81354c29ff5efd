"""Files that appear whole or not at all, and JSON files that are not trusted."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from sana_jax.errors import UserError

_LONGEST_JSON = 1 << 26  # bytes; an index of 1,400 tensors takes 100,000


def check_can_write(path: str | os.PathLike[str], name: str | None = None) -> None:
    """Raises an error unless files can be made where ``path`` is to be; nothing is left there.

    A file is made, since permissions alone do not tell: an administrator has them in /proc too. Folders that are
    missing are made when the output is written; the nearest one that is there is tried.

    Args:
        path: of a file, or of a folder, which ends in a slash and may be there already.
        name: what the message calls it; None for the path.

    Raises:
        UserError: they cannot be made there.
    """
    place, name = pathlib.Path(path).absolute(), os.fspath(path) if name is None else name
    if os.fspath(path).endswith(("/", os.sep)):
        place = place / "file"
    try:
        above = next(folder for folder in place.parents if folder.exists())
        if not above.is_dir():
            raise UserError(f"cannot write {name} ({above} is a file, not a folder); choose another folder")
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(f"cannot write {name} ({error.strerror}); choose a folder that can be written to") from error


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a new file for ``path`` under a temporary name beside it, and renames it when the block ends well.

    Missing folders are made. After an error nothing is left, and an older ``path`` is as it was.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A new directory for ``path`` under a temporary name beside it, renamed when the block ends well.

    After an error nothing is left. ``path`` must not exist, or be an empty directory.

    Raises:
        OSError: it cannot be written.
    """
    path = pathlib.Path(path).absolute()
    temporary = path.with_name(f".{path.name}.half-written-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.exists():
            remove_partial(temporary)


def remove_partial(path: pathlib.Path) -> None:
    """Removes a failed save's directory. Writes that were queued may still come in and make it again for a moment."""
    deadline, absent = time.monotonic() + 10, 0
    while absent < 3 and time.monotonic() < deadline:
        absent = 0 if path.exists() else absent + 1
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.02)


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented; the file appears whole or not at all."""
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it holds something else.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; name a directory that has it, or download it again")
    advice = "download or write it again"
    if (size := path.stat().st_size) > _LONGEST_JSON:
        raise UserError(f"{path} has {size} bytes; allowed are {_LONGEST_JSON}: {advice}")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): {advice}") from error
    if text.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer to the file, not the file: fetch it with git lfs pull")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); allowed is JSON: {advice}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; allowed is a JSON object: {advice}")
    return content


def natural_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """A key to sort names by, with which numbers in names are counted as numbers: ``f2`` comes before ``f10``."""
    parts, number = [], ""
    for letter in f"{name}\0":
        if letter.isascii() and letter.isdigit():
            number += letter
            continue
        if number:
            parts.append((0, int(number), number))
            number = ""
        parts.append((1, ord(letter), ""))
    return tuple(parts)
