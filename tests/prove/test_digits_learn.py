"""The embedded default really learns: its samples are read as the digits asked for, differ, and copy nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1200)]
MOST_SECONDS = 300


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the command without arguments but for its place; (directory, output, seconds)."""
    run_dir = tmp_path_factory.mktemp("runs") / "digits"
    started = time.perf_counter()
    command = [sys.executable, "-m", "train.main", "--run-dir", str(run_dir), "--device", "cpu"]
    # A cache of its own, so that the time includes compiling.
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return run_dir, done.stdout, time.perf_counter() - started


def test_takes_at_most_five_minutes(trained):
    assert trained[2] <= MOST_SECONDS


def test_writes_pictures_and_says_how_to_go_on(trained):
    run_dir, output, _ = trained
    pictures = sorted(path.name for path in (run_dir / "samples").iterdir())
    assert pictures[0] == "step_000000.png"
    assert len(pictures) >= 3
    assert "memory per device" in output
    assert "sana_jax.generate --model" in output.splitlines()[-1]


def test_the_digits_are_right_and_their_own(trained, tmp_path):
    figures_file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "train.evaluate_digits", "--model", str(trained[0]), "--json", str(figures_file)]
    print(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    figures = json.loads(figures_file.read_text())
    assert figures["samples"] == 200
    assert figures["recognised"] >= 0.95
    assert figures["spread"] >= 0.7
    assert figures["least_spread"] >= 0.4
    assert figures["copies"] == 0
