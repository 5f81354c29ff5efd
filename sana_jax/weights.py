"""Weights on disk: a training run's checkpoints as pipelines read them, and directories of converted weights.

A checkpoint is a directory ``checkpoints/<step>`` with one sub-directory per item (``params``, ``ema``,
``opt_state``, ``progress``), written by Orbax under a temporary name and renamed when it is complete. Beside the items
lies ``manifest.json`` with the size and CRC-32 of every file, written before the rename. Restoring compares the files
with it first, because array data has no checksum of its own: a changed byte would load as a wrong number.

Nothing here is collective: any process may call any of it alone.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import PyTree
from sana_jax.errors import CheckpointError, UserError

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
TEMPORARY_MARK = ".orbax-checkpoint-tmp"  # Orbax's own; a directory with it in its name was not finished
NAMED_IN_A_MESSAGE = 5


# -- directories of steps --------------------------------------------------------------------------------------------


def checkpoint_steps(checkpoints_dir: str | os.PathLike) -> list[int]:
    """The finished checkpoints' steps in ascending order; half-written ones, and anything else, are not among them."""
    try:
        names = [entry.name for entry in os.scandir(checkpoints_dir) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def half_written_checkpoints(checkpoints_dir: str | os.PathLike) -> list[Path]:
    """Directories that an interrupted save left behind."""
    directory = Path(checkpoints_dir)
    return sorted(directory.glob(f"*{TEMPORARY_MARK}*")) if directory.is_dir() else []


def choose_checkpoint(checkpoints_dir: str | os.PathLike, step: int | None) -> int:
    """The named step if it is there, else (``step=None``) the newest.

    Raises:
      CheckpointError: there is no checkpoint, or not this one; the message lists those that exist.
    """
    steps = checkpoint_steps(checkpoints_dir)
    if not steps:
        half = half_written_checkpoints(checkpoints_dir)
        seen = f" (only the half-written {half[-1].name})" if half else ""
        raise CheckpointError(
            f"no checkpoint in {checkpoints_dir}{seen}; name a run directory that has checkpoints/<step>, "
            "or start the run from the beginning"
        )
    if step is not None and step not in steps:
        raise CheckpointError(f"no checkpoint of step {step} in {checkpoints_dir}; {_listed(steps)}, name one of them")
    return steps[-1] if step is None else step


def damaged_checkpoint(checkpoints_dir: str | os.PathLike, step: int, problem: str, verb: str) -> CheckpointError:
    """The error for a finished checkpoint that can't be used: its path, what is wrong, what else exists, what to do.

    ``verb`` says what the user was about to do with it: "resume from" or "load".
    """
    others = [other for other in checkpoint_steps(checkpoints_dir) if other != step]
    good = [o for o in others if find_damage(Path(checkpoints_dir) / str(o), checksums=False) is None]
    if good:
        advice = f"delete it and {verb} step {good[-1]}"
    else:
        advice = "delete it and start the run from the beginning"
    return CheckpointError(
        f"the checkpoint {Path(checkpoints_dir) / str(step)} (step {step}) is damaged: {problem}; "
        f"{_listed(others, 'other ')}; {advice}"
    )


def _listed(steps: Sequence[int], other: str = "") -> str:
    if not steps:
        return f"no {other}checkpoint exists"
    return f"{other}steps that exist: {', '.join(map(str, steps))}"


# -- manifest --------------------------------------------------------------------------------------------------------


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
    return _first_few(problems, "files") if problems else None


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


def _first_few(problems: list[str], kind: str) -> str:
    more = len(problems) - NAMED_IN_A_MESSAGE
    return "; ".join(problems[:NAMED_IN_A_MESSAGE]) + (f"; and {more} more {kind}" if more > 0 else "")


def one_line(error: BaseException, limit: int = 240) -> str:
    """An error's reason without line breaks and without the storage specification that tensorstore appends."""
    text = str(error)
    if code := re.search(r"os_error_code='(\d+)'", text):  # nested in three layers of paths that say no more
        what = re.search(r'Error (reading|writing) "([^"]+)"', text)
        return os.strerror(int(code[1])) + (f" while {what[1]} {what[2]}" if what else "")
    text = re.split(r" \[tensorstore_spec| See full TensorStore details", text)[0]
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


# -- trees -----------------------------------------------------------------------------------------------------------


def abstract_tree(tree: PyTree, dtype: jnp.dtype | None = None) -> PyTree:
    """Shapes, dtypes and shardings of a tree of arrays (or of ShapeDtypeStructs), as the restoring functions take them.

    A leaf without a sharding goes to this process's first device. ``dtype`` replaces the floating-point dtypes.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def describe(leaf):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            leaf = np.asarray(leaf)
        leaf_dtype = dtype if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, leaf_dtype, sharding=getattr(leaf, "sharding", None) or device)

    return jax.tree.map(describe, tree)


def tree_bytes(tree: PyTree) -> int:
    """The bytes of all arrays of a tree, each counted once however many devices hold a copy."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def tree_differences(item_dir: Path, abstract: PyTree, *, name: str = "", cast: bool = False) -> list[str]:
    """All differences between a saved tree and the one asked for: keys, shapes, dtypes.

    With ``cast`` a floating-point array may be asked for in another floating-point dtype.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    metadata = ocp.StandardCheckpointHandler().metadata(epath.Path(item_dir)).tree
    saved = {key: leaf for key, leaf in ocp.tree.to_flat_dict(metadata).items() if hasattr(leaf, "shape")}
    wanted = ocp.tree.to_flat_dict(abstract)
    differences = []
    for key in sorted(saved.keys() | wanted.keys()):
        path = "/".join((name, *key) if name else key)
        if key not in saved:
            differences.append(f"{path} {_shape(wanted[key])} is not in the checkpoint")
        elif key not in wanted:
            differences.append(f"{path} {_shape(saved[key])} is in the checkpoint only")
        else:
            floats = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in (saved[key], wanted[key]))
            same_dtype = jnp.dtype(saved[key].dtype) == jnp.dtype(wanted[key].dtype)
            if tuple(saved[key].shape) != tuple(wanted[key].shape) or not (same_dtype or (cast and floats)):
                differences.append(f"{path} is {_shape(saved[key])} in the checkpoint, not {_shape(wanted[key])}")
    return differences


def _shape(leaf) -> str:
    return f"{jnp.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def mismatch_error(path: Path, differences: list[str], advice: str) -> CheckpointError:
    """One error for all differences between a checkpoint and the network it should go into."""
    count = f"{len(differences)} difference{'s' if len(differences) > 1 else ''}"
    return CheckpointError(
        f"the checkpoint {path} does not fit this configuration, {count}: "
        f"{_first_few(differences, 'differences')}; {advice}"
    )


def restore_tree(item_dir: Path, abstract: PyTree) -> PyTree:
    """Reads one saved tree straight onto the devices that ``abstract`` names. Check files and differences first."""
    import orbax.checkpoint as ocp
    from etils import epath

    quiet_orbax()
    try:
        handler = ocp.StandardCheckpointHandler()
        return handler.restore(epath.Path(item_dir), args=ocp.args.StandardRestore(abstract_tree(abstract)))
    except Exception as error:  # Orbax raises bare Exceptions for unreadable data
        raise CheckpointError(f"reading {item_dir} failed: {one_line(error)}; check the disk and try again") from error


def tree_handler():
    """The Orbax handler that writes trees: uncompressed, since float weights shrink by 7% and take 3 times as long."""
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler(use_compression=False)


# -- orbax's voice, disk space ---------------------------------------------------------------------------------------


class _QuietOrbax(logging.Filter):
    """Lets Orbax's warnings through, not its progress, and not the failures that it logs and then raises as well."""

    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname or record.levelno == logging.WARNING


_QUIET = _QuietOrbax()


def quiet_orbax() -> None:
    """Keeps Orbax's progress chatter, and tracebacks that are raised as errors anyway, off the user's screen."""
    logger = logging.getLogger("absl")
    if _QUIET not in logger.filters:
        logger.addFilter(_QUIET)


class _IgnoreLateWrites(logging.Filter):
    """Keeps a traceback per array off the screen when a save fails.

    At the first write that fails Orbax raises and closes its event loop. The other writes then report, as late as at
    the program's end, to asyncio's logger, or find the loop closed and report to ``sys.unraisablehook``. The failure
    itself becomes a CheckpointError.
    """

    def __init__(self):
        super().__init__()
        self.previous = sys.unraisablehook

    def __call__(self, report) -> None:
        if not _is_late_write(report.exc_value):
            self.previous(report)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info:
            return not _is_late_write(record.exc_info[1])
        message = record.getMessage()
        return not (message.startswith("Task was destroyed") and f"{os.sep}orbax{os.sep}" in message)


def _is_late_write(error: BaseException | None) -> bool:
    text = str(error)
    return text == "Event loop is closed" or ("Error writing" in text and TEMPORARY_MARK in text)


_LATE_WRITES: list[_IgnoreLateWrites] = []


def quiet_failed_writes() -> None:
    """Leaves one message of a save that fails: the error that is raised."""
    if not _LATE_WRITES:
        _LATE_WRITES.append(_IgnoreLateWrites())
        sys.unraisablehook = _LATE_WRITES[0]
        logging.getLogger("asyncio").addFilter(_LATE_WRITES[0])
        warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)


