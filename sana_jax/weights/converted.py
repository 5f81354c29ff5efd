"""One component's weights as a directory of their own: what a converted model directory holds."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kernels.typing import PyTree
from sana_jax.errors import CheckpointError
from sana_jax.files import remove_partial
from sana_jax.weights.lazy import LazyArray, in_groups, write_tree
from sana_jax.weights.manifest import MANIFEST_NAME, find_damage, write_manifest
from sana_jax.weights.messages import one_line
from sana_jax.weights.quiet import TEMPORARY_MARK, quiet_failed_writes, quiet_orbax
from sana_jax.weights.safetensors_files import TensorInfo
from sana_jax.weights.trees import (
    check_folder_name,
    disk_shortage,
    mismatch_error,
    restore_tree,
    saved_structure,
    tree_bytes,
    tree_differences,
)


def save_params(directory: str | os.PathLike, params: PyTree) -> int:
    """Writes one component's weights as a new directory: under a temporary name first, then renamed.

    Args:
      directory: must not exist yet, or be empty; its parents are made.
      params: nested dict of arrays, or of LazyArrays, which are read and written one at a time.

    Returns:
      Bytes on disk.

    Raises:
      CheckpointError: the directory has something in it, the disk is too small, or a write failed; nothing is left.
      UserError: Orbax cannot write to a directory of this name.
    """
    if jax.process_count() > 1:
        raise ValueError(f"save_params is for a single process, not one of {jax.process_count()}")
    quiet_orbax()
    quiet_failed_writes()
    final = Path(directory).absolute()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise CheckpointError(f"{directory} exists already; delete it or name another directory")
    check_folder_name(directory)
    if shortage := disk_shortage(final, tree_bytes(params)):
        raise CheckpointError(f"not writing {directory}: {shortage}; free some space or name another disk")
    temporary = final.with_name(f".{final.name}.half-written")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        write_tree(temporary, params)
        written = write_manifest(temporary, [e.name for e in temporary.iterdir() if not _is_bookkeeping(e.name)])
        os.replace(temporary, final)
    except BaseException as error:
        for left in (temporary, temporary.with_name(temporary.name + TEMPORARY_MARK)):
            remove_partial(left)
        if not isinstance(error, Exception):
            raise
        if isinstance(error, CheckpointError):  # a LazyArray that could not be read
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
    check_saved(directory, abstract_params)
    return restore_tree(Path(directory), abstract_params)


def check_saved(directory: str | os.PathLike, abstract_params: PyTree) -> None:
    """Raises what ``load_params`` raises, without reading arrays."""
    path = Path(directory)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no directory of weights {path}")
    if problem := find_damage(path):
        raise CheckpointError(f"the weights in {path} are damaged: {problem}; delete them and convert again")
    from sana_jax.quantization.trees import stored_formats  # which imports modules of this package

    if not stored_formats(abstract_params):
        refuse_quantised(path, saved_structure(path))
    if differences := tree_differences(path, abstract_params, cast=True):
        raise mismatch_error(path, differences, "convert the checkpoint that belongs to this configuration")


def refuse_quantised(directory: str | os.PathLike, saved: PyTree) -> None:
    """Raises ``CheckpointError`` where ``saved``, the tree of a directory of weights, has quantised kernels."""
    from sana_jax.quantization.trees import stored_formats  # which imports modules of this package

    if stored := stored_formats(saved):
        raise CheckpointError(
            f"the weights in {directory} are quantised, {len(stored)} kernels in "
            f"{', '.join(sorted(set(stored.values())))}; plain ones are needed here: name the model that they were "
            "made of"
        )


def lazy_params_of_saved(directory: str | os.PathLike, abstract_params: PyTree) -> PyTree:
    """``load_params`` as LazyArrays in the dtypes that are stored."""
    check_saved(directory, abstract_params)
    return lazy_saved_tree(directory)


def lazy_saved_tree(directory: str | os.PathLike) -> PyTree:
    """What ``save_params`` or a training run wrote, as a tree of LazyArrays in the dtypes that are stored.

    Files are compared with their manifest by the caller (``find_damage``).

    Raises:
      CheckpointError: it can't be read.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    quiet_orbax()
    path = epath.Path(Path(directory).absolute())  # Orbax takes no relative paths
    try:
        metadata = ocp.StandardCheckpointHandler().metadata(path).tree
        saved = ocp.tree.to_flat_dict(metadata)
    except Exception as error:  # Orbax raises bare Exceptions for unreadable data
        raise CheckpointError(f"reading {directory} failed: {one_line(error)}; convert the checkpoint again") from error

    sizes = {
        keys: TensorInfo(np.dtype(leaf.dtype), tuple(leaf.shape))
        for keys, leaf in saved.items()
        if hasattr(leaf, "shape")
    }
    reader = _GroupReader(path, {keys: _num_bytes(info) for keys, info in sizes.items()})
    leaves = {
        keys: LazyArray(info.shape, info.dtype, functools.partial(reader.read, keys)) for keys, info in sizes.items()
    }
    return ocp.tree.from_flat_dict(leaves)


class _GroupReader:
    """Reads leaves of a saved tree as NumPy arrays, small ones together with their neighbours; keeps the last group."""

    def __init__(self, path: Any, sizes: dict[tuple[str, ...], int]) -> None:
        self._path = path
        self._groups = {keys: group for group in in_groups(sizes, sizes.__getitem__) for keys in group}
        self._arrays: dict[tuple[str, ...], np.ndarray] = {}

    def read(self, keys: tuple[str, ...]) -> np.ndarray:
        import orbax.checkpoint as ocp

        if keys not in self._arrays:
            self._arrays = {}  # frees the last group before the next one is read
            group = self._groups[keys]
            item = ocp.tree.from_flat_dict(dict.fromkeys(group, 0))
            arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            restore = ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
            try:
                self._arrays = ocp.tree.to_flat_dict(ocp.PyTreeCheckpointHandler().restore(self._path, args=restore))
            except Exception as error:  # Orbax raises bare Exceptions for unreadable data
                raise CheckpointError(f"reading {self._path} failed: {one_line(error)}; check the disk") from error
        return self._arrays.pop(keys)


def _num_bytes(info: TensorInfo) -> int:
    return int(np.prod(info.shape, dtype=np.int64)) * info.dtype.itemsize


def _is_bookkeeping(name: str) -> bool:
    return name in ("_CHECKPOINT_METADATA", "commit_success.txt", MANIFEST_NAME)
