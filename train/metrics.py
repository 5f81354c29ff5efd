"""Numbers of a run: metrics.jsonl always, TensorBoard and Weights & Biases beside it, and a progress line."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs.schema import LoggingConfig
from sana_jax.errors import reason_of
from train.step import StepMetrics


def cut_rows(path: Path, step: int) -> int:
    """Drops the rows past ``step`` (and a torn last line) from a metrics file; returns how many. Atomic."""
    if not path.exists():
        return 0
    text = path.read_text()
    kept, dropped = [], 0
    for line in text.splitlines():
        try:
            keep = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            keep = False
        kept += [line] * keep
        dropped += not keep
    if dropped or not text.endswith("\n"):
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        os.replace(temporary, path)
    return dropped


class MetricsWriter:
    """Writes rows of numbers to every destination; only process 0 writes anything.

    A destination other than the file is never fatal: if it fails it is named once and left out from then on.
    ``writing`` is held while the rows past ``start_step`` are cut, so that nothing ends the process in between.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LoggingConfig,
        run_config: dict[str, Any],
        start_step: int,
        writing: AbstractContextManager,
    ):
        self.failures: list[str] = []
        self._file = self._tensorboard = self._wandb = None
        if jax.process_index() != 0:
            return
        self._path = run_dir / "metrics.jsonl"
        with writing:
            dropped = cut_rows(self._path, start_step)
        if dropped:
            print(f"metrics.jsonl: dropped {dropped} rows past step {start_step}", flush=True)
        self._file = self._path.open("a")
        if config.tensorboard:
            self._tensorboard = self._attempt("TensorBoard", lambda: _open_tensorboard(run_dir, start_step))
        if config.wandb:
            self._wandb = self._attempt("Weights & Biases", lambda: _open_wandb(run_dir, config, run_config))

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row."""
        if self._file is None:
            return
        # JSON has no NaN; a row must stay readable by any parser
        row = {name: value if np.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        self._tensorboard = self._send(
            "TensorBoard",
            self._tensorboard,
            lambda events: [events.add_scalar(name, value, step) for name, value in values.items()],
        )
        self._wandb = self._send("Weights & Biases", self._wandb, lambda run: run.log(values, step=step))

    def write_image(self, step: int, name: str, image: Any) -> None:
        """A PIL image, to the destinations that show pictures."""
        self._tensorboard = self._send(
            "TensorBoard",
            self._tensorboard,
            lambda events: events.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC"),
        )

    def close(self) -> None:
        """Flushes everything."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._tensorboard is not None:
            self._attempt("TensorBoard", self._tensorboard.close)
        if self._wandb is not None:
            self._attempt("Weights & Biases", self._wandb.finish)

    def _send(self, name: str, destination: Any, action: Callable[[Any], Any]) -> Any:
        """The destination after ``action``; None if there is none, or if it failed just now, which is said."""
        if destination is None:
            return None
        return self._attempt(name, lambda: (action(destination), destination)[1])

    def _attempt(self, name: str, action) -> Any:
        try:
            return action()
        except Exception as error:
            reason = reason_of(error, 300)
            self.failures.append(name)
            print(f"warning: {name} failed and is left out from here on: {type(error).__name__}: {reason}", flush=True)
            return None


def _open_tensorboard(run_dir: Path, start_step: int):
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)


def _open_wandb(run_dir: Path, config: LoggingConfig, run_config: dict[str, Any]):
    import wandb

    name = run_dir.name
    return wandb.init(
        project=config.wandb_project, name=name, id=name, dir=str(run_dir), config=run_config, resume="allow"
    )


def summarise(window: Sequence[StepMetrics], samples: int, seconds: float, kind: str = "images") -> dict[str, float]:
    """A row from the steps since the last one.

    ``loss``, norms and learning rate are the last step's own, so that a resumed run repeats them; ``loss_mean`` and
    the losses by noise level (``loss_sigma_a_b``, where samples fell into that bin) are over the window. ``kind`` is
    what samples are: images or clips.
    """
    steps = [jax.tree.map(np.asarray, metrics) for metrics in window]
    last = steps[-1]
    row = {
        name: float(getattr(last, name)) for name in ("loss", "grad_norm", "update_norm", "param_norm", "learning_rate")
    }
    finite = [step for step in steps if step.finite]
    if finite:
        row["loss_mean"] = float(np.mean([step.loss for step in finite]))
        loss = np.sum([step.bin_loss for step in finite], axis=0)
        count = np.sum([step.bin_count for step in finite], axis=0)
        edges = np.linspace(0, 1, len(count) + 1)
        for i, (low, high) in enumerate(itertools.pairwise(edges)):
            if count[i]:
                row[f"loss_sigma_{low:.2f}_{high:.2f}"] = float(loss[i] / count[i])
    for name in sorted({name for step in finite for name in step.figures}):
        row[name] = float(np.mean([step.figures[name] for step in finite if name in step.figures]))
    row["nonfinite_steps"] = float(len(steps) - len(finite))
    if seconds > 0:
        row[f"{kind}_per_second"] = samples / seconds
    return row


class Progress:
    """A bar with loss, images/s and time left on a terminal; a line per row elsewhere. Process 0 only.

    ``kind`` is what samples are, as in ``summarise``.
    """

    def __init__(self, first: int, total: int, kind: str = "images"):
        self._kind = kind
        self._bar = None
        self._total, self._first, self._started = total, first, time.perf_counter()
        self._paused = 0.0
        self._shown = jax.process_index() == 0
        if self._shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=first, desc="training", unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """One step more."""
        if self._bar is not None:
            self._bar.update()

    def pause(self, seconds: float) -> None:
        """Leaves time that was not training (previews, saves) out of the estimate of what is left."""
        self._paused += seconds

    def row(self, step: int, values: dict[str, float]) -> None:
        """Shows the newest numbers."""
        if not self._shown:
            return
        loss, speed = values.get("loss_mean", values["loss"]), values.get(f"{self._kind}_per_second", float("nan"))
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} {self._kind}/s")
            return
        taken = step - self._first
        left = (time.perf_counter() - self._started - self._paused) / max(taken, 1) * (self._total - step)
        self.say(f"step {step}/{self._total}  loss {loss:.4f}  {speed:.0f} {self._kind}/s  ETA {clock(left)}")

    def say(self, line: str) -> None:
        """Prints a line without tearing the bar."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"