def remove_partial(path: Path) -> None:
    """Removes a failed save's directory. Writes that were queued may still come in and make it again for a moment."""
    deadline, absent = time.monotonic() + 10, 0
    while absent < 3 and time.monotonic() < deadline:
        absent = 0 if path.exists() else absent + 1
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.02)


def disk_shortage(directory: str | os.PathLike, needed: int) -> str | None:
    """None if ``needed`` bytes (and 1% for bookkeeping) fit on the disk of ``directory``, else what is short."""
    place = Path(directory).absolute()
    while not place.exists():
        place = place.parent
    needed += needed // 100 + (1 << 20)
    free = shutil.disk_usage(place).free
    if free >= needed:
        return None
    return f"{needed} bytes ({needed / 1e9:.2f} GB) are needed and {free} bytes ({free / 1e9:.2f} GB) are free"


# -- for pipelines ---------------------------------------------------------------------------------------------------


def load_checkpoint_params(
    checkpoints_dir: str | os.PathLike,
    abstract_params: PyTree,
    which: Literal["ema", "params", "auto"] = "auto",
    step: int | None = None,
) -> tuple[PyTree, int, str]:
    """The weights of a training run's checkpoint; optimizer state and the other set of weights stay on disk.

    Args:
      checkpoints_dir: a run's ``checkpoints`` directory.
      abstract_params: tree of ShapeDtypeStructs. Their shardings say where the weights go (none: the first device);
        a floating-point dtype other than the saved one casts.
      which: "ema" for the averaged weights, "params" for the trained ones, "auto" for the averaged if the run has them.
      step: which checkpoint; None for the newest that is complete. A damaged one is an error, not skipped.

    Returns:
      (params, step, "ema" or "params").

    Raises:
      FileNotFoundError: ``checkpoints_dir`` does not exist.
      CheckpointError: no checkpoint, a damaged one, or one that does not fit ``abstract_params``.
    """
    if which not in ("ema", "params", "auto"):
        raise UserError(f"which={which!r} is not one of 'ema', 'params', 'auto'")
    directory = Path(checkpoints_dir)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}; name a run directory that has checkpoints/<step>")
    step = choose_checkpoint(directory, step)
    step_dir = directory / str(step)
    try:
        items = saved_items(step_dir)
    except ValueError as error:
        raise damaged_checkpoint(directory, step, str(error), "load") from None
    if which == "ema" and "ema" not in items:
        raise CheckpointError(f"the checkpoint {step_dir} was saved without averaged weights (ema); ask for 'params'")
    if which == "auto":
        which = "ema" if "ema" in items else "params"
    if problem := find_damage(step_dir, [which]):
        raise damaged_checkpoint(directory, step, problem, "load")
    if differences := tree_differences(step_dir / which, abstract_params, name=which, cast=True):
        raise mismatch_error(step_dir, differences, "use the network configuration of the run (its config.json)")
    return restore_tree(step_dir / which, abstract_params), step, which


