"""Trees of arrays on disk, as Orbax writes and reads them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import PyTree
from sana_jax.errors import CheckpointError, UserError
from sana_jax.weights.messages import describe_array, first_few, one_line
from sana_jax.weights.quiet import quiet_orbax
from sana_jax.weights.rules import nested


def abstract_tree(tree: PyTree, dtype: jnp.dtype | None = None) -> PyTree:
    """Shapes, dtypes and shardings of a tree of arrays (or of ShapeDtypeStructs), as the restoring functions take them.

    A leaf without a sharding, or with one on a mesh without devices (what is traced inside ``jax.set_mesh`` has it),
    goes to this process's first device. ``dtype`` replaces the floating-point dtypes.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def describe(leaf):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            leaf = np.asarray(leaf)
        leaf_dtype = dtype if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
        sharding = getattr(leaf, "sharding", None)
        if sharding is None or isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
            sharding = device
        return jax.ShapeDtypeStruct(leaf.shape, leaf_dtype, sharding=sharding)

    return jax.tree.map(describe, tree)


def tree_bytes(tree: PyTree) -> int:
    """The bytes of all arrays of a tree, each counted once however many devices hold a copy."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def saved_structure(item_dir: Path) -> PyTree:
    """Shapes and dtypes of a saved tree: nested dictionaries of ShapeDtypeStructs."""
    import orbax.checkpoint as ocp
    from etils import epath

    # Orbax takes no relative paths.
    metadata = ocp.StandardCheckpointHandler().metadata(epath.Path(item_dir.absolute())).tree
    arrays = {path: leaf for path, leaf in ocp.tree.to_flat_dict(metadata).items() if hasattr(leaf, "shape")}
    shapes = {path: jax.ShapeDtypeStruct(tuple(leaf.shape), jnp.dtype(leaf.dtype)) for path, leaf in arrays.items()}
    return nested(shapes)


def tree_differences(item_dir: Path, abstract: PyTree, *, name: str = "", cast: bool = False) -> list[str]:
    """All differences between a saved tree and the one asked for: keys, shapes, dtypes.

    With ``cast`` a floating-point array may be asked for in another floating-point dtype.
    """
    import orbax.checkpoint as ocp

    saved = ocp.tree.to_flat_dict(saved_structure(item_dir))
    wanted = ocp.tree.to_flat_dict(abstract)
    differences = []
    for key in sorted(saved.keys() | wanted.keys()):
        path = "/".join((name, *key) if name else key)
        if key not in saved:
            differences.append(f"{path} {describe_array(wanted[key])} is not in the checkpoint")
        elif key not in wanted:
            differences.append(f"{path} {describe_array(saved[key])} is in the checkpoint only")
        else:
            floats = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in (saved[key], wanted[key]))
            same_dtype = jnp.dtype(saved[key].dtype) == jnp.dtype(wanted[key].dtype)
            if tuple(saved[key].shape) != tuple(wanted[key].shape) or not (same_dtype or (cast and floats)):
                differences.append(
                    f"{path} is {describe_array(saved[key])} in the checkpoint, not {describe_array(wanted[key])}"
                )
    return differences


def mismatch_error(path: Path, differences: list[str], advice: str) -> CheckpointError:
    """One error for all differences between a checkpoint and the network it should go into."""
    count = f"{len(differences)} difference{'s' if len(differences) > 1 else ''}"
    return CheckpointError(
        f"the checkpoint {path} does not fit this configuration, {count}: "
        f"{first_few(differences, 'differences')}; {advice}"
    )


def restore_tree(item_dir: Path, abstract: PyTree) -> PyTree:
    """Reads one saved tree straight onto the devices that ``abstract`` names. Check files and differences first.

    Raises:
        CheckpointError: it cannot be read.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    quiet_orbax()
    try:
        handler = ocp.StandardCheckpointHandler()
        return handler.restore(epath.Path(item_dir.absolute()), args=ocp.args.StandardRestore(abstract_tree(abstract)))
    except Exception as error:  # Orbax raises bare Exceptions for unreadable data
        raise CheckpointError(f"reading {item_dir} failed: {one_line(error)}; check the disk and try again") from error


def tree_handler():
    """The Orbax handler that writes trees: uncompressed, since float weights shrink by 7% and take 3 times as long."""
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler(use_compression=False)


def check_folder_name(directory: str | os.PathLike, name: str | None = None) -> None:
    """Raises an error where Orbax would write weights that nothing can read.

    When all arrays are written, Orbax joins them by an index; it looks for them with the whole path as a pattern of
    file names, so that a folder ``[1]`` above them does not match itself, and warns of nothing but the missing index.

    Args:
      directory: where weights are to be written, below it or in it.
      name: what the message calls it; None for the path.

    Raises:
      UserError: a character of patterns is in its name or in that of a folder above it.
    """
    place = Path(directory).absolute()
    if found := [character for character in "[*?" if character in str(place)]:
        raise UserError(
            f"{os.fspath(directory) if name is None else name} is not allowed, since {place} has {' and '.join(found)} "
            "in its name, and checkpoints that Orbax writes there cannot be read; name a directory without such "
            "characters (a link to this one will do)"
        )


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
