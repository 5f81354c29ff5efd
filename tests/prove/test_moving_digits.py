"""The small SANA-Video really learns: digits are read as asked for and move where asked, from texts and from images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

pytestmark = [pytest.mark.prove, pytest.mark.timeout(3600)]
MOST_SECONDS = 1800
LEAST_RECOGNISED, LEAST_DIRECTION = 0.85, 0.90
HALF_A_STEP = 0.5 / 255  # of the bytes that a picture is given in


def run(module: str, *options: str, **environment: str) -> str:
    command = [sys.executable, "-m", module, *options, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The preset as it is, but for where it goes; (directory, seconds)."""
    run_dir, cache = tmp_path_factory.mktemp("runs") / "moving_digits", tmp_path_factory.mktemp("compiled")
    started = time.perf_counter()
    print(run("train.main", "moving_digits", "--run-dir", str(run_dir), JAX_COMPILATION_CACHE_DIR=str(cache)))
    return run_dir, time.perf_counter() - started


def figures(trained, tmp_path, *options: str) -> dict:
    file = tmp_path / "figures.json"
    print(run("train.evaluate_moving_digits", "--model", str(trained[0]), "--json", str(file), *options))
    return json.loads(file.read_text())


def test_takes_at_most_half_an_hour(trained):
    assert trained[1] <= MOST_SECONDS


def test_text_to_video(trained, tmp_path):
    found = figures(trained, tmp_path)
    assert found["clips"] == 160
    assert found["recognised"] >= LEAST_RECOGNISED
    assert found["direction"] >= LEAST_DIRECTION


def test_image_to_video_keeps_the_first_frame(trained, tmp_path):
    found = figures(trained, tmp_path, "--from-images")
    assert found["first_frame"] <= HALF_A_STEP + 1e-6
    assert found["recognised"] >= LEAST_RECOGNISED
    assert found["direction"] >= LEAST_DIRECTION
