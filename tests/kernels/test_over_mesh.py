"""Kernels over a mesh of eight simulated devices, interpreted: as on one device, and nobody gathers the operands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICK = ("rope_linear_attention", "modulated_norm", "gated_residual", "qk_norm")
LONG = ("gated_delta_rule", "mix_ffn")


def run(output: Path, *cases: str) -> dict:
    command = [sys.executable, "-m", "tests.kernels.over_mesh_worker", str(output), *cases]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    return run(tmp_path_factory.mktemp("mesh") / "report.json", *QUICK, "refusals")


@pytest.fixture(scope="module")
def long_report(tmp_path_factory) -> dict:
    return run(tmp_path_factory.mktemp("mesh") / "report.json", *LONG, "frames")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.prove) for name in LONG)])
def test_values_and_gradients_are_those_of_one_device(request, name):
    found = request.getfixturevalue("long_report" if name in LONG else "report")[name]
    assert max(found["errors"]) <= 1e-6
    assert (found["gathers"], found["said"]) == (0, "")
    value, of_first, *_ = found["parts"]
    assert value[0] == of_first[0] == 1  # of a batch of as many as there are devices along its axes


@pytest.mark.prove
def test_frames_may_be_split_outside(long_report):
    assert max(long_report["frames"]["errors"]) <= 1e-6


def test_a_kernel_is_lowered_for_its_own_part(report):
    assert report["cuda"] == {"kernels": 2, "parts": [True, True]}


@pytest.mark.parametrize(
    ("name", "op", "reason"),
    [
        ("mix_ffn", "mix_ffn", "it needs all 6 channels of a token, which mesh axis 'tensor' cuts; use 'xla'"),
        ("qk_norm", "qk_norm", "it needs all 16 channels of a token, which mesh axis 'tensor' cuts; use 'xla'"),
        (
            "odd heads",
            "relu_linear_attention",
            "3 heads do not divide by the 2 devices of mesh axis 'tensor'; use 'xla'",
        ),
    ],
)
def test_what_a_mesh_cuts_that_is_needed_whole_is_left_to_xla(report, name, op, reason):
    found = report["refusals"][name]
    assert found["reason"] == f"implementation='pallas': {reason}"
    assert found["said"] == f"{op}: what None picks on cpu leaves it to XLA: {found['reason']}\n"
    assert found["same"]


def test_an_axis_that_nobody_knows_is_refused(report):
    assert report["refusals"]["other axis"]["reason"] == (
        "implementation='pallas': mesh axis 'pictures' of 8 devices (Auto): it is cut by Auto axes data, fsdp, tensor "
        "alone; use 'xla'"
    )
