"""Checkpoints of a training run: complete or absent, restorable on any number of devices.

    checkpoints/<step>/params, ema, opt_state     Orbax trees, one directory each
    checkpoints/<step>/progress                   JSON: step, data position, configuration, library versions
    checkpoints/<step>/manifest.json              size and CRC-32 of every file of the above

A save goes to ``<step>.orbax-checkpoint-tmp`` and is renamed when everything, the manifest included, is written. In a
run of several processes all of them call every method; the directory is one that all of them see.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

import sana_jax
from kernels.typing import PyTree
from sana_jax.errors import CheckpointError, UserError
from sana_jax.files import remove_partial
from sana_jax.weights import (
    TEMPORARY_MARK,
    abstract_tree,
    checkpoint_steps,
    choose_checkpoint,
    damaged_checkpoint,
    disk_shortage,
    find_damage,
    half_written_checkpoints,
    mismatch_error,
    one_line,
    quiet_failed_writes,
    quiet_orbax,
    restore_tree,
    saved_items,
    tree_bytes,
    tree_differences,
    tree_handler,
    write_manifest,
)
from train.distributed import gather_messages

TREES = ("params", "ema", "opt_state")
PROGRESS_FILE = "metadata"  # the name that Orbax's JSON handler gives
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain")


@dataclasses.dataclass
class SaveRecord:
    """What a save cost. The last two fields are filled in (on process 0) once the files are written."""

    step: int
    state_bytes: int
    """Bytes of the saved arrays."""
    blocked_seconds: float = 0.0
    """How long ``save`` kept its caller: earlier save, checks, device-to-host copy (and writing, if synchronous)."""
    disk_bytes: int | None = None
    total_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Restored:
    """A training state as it was saved, on the devices that were asked for."""

    step: int
    params: PyTree
    ema: PyTree | None
    opt_state: PyTree
    data_position: Any
    config: dict[str, Any]
    versions: dict[str, str]
    """Versions of the libraries that wrote the checkpoint."""
    left_out: int = 0
    """Steps of the run until then that did not count, since they were not finite."""


class CheckpointStore:
    """The checkpoints of one run directory.

    Opening it removes what an interrupted save left behind and says so; the directory itself is made by the first save.

    Args:
      directory: a run's ``checkpoints`` directory, on a disk that all processes share.
      keep_last: the newest this many checkpoints stay, at least 1.
      keep_every: checkpoints whose step is a multiple of it stay as well; None for none.
      asynchronous: ``save`` returns once the state is copied off the devices and writes in the background. An error of
        the background write is raised by the next ``save``, ``wait``, ``restore`` or ``close``.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_last: int,
        keep_every: int | None,
        asynchronous: bool,
    ):
        if keep_last < 1:
            raise UserError(f"keep_last={keep_last} must be at least 1")
        if keep_every is not None and keep_every < 1:
            raise UserError(f"keep_every={keep_every} must be at least 1, or None")
        if "://" in str(directory):
            raise UserError(f"checkpoints go to a mounted file system, not to {directory}")
        quiet_orbax()
        self.directory = Path(directory)
        self.last_save: SaveRecord | None = None
        self._keep_last, self._keep_every, self._asynchronous = keep_last, keep_every, asynchronous
        self._manager: ocp.CheckpointManager | None = None
        self._unfinished: tuple[SaveRecord, float, list[str]] | None = None
        if jax.process_index() == 0:
            self._remove_half_written()

    # -- what is there ------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending. A save under way is not among them."""
        return checkpoint_steps(self.directory)

    def latest_step(self) -> int | None:
        """The newest finished checkpoint's step, None if there is none."""
        return max(self.steps(), default=None)

    # -- saving -------------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        *,
        params: PyTree,
        ema: PyTree | None,
        opt_state: PyTree,
        data_position: Any,
        config: dict[str, Any],
        left_out: int = 0,
        wait: bool = False,
    ) -> SaveRecord:
        """Saves the state after ``step`` steps; waits for an earlier save first.

        Args:
          step: optimizer steps taken.
          params, ema, opt_state: trees of arrays; ``ema=None`` for a run without averaged weights.
          data_position: JSON-able position of the data iterator, the same on all processes.
          config: the run's configuration, JSON-able.
          left_out: how many of the steps did not count, since they were not finite.
          wait: return only when the checkpoint is complete (as if not asynchronous).

        Raises:
          CheckpointError: an earlier or this save failed, the step exists already, or the disk is too small.
        """
        started = time.perf_counter()
        self.wait()
        trees = {"params": params, "ema": ema, "opt_state": opt_state}
        trees = {name: tree for name, tree in trees.items() if tree is not None}
        progress = _progress(int(step), ema is not None, data_position, config) | {"left_out": left_out}
        record = SaveRecord(step=int(step), state_bytes=tree_bytes(trees))
        self._check_before_saving(record, progress)
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        self._unfinished = (record, started, [*items, "progress"])
        self.last_save = record
        try:
            self._open_manager().save(
                record.step, args=ocp.args.Composite(**items, progress=ocp.args.JsonSave(progress)), force=True
            )
        except Exception as error:  # Orbax raises bare Exceptions for failed writes
            raise self._save_failed(error) from error
        if wait or not self._asynchronous:
            self.wait()
        record.blocked_seconds = time.perf_counter() - started
        return record

    def check_space(self, *trees: PyTree) -> None:
        """Asked before the first step: whether a checkpoint of these trees, of arrays or shapes, fits on the disk.

        Raises:
          CheckpointError: it does not.
        """
        shortage = disk_shortage(self.directory, tree_bytes(trees))
        for problem in filter(None, gather_messages(shortage or "")):  # all processes stop, or none
            raise CheckpointError(
                f"a checkpoint does not fit into {self.directory}: {problem}; free some space or name another disk"
            )

    def wait(self) -> None:
        """Returns when no save is under way. Raises CheckpointError if the last one failed (once)."""
        if self._manager is None or self._unfinished is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_failed(error) from error
        self._unfinished = None

    def delete_after(self, step: int) -> list[int]:
        """Deletes the checkpoints past ``step``, after a resume from an older one; returns (and prints) their steps."""
        self.wait()
        later = [other for other in self.steps() if other > step]
        _sync("delete_after: listed")
        if later and jax.process_index() == 0:
            print(f"checkpoints: deleting steps {', '.join(map(str, later))}, past the restored step {step}")
            for other in later:
                # Renamed first: a half-deleted directory must not pass for a checkpoint.
                doomed = self._temporary(other)
                os.replace(self.directory / str(other), doomed)
                shutil.rmtree(doomed)
        _sync("delete_after: deleted")
        if self._manager is not None:
            self._manager.reload()
        return later

    def close(self) -> None:
        """Waits for the last save and lets go of background threads. Call it before the program ends."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                manager, self._manager = self._manager, None
                manager.close()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            print(f"checkpoints: {failure}")  # the error that is already on its way comes first

    # -- restoring ----------------------------------------------------------------------------------------------------

    def restore(
        self,
        abstract_params: PyTree,
        abstract_ema: PyTree | None,
        abstract_opt_state: PyTree,
        step: int | None = None,
    ) -> Restored:
        """Reads a checkpoint onto the devices that the abstract trees name, whatever devices it was saved from.

        Args:
          abstract_params, abstract_ema, abstract_opt_state: trees of ShapeDtypeStructs with shardings.
            ``abstract_ema=None`` for a run without averaged weights.
          step: which checkpoint, None for the newest.

        Raises:
          CheckpointError: there is none, it is damaged, or it does not fit; the message says what to do.
        """
        self.wait()
        step = choose_checkpoint(self.directory, step)
        step_dir = self.directory / str(step)
        part = (jax.process_index(), jax.process_count())
        problems = gather_messages(find_damage(step_dir, part=part) or "")
        if problem := next(filter(None, problems), None):
            raise damaged_checkpoint(self.directory, step, problem, "resume from")
        try:
            progress = json.loads((step_dir / "progress" / PROGRESS_FILE).read_text())
            data_position, config, versions = (progress[key] for key in ("data_position", "config", "versions"))
            left_out = int(progress.get("left_out", 0))  # older checkpoints do not say
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"progress/{PROGRESS_FILE} can't be read ({one_line(error)})"
            raise damaged_checkpoint(self.directory, step, problem, "resume from") from None
        wanted = {"params": abstract_params, "ema": abstract_ema, "opt_state": abstract_opt_state}
        wanted = {name: abstract_tree(tree) for name, tree in wanted.items() if tree is not None}
        self._check_fit(step_dir, wanted)
        trees = {name: restore_tree(step_dir / name, tree) for name, tree in wanted.items()}
        state = (trees["params"], trees.get("ema"), trees["opt_state"])
        return Restored(step, *state, data_position, config, versions, left_out)

    def _check_fit(self, step_dir: Path, wanted: dict[str, PyTree]) -> None:
        saved = saved_items(step_dir)
        if ("ema" in saved) != ("ema" in wanted):
            have, want = ("with", "without") if "ema" in saved else ("without", "with")
            raise CheckpointError(
                f"the checkpoint {step_dir} was saved {have} averaged weights (ema) and this run is configured {want} "
                "them; resume with the configuration of the run (its config.json)"
            )
        differences = []
        for name, tree in wanted.items():
            differences += tree_differences(step_dir / name, tree, name=name)
        if differences:
            raise mismatch_error(
                step_dir, differences, "resume with the configuration of the run (its config.json), or start a new run"
            )

    # -- inside -------------------------------------------------------------------------------------------------------

    def _open_manager(self) -> ocp.CheckpointManager:
        if self._manager is None:
            registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
            for name in TREES:
                registry.add(name, ocp.args.PyTreeSave, tree_handler())
            keep = [checkpoint_managers.LatestN(self._keep_last)]
            if self._keep_every is not None:
                keep.append(checkpoint_managers.EveryNSteps(self._keep_every))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
                # Steps are trusted by the manifest, not by Orbax's own metadata, which may be the damaged file.
                lightweight_initialize=True,
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=self._before_rename,
                    # Made in the background, a directory that can't be made leaves other threads waiting for minutes.
                    create_directories_asynchronously=False,
                ),
            )
            quiet_failed_writes()
            self._manager = ocp.CheckpointManager(self.directory.absolute(), options=options, handler_registry=registry)
        return self._manager

    def _before_rename(self) -> None:
        """Called by Orbax on process 0, in the background, when all processes' files are written."""
        record, started, items = self._unfinished
        record.disk_bytes = write_manifest(self._temporary(record.step), items)
        record.total_seconds = time.perf_counter() - started

    def _temporary(self, step: int) -> Path:
        return self.directory / f"{step}{TEMPORARY_MARK}"

    def _check_before_saving(self, record: SaveRecord, progress: dict) -> None:
        problem = None
        text = json.dumps(progress)
        if record.step in self.steps():
            problem = (
                f"step {record.step} exists already in {self.directory}; "
                "delete it, or resume from it, or name another run directory"
            )
        elif shortage := disk_shortage(self.directory, record.state_bytes + len(text)):
            problem = (
                f"not saving step {record.step} to {self.directory}: {shortage}; "
                f"free some space and resume from {_step_or_beginning(self.steps())}"
            )
        position = zlib.crc32(json.dumps(progress["data_position"]).encode())
        positions, problems = zip(
            *(message.split(" ", 1) for message in gather_messages(f"{position} {problem or ''}"))
        )
        if any(problems):  # of whichever process: all of them stop, or none does and waits for the others
            raise CheckpointError(next(filter(None, problems)))
        if len(set(positions)) > 1:
            raise ValueError(f"the data positions of the {len(positions)} processes differ; a checkpoint holds one")

    def _save_failed(self, error: Exception) -> CheckpointError:
        """Cleans up after a failed save and returns what to raise."""
        record, _, _ = self._unfinished
        self._unfinished = None
        reason = _reason(error)
        if jax.process_index() == 0:
            remove_partial(self._temporary(record.step))
        if self._manager is not None:
            self._manager.reload()  # steps that were to make room for this one are still there
        steps = self.steps()
        if record.step in steps:
            return CheckpointError(
                f"step {record.step} was saved to {self.directory}, but tidying up failed: {reason}; "
                f"mend that and resume from step {record.step}"
            )
        return CheckpointError(
            f"saving step {record.step} to {self.directory} failed: {reason}; the half-written files were removed; "
            f"make room on the disk (or mend it) and resume from {_step_or_beginning(steps)}"
        )

    def _remove_half_written(self) -> None:
        for path in half_written_checkpoints(self.directory):
            shutil.rmtree(path, ignore_errors=True)
            fate = "it could not be removed" if path.exists() else "removed"
            print(f"checkpoints: ignoring {path}, half-written when a run was stopped; {fate}", flush=True)


def _reason(error: BaseException) -> str:
    """Why a save failed. In a run of several processes the disk's own error may lie under a barrier's time-out."""
    cause: BaseException | None = error
    while cause is not None:
        if "os_error_code=" in str(cause):
            return one_line(cause)
        cause = cause.__cause__ or cause.__context__
    if "Barrier timed out" in str(error):
        return "another process failed, or did not finish writing in time"
    return one_line(error)


def _progress(step: int, has_ema: bool, data_position: Any, config: dict[str, Any]) -> dict[str, Any]:
    if json.loads(json.dumps(data_position)) != data_position:
        raise ValueError(f"data_position {data_position!r} does not survive JSON; use dicts, lists, strings, numbers")
    versions = {"sana_jax": sana_jax.__version__}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"step": step, "ema": has_ema, "data_position": data_position, "config": config, "versions": versions}


def _step_or_beginning(steps: list[int]) -> str:
    return f"step {steps[-1]}" if steps else "the beginning (no checkpoint exists yet)"


def _sync(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
