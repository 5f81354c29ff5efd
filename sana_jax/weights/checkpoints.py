"""A training run's ``checkpoints/<step>`` directories, as pipelines read them.

Nothing here is collective: any process may call any of it alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from kernels.typing import PyTree
from sana_jax.errors import CheckpointError, UserError
from sana_jax.weights.manifest import find_damage, saved_items
from sana_jax.weights.quiet import TEMPORARY_MARK
from sana_jax.weights.trees import mismatch_error, restore_tree, saved_structure, tree_differences


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


def checkpoint_structure(
    checkpoints_dir: str | os.PathLike, which: Literal["ema", "params", "auto"] = "auto", step: int | None = None
) -> PyTree:
    """Shapes and dtypes of the tree that ``load_checkpoint_params`` would read, for whoever does not know it.

    Raises:
      CheckpointError: no checkpoint, or a damaged one.
    """
    directory = Path(checkpoints_dir)
    step = choose_checkpoint(directory, step)
    step_dir = directory / str(step)
    try:
        items = saved_items(step_dir)
        if which == "auto":
            which = "ema" if "ema" in items else "params"
        return saved_structure(step_dir / which)
    except (OSError, ValueError) as error:
        raise damaged_checkpoint(directory, step, str(error), "load") from None
