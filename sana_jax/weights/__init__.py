"""Weights on disk: a training run's checkpoints as pipelines read them, and directories of converted weights.

A checkpoint is a directory ``checkpoints/<step>`` with one sub-directory per item (``params``, ``ema``,
``opt_state``, ``progress``), written by Orbax under a temporary name and renamed when it is complete. Beside the items
lies ``manifest.json`` with the size and CRC-32 of every file, written before the rename. Restoring compares the files
with it first, because array data has no checksum of its own: a changed byte would load as a wrong number.

Nothing here is collective: any process may call any of it alone.
"""

from __future__ import annotations

from sana_jax.weights.checkpoints import (
    checkpoint_steps,
    checkpoint_structure,
    choose_checkpoint,
    damaged_checkpoint,
    half_written_checkpoints,
    load_checkpoint_params,
)
from sana_jax.weights.converted import (
    load_params,
    save_params,
)
from sana_jax.weights.manifest import (
    find_damage,
    saved_items,
    write_manifest,
)
from sana_jax.weights.messages import (
    one_line,
)
from sana_jax.weights.quiet import (
    TEMPORARY_MARK,
    quiet_failed_writes,
    quiet_orbax,
)
from sana_jax.weights.trees import (
    abstract_tree,
    check_folder_name,
    disk_shortage,
    mismatch_error,
    restore_tree,
    tree_bytes,
    tree_differences,
    tree_handler,
)

__all__ = [
    "TEMPORARY_MARK",
    "abstract_tree",
    "check_folder_name",
    "checkpoint_steps",
    "checkpoint_structure",
    "choose_checkpoint",
    "damaged_checkpoint",
    "disk_shortage",
    "find_damage",
    "half_written_checkpoints",
    "load_checkpoint_params",
    "load_params",
    "mismatch_error",
    "one_line",
    "quiet_failed_writes",
    "quiet_orbax",
    "restore_tree",
    "save_params",
    "saved_items",
    "tree_bytes",
    "tree_differences",
    "tree_handler",
    "write_manifest",
]
