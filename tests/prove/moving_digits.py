"""What the proofs on moving digits share: commands, the trained teacher, and figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.train.run_training import made_once, shared_directory


class Teacher(NamedTuple):
    """The preset ``moving_digits`` as it is, but for where it goes."""

    run: Path
    seconds: float


def command(module: str, *options: object, **environment: str) -> str:
    """What a command prints; it must succeed."""
    words = [sys.executable, "-m", module, *map(str, options), "--device", "cpu"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def teacher(tmp_path_factory) -> Teacher:
    """Trains it, once in a session."""

    def train(directory: Path) -> None:
        compiled = directory.with_name("moving_digits_compiled")  # nothing from other runs
        started = time.perf_counter()
        print(command("train.main", "moving_digits", "--run-dir", directory, JAX_COMPILATION_CACHE_DIR=str(compiled)))
        (directory / "seconds.json").write_text(json.dumps(time.perf_counter() - started))

    run = made_once(shared_directory(tmp_path_factory) / "moving_digits", train)
    return Teacher(run, json.loads((run / "seconds.json").read_text()))


def figures(run: Path, file: Path, *options: object) -> dict:
    """What ``train.evaluate_moving_digits`` measures of a run."""
    print(command("train.evaluate_moving_digits", "--model", run, "--json", file, *options))
    return json.loads(file.read_text())
