"""A training step of SANA-WM whose frames are cut over devices as well as its parameters."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs import load_preset
from configs.schema import MeshConfig
from sana_jax.errors import UserError

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5


@pytest.mark.prove
def test_parameters_and_frames_cut_change_nothing_but_rounding(tmp_path):
    """Two steps of the whole training step: losses, norms, and every parameter after them."""
    command = [sys.executable, "-m", "tests.train.context_worker", str(tmp_path / "out.npz")]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(tmp_path / "out.npz") as file:
        results = dict(file)
    assert results["one/parts"] == 1
    assert results["many/parts"] == 2
    for name, one in results.items():
        if not name.startswith(("one/metrics/", "one/params/")):
            continue
        many = results[name.replace("one/", "many/", 1)]
        difference = np.abs(many - one).max()
        assert difference <= TOLERANCE * np.abs(one).max(), f"{name}: {difference}"
    losses = results["one/metrics/0"]
    assert losses[0] != losses[1]


def test_other_networks_refuse_it():
    world = load_preset("moving_camera")
    assert dataclasses.replace(world, mesh=MeshConfig(context=2)).mesh.context == 2
    with pytest.raises(UserError, match=r"--mesh.context 2 is not allowed; allowed is 1: .* SANA-WM's alone"):
        dataclasses.replace(load_preset("digits"), mesh=MeshConfig(context=2))