# -- converted weights -----------------------------------------------------------------------------------------------


def save_params(directory: str | os.PathLike, params: PyTree) -> int:
    """Writes one component's weights as a new directory: under a temporary name first, then renamed.

    Args:
      directory: must not exist yet, or be empty; its parents are made.
      params: nested dict of arrays.

    Returns:
      Bytes on disk.

    Raises:
      CheckpointError: the directory has something in it, the disk is too small, or a write failed; nothing is left.
    """
    import orbax.checkpoint as ocp

    if jax.process_count() > 1:
        raise ValueError(f"save_params is for a single process, not one of {jax.process_count()}")
    quiet_orbax()
    quiet_failed_writes()
    final = Path(directory).absolute()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise CheckpointError(f"{directory} exists already; delete it or name another directory")
    if shortage := disk_shortage(final, tree_bytes(params)):
        raise CheckpointError(f"not writing {directory}: {shortage}; free some space or name another disk")
    temporary = final.with_name(f".{final.name}.half-written")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with ocp.Checkpointer(tree_handler()) as checkpointer:
            checkpointer.save(temporary, args=ocp.args.PyTreeSave(params), force=True)
        written = write_manifest(temporary, [e.name for e in temporary.iterdir() if not _is_bookkeeping(e.name)])
        os.replace(temporary, final)
    except BaseException as error:
        for left in (temporary, temporary.with_name(temporary.name + TEMPORARY_MARK)):
            remove_partial(left)
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"writing {directory} failed: {one_line(error)}; nothing was left there, free some space or name another "
            "disk, and try again"
        ) from error
    return written


def load_params(directory: str | os.PathLike, abstract_params: PyTree) -> PyTree:
    """Reads what ``save_params`` wrote; shardings and casts as in ``load_checkpoint_params``.

    Raises:
      FileNotFoundError: there is no such directory.
      CheckpointError: files are damaged, or the tree does not fit.
    """
    path = Path(directory)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no directory of weights {path}")
    if problem := find_damage(path):
        raise CheckpointError(f"the weights in {path} are damaged: {problem}; delete them and convert again")
    if differences := tree_differences(path, abstract_params, cast=True):
        raise mismatch_error(path, differences, "convert the checkpoint that belongs to this configuration")
    return restore_tree(path, abstract_params)


def _is_bookkeeping(name: str) -> bool:
    return name in ("_CHECKPOINT_METADATA", "commit_success.txt", MANIFEST_NAME)
