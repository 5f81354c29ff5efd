"""The shipped preset as users run it, killed without warning and resumed, is bit for bit the run without the kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import load_preset
from sana_jax.models.sana import SanaTransformer
from sana_jax.pipelines.text_to_image import abstract_params
from sana_jax.weights import load_checkpoint_params

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1200)]
STEPS, EVERY = 60, 20


def start(run_dir) -> subprocess.Popen:
    words = ["--run-dir", str(run_dir), "--steps", str(STEPS), "--checkpoint.every", str(EVERY), "--device", "cpu"]
    command = [sys.executable, "-m", "train.main", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_and_resumed(tmp_path):
    straight = start(tmp_path / "straight")
    assert straight.wait() == 0, straight.stdout.read()

    killed = start(tmp_path / "killed")
    while not (tmp_path / "killed" / "checkpoints" / str(EVERY)).exists():
        assert killed.poll() is None
        time.sleep(0.05)
    time.sleep(0.7)  # some steps past the checkpoint
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    resumed = start(tmp_path / "killed")
    output = resumed.communicate()[0]
    assert resumed.returncode == 0, output
    assert "resumed at step" in output

    abstract = abstract_params(SanaTransformer(load_preset("digits").transformer))
    for which in ("params", "ema"):
        one, other = (
            load_checkpoint_params(tmp_path / name / "checkpoints", abstract, which, STEPS)[0]
            for name in ("straight", "killed")
        )
        jax.tree.map(np.testing.assert_array_equal, one, other)
