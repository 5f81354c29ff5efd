"""An optimizer's state is cut as its parameters are, and the update over a mesh is that of one device."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from configs.optimizer import READS, OptimizerConfig
from train.optimizers import make_optimizer, state_shardings
from train.sharding import AXES

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """What the worker wrote; several test processes share its work."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "optimizers"
    folder.mkdir(exist_ok=True)
    output = folder / "report.json"
    with output.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            command = [sys.executable, "-m", "tests.train.optimizers_worker", str(output)]
            done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=400, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("name", READS)
def test_a_mesh_changes_nothing_but_rounding(report, name):
    """Relative to how far each parameter moved; 8-bit codes may fall on the other side of a boundary."""
    differences = report[name]["differences"]
    assert len(differences) == 7
    assert all(share < 1e-3 for share in report[name]["codes"])
    assert len(report[name]["codes"]) == {"adamw_8bit": 6, "came_8bit": 3}.get(name, 0)
    tolerance = 0.02 if report[name]["codes"] else TOLERANCE
    assert all(value < tolerance for value in differences.values()), differences


@pytest.mark.parametrize("name", READS)
def test_nothing_large_is_whole(report, name):
    """The largest array of any state is a kernel's; on a device there is an eighth of it."""
    assert report[name]["whole"] == report[name]["largest"] * 8


@pytest.mark.parametrize("name", [name for name in READS if name not in ("muon", "prodigy")])
def test_no_parameter_is_gathered_for_its_update(report, name):
    """Muon multiplies matrices and optax's Prodigy flattens them for a product; the others work where each part lies.

    What they gather are vectors: a number per output, padded to whole blocks (2 x 300), against 65536 in a kernel.
    """
    assert max(report[name]["gathered"], default=0) <= 600


@pytest.mark.parametrize(
    ("name", "leaf", "spec"),
    [
        ("adamw", "mu/transformer_blocks/ff/kernel", [None, "fsdp", "tensor"]),
        ("adamw", "nu/transformer_blocks/ff/bias", [None, "tensor"]),
        ("adamw", "nu/transformer_blocks/scale_shift_table", [None, None, None]),
        ("adamw_8bit", "mu/transformer_blocks/ff/kernel/codes", [None, "fsdp", "tensor"]),
        ("adamw_8bit", "root_nu/transformer_blocks/ff/kernel/last_axis_scales", [None, "fsdp", "tensor"]),
        ("adamw_8bit", "mu/transformer_blocks/ff/bias", [None, "tensor"]),
        ("came", "moments/transformer_blocks/ff/kernel/momentum", [None, "fsdp", "tensor"]),
        ("came", "moments/transformer_blocks/ff/kernel/second_per_output", [None, "tensor"]),
        ("came", "moments/transformer_blocks/ff/kernel/residual_per_input", [None, "fsdp"]),
        ("came", "moments/proj_out/kernel/second_per_input", ["fsdp"]),
        ("came", "moments/transformer_blocks/ff/bias/second", [None, "tensor"]),
        ("came_8bit", "moments/transformer_blocks/ff/kernel/momentum/codes", [None, "fsdp", "tensor"]),
        # 3 blocks of up to 100 outputs are not cut in two; 2 blocks are not cut in four
        ("came_8bit", "moments/transformer_blocks/ff/kernel/momentum/block_scales", [None, None]),
        ("came_8bit", "moments/transformer_blocks/out/kernel/momentum/block_minimums", [None, None]),
        ("muon", "mu/transformer_blocks/ff/kernel", [None, "fsdp", "tensor"]),
        ("prodigy", "params0/transformer_blocks/ff/kernel", [None, "fsdp", "tensor"]),
        ("schedule_free_adamw", "z/transformer_blocks/ff/kernel", [None, "fsdp", "tensor"]),
        ("lion", "mu/scale_shift_table", [None, None]),
        ("lion", "count", []),
    ],
)
def test_where_the_state_lies(report, name, leaf, spec):
    found = [value for path, value in report[name]["specs"].items() if f"/{path}".endswith(f"/{leaf}")]
    assert found
    assert all(value == spec for value in found), found


def mesh_of(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def test_a_parameter_may_be_named_like_the_end_of_another():
    params = {"blocks": {"table": np.ones((2, 4, 8), "f4")}, "table": np.ones((4, 8), "f4"), "mu": np.ones(8, "f4")}
    mesh = mesh_of(fsdp=4)
    shardings = {
        "blocks": {"table": NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))},
        "table": NamedSharding(mesh, PartitionSpec("fsdp", None)),
        "mu": NamedSharding(mesh, PartitionSpec("fsdp")),
    }
    state = jax.eval_shape(make_optimizer(OptimizerConfig(), 1, params).init, params)
    found = state_shardings(state, shardings, mesh)
    moments = found[1][0]
    for tree in (moments.mu, moments.nu):
        assert jax.tree.map(lambda sharding: sharding.spec, tree) == jax.tree.map(
            lambda sharding: sharding.spec, shardings
        )
    assert moments.count.spec == PartitionSpec()


def test_a_sharding_that_does_not_fit():
    mesh = mesh_of(fsdp=4)
    state = {"mu": {"a": np.ones((4, 4))}}
    with pytest.raises(ValueError, match=r"mu/a of shape \(4, 4\) does not fit"):
        state_shardings(state, {"a": NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))}, mesh)
