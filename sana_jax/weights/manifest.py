"""``manifest.json``: the size and CRC-32 of every file of a checkpoint, and the search for damage with it."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sana_jax.weights.messages import first_few, one_line

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1


def write_manifest(directory: Path, names: Iterable[str] | None = None) -> int:
    """Records the size and CRC-32 of every file under ``directory`` (or under these entries of it).

    Orbax's own bookkeeping at the top of a checkpoint is left out: it changes after this and carries no weights.

    Returns:
      The number of bytes that the files hold.
    """
    tops = sorted(directory.iterdir()) if names is None else [directory / name for name in sorted(names)]
    files = [f for top in tops for f in ([top] if top.is_file() else sorted(top.rglob("*"))) if f.is_file()]
    with ThreadPoolExecutor(_threads()) as pool:
        entries = dict(zip((f.relative_to(directory).as_posix() for f in files), pool.map(_measure, files)))
    manifest = {"version": MANIFEST_VERSION, "crc32_of_files": _crc_of(entries), "files": entries}
    text = json.dumps(manifest, indent=1)
    with open(directory / MANIFEST_NAME, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return sum(entry["bytes"] for entry in entries.values())


def read_manifest(directory: Path) -> dict[str, dict[str, int]]:
    """What ``write_manifest`` recorded: file name -> {"bytes", "crc32"}. Raises ValueError if it can't."""
    try:
        manifest = json.loads((directory / MANIFEST_NAME).read_text())
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST_NAME} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{MANIFEST_NAME} can't be read ({one_line(error)})") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{MANIFEST_NAME} is not a list of files")
    if manifest.get("version") != MANIFEST_VERSION:
        raise ValueError(f"{MANIFEST_NAME} has version {manifest.get('version')}, this is {MANIFEST_VERSION}")
    if manifest.get("crc32_of_files") != _crc_of(manifest["files"]):
        raise ValueError(f"{MANIFEST_NAME} has changed since it was written")
    return manifest["files"]


def saved_items(directory: Path) -> set[str]:
    """The items that were saved in a checkpoint, whether or not their directories are still there."""
    return {name.split("/")[0] for name in read_manifest(directory)}


def find_damage(
    directory: Path,
    items: Iterable[str] | None = None,
    *,
    checksums: bool = True,
    part: tuple[int, int] = (0, 1),
) -> str | None:
    """Compares files with their manifest.

    Args:
      directory: a checkpoint's step directory, or a directory of converted weights.
      items: only these items of a checkpoint (None: everything).
      checksums: also read every file and compare its CRC-32; without, only names and sizes are compared.
      part: (index, count): of the files to be read, only every count-th, so that processes can share the work.

    Returns:
      None if all is well, else what is wrong, in words.
    """
    try:
        files = read_manifest(directory)
    except ValueError as error:
        return str(error)
    if items is not None:
        files = {name: entry for name, entry in files.items() if name.split("/")[0] in set(items)}
    problems, whole = [], []
    gone = {top for top in {name.split("/")[0] for name in files} if not (directory / top).exists()}
    problems += [f"{top} is missing" for top in sorted(gone)]
    for name, entry in files.items():
        if name.split("/")[0] in gone:
            continue
        try:
            size = (directory / name).stat().st_size
        except OSError:
            problems.append(f"{name} is missing")
            continue
        if size != entry["bytes"]:
            problems.append(f"{name} has {size} bytes, not {entry['bytes']}")
        else:
            whole.append(name)
    if checksums and not problems:
        mine = whole[part[0] :: part[1]]
        with ThreadPoolExecutor(_threads()) as pool:
            for name, found in zip(mine, pool.map(lambda name: _try_measure(directory / name), mine)):
                if isinstance(found, str):
                    problems.append(f"{name} can't be read ({found})")
                elif found != files[name]:
                    problems.append(f"the contents of {name} have changed since they were written")
    return first_few(problems, "files") if problems else None


def _crc_of(entries: dict) -> int:
    return zlib.crc32(json.dumps(entries, sort_keys=True).encode())


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


def _measure(path: Path) -> dict[str, int]:
    crc, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 23):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": crc}


def _try_measure(path: Path) -> dict[str, int] | str:
    try:
        return _measure(path)
    except OSError as error:
        return one_line(error)
