from __future__ import annotations

import fcntl
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from configs.published import PUBLISHED_TRANSFORMERS
from configs.schema import MeshConfig
from sana_jax import UserError
from sana_jax.models.sana import SanaTransformer
from sana_jax.models.sharding_rules import SANA
from train.sharding import AXES, check_batch, make_mesh, parameter_paths, parameter_shardings

ROOT = Path(__file__).parents[2]
ONE_DEVICE = "data=1"
THREE_AXES = "data=2 fsdp=2 tensor=2 accumulation=2"
MESHES = ("data=8", "fsdp=8", THREE_AXES)
BATCH = 16  # of tiny_config
TOLERANCE = 1e-5


def train_over(mesh: str, folder: Path) -> dict:
    output = folder / f"{mesh.replace(' ', '_')}.npz"
    command = [sys.executable, "-m", "tests.train.sharding_worker", str(output), *mesh.split()]
    with output.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes share the work
        if not output.exists():
            done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=400, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
    with np.load(output) as file:
        results = dict(file)
    return {**results, "report": json.loads(str(results["report"]))}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    """Four steps from the same state and data over each mesh."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "meshes"
    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        meshes = (ONE_DEVICE, *MESHES)
        return dict(zip(meshes, pool.map(lambda mesh: train_over(mesh, folder), meshes)))


def parts_of(run: dict, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in run.items() if name.startswith(prefix)}


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_changes_nothing_but_rounding(runs, mesh):
    one, many = runs[ONE_DEVICE], runs[mesh]
    for name, initial in parts_of(one, "initial/").items():
        assert np.array_equal(many[f"initial/{name}"], initial), name
    for name in ("loss", "grad_norm", "update_norm", "param_norm", "bin_loss"):
        np.testing.assert_allclose(many[f"metrics/{name}"], one[f"metrics/{name}"], rtol=TOLERANCE, err_msg=name)
    assert np.array_equal(many["metrics/bin_count"], one["metrics/bin_count"])

    for name, expected in parts_of(one, "state/").items():
        difference = np.abs(many[f"state/{name}"] - expected).max()
        assert difference <= TOLERANCE * np.abs(expected).max(), f"{name}: {difference}"


def cut_into(run: dict, prefix: str) -> dict[str, float]:
    """Into how many parts each array of the state is cut."""
    shards = run["report"]["shards"]
    return {name: size / part for name, (size, part) in shards.items() if name.startswith(prefix)}


@pytest.mark.parametrize(("mesh", "parts"), [("fsdp=8", 8), (THREE_AXES, 4)])
def test_parameters_average_and_moments_are_cut(runs, mesh, parts):
    kernels = cut_into(runs[mesh], "params/")
    big = {name: count for name, count in kernels.items() if "transformer_blocks" in name and "kernel" in name}
    assert len(big) == 11
    tensor = 2 if "tensor" in mesh else 1
    for name, count in big.items():
        # the depthwise kernel has no dimension that is contracted, which fsdp would cut
        assert count == (tensor if "conv_depth" in name else parts), name
    for tree in ("ema/", "opt_state/1/0/mu/", "opt_state/1/0/nu/"):
        other = cut_into(runs[mesh], tree)
        assert {name.removeprefix(tree): count for name, count in other.items()} == {
            name.removeprefix("params/"): count for name, count in kernels.items()
        }


def test_copies_of_the_model_are_whole(runs):
    assert set(cut_into(runs["data=8"], "").values()) == {1.0}


def test_fsdp_takes_memory_and_work_off_each_device(runs):
    one, copies, cut = (runs[mesh]["report"] for mesh in (ONE_DEVICE, "data=8", "fsdp=8"))
    assert cut["arguments"] < copies["arguments"] / 4  # parameters, average and both moments
    assert cut["temporary"] < one["temporary"] / 4
    assert cut["flops"] < one["flops"] / 6


def collectives(program: str) -> list[tuple[str, tuple[int, ...]]]:
    """(kind, shape) of every array that devices exchange in a compiled program."""
    found = []
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    for line in program.splitlines():
        match = re.search(rf"= (\(?.*?\)?) ({kinds})(?:-start)?\(", line)
        if match:
            for shape in re.findall(r"\w+\[([\d,]*)\]", match[1]):
                found.append((match[2], tuple(int(size) for size in shape.split(",") if size)))
    return found


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8"])
def test_devices_exchange_weights_and_gradients_never_activations(runs, mesh):
    shapes = dict(parts_of(runs[mesh], "initial/"))
    weights = {part.size for part in shapes.values()} | {part[0].size for part in shapes.values() if part.ndim}
    exchanged = collectives(runs[mesh]["report"]["program"])
    kinds = {kind for kind, _ in exchanged}
    assert kinds == ({"all-gather", "all-reduce"} if mesh == "fsdp=8" else {"all-reduce"})
    for kind, shape in exchanged:
        size = math.prod(shape)
        assert size in weights or size <= 10 * BATCH, f"{kind} of {shape}, which is no weight's size"
        # tokens, captions and pictures have at least three axes, the batch first
        assert not (len(shape) >= 3 and shape[0] in (BATCH, BATCH // 8)), f"{kind} of {shape}"


def test_with_tensor_parallelism_no_device_has_the_whole_batch(runs):
    for kind, shape in collectives(runs[THREE_AXES]["report"]["program"]):
        assert len(shape) < 3 or shape[0] != BATCH, f"{kind} of {shape}"


# -- rules ---------------------------------------------------------------------------------------------------------


def published_shapes(name: str):
    config = PUBLISHED_TRANSFORMERS[name].config

    def init():
        latents = jnp.zeros((1, 1, 1, config.in_channels))
        guidance = jnp.zeros(1) if config.guidance_embeds else None
        caption = jnp.zeros((1, 1, config.caption_channels))
        return SanaTransformer(config).init(jax.random.key(0), latents, caption, jnp.zeros(1), guidance)["params"]

    return jax.eval_shape(init)


def abstract_mesh(**axes: int) -> AbstractMesh:
    return AbstractMesh(tuple(axes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@pytest.mark.parametrize("name", PUBLISHED_TRANSFORMERS)
def test_rules_of_published_models(name):
    params = published_shapes(name)
    paths = parameter_paths(params)
    for path in paths:
        assert sum(bool(re.fullmatch(pattern, path)) for pattern, _ in SANA) == 1, path
    shardings, whole = parameter_shardings(params, SANA, abstract_mesh(fsdp=8, tensor=2))
    assert whole == []
    cut, total = 0, 0
    for path, sharding in parameter_paths(shardings).items():
        used = [axis for axis in sharding.spec if axis is not None]
        assert len(used) == len(set(used)), path
        size = math.prod(paths[path].shape)
        total += size
        if not used:
            # vectors: biases, scales and modulation tables
            assert len(paths[path].shape) <= 2 or path.endswith("scale_shift_table"), path
            assert size <= 6 * paths[path].shape[-1] * paths[path].shape[0], path
        else:
            cut += size
    assert cut / total > 0.998


def test_every_rule_is_used_by_some_published_model():
    paths = {path for name in PUBLISHED_TRANSFORMERS for path in parameter_paths(published_shapes(name))}
    unused = [p for p, _ in SANA if not any(re.fullmatch(p, path) for path in paths)]
    # biases of self-attention's q, k and v are shared with cross-attention's pattern
    assert unused == []


def test_a_dimension_that_does_not_divide_stays_whole_and_is_named():
    params = {"a": jax.ShapeDtypeStruct((6, 9), jnp.float32)}
    shardings, whole = parameter_shardings(params, (("a", ("fsdp", "tensor")),), abstract_mesh(fsdp=2, tensor=2))
    assert tuple(shardings["a"].spec) == ("fsdp", None)
    assert whole == ["a"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("a", (None,)),), "b/c matches 0 rules"),
        ((("a", (None,)), ("b/.*", (None,)), (".*/c", (None,))), "b/c matches 2 rules"),
        ((("a", (None, None)), ("b/c", (None,))), "a of rank 1 has the rule"),
        ((("a", (None,)), ("b/c", ("rows",))), "b/c has the rule ('rows',): the mesh has no axis rows"),
        ((), "a matches 0 rules; b/c matches 0 rules"),
    ],
)
def test_rules_that_do_not_fit(rules, message):
    params = {"a": jax.ShapeDtypeStruct((4,), jnp.float32), "b": {"c": jax.ShapeDtypeStruct((4,), jnp.float32)}}
    with pytest.raises(ValueError, match=re.escape(message)):
        parameter_shardings(params, rules, abstract_mesh(fsdp=2))


def test_an_axis_twice_in_one_rule():
    params = {"a": jax.ShapeDtypeStruct((4, 4), jnp.float32)}
    with pytest.raises(ValueError, match="a of rank 2 has the rule"):
        parameter_shardings(params, (("a", ("fsdp", "fsdp")),), abstract_mesh(fsdp=2))


# -- meshes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "parts"),
    [
        ({"data": -1, "fsdp": -1}, ["at most one is -1", "data=-1, fsdp=-1"]),
        ({"data": 0}, ["1 or more"]),
        ({"data": -1, "tensor": 3}, ["3 does not divide the number of devices, 1", ": --mesh.tensor 1 gives"]),
        ({"data": 2}, ["product 2 must be the number of devices, 1"]),
    ],
)
def test_meshes_that_do_not_fit(axes, parts):
    if jax.device_count() != 1:
        pytest.skip("for one device")
    with pytest.raises(UserError) as caught:
        make_mesh(MeshConfig(**{"data": 1, **axes}))
    for part in parts:
        assert part in str(caught.value)


def test_batches_that_do_not_divide():
    mesh = abstract_mesh(data=2, fsdp=4)
    check_batch(16, 2, mesh)
    with pytest.raises(UserError, match="2 x 4 x 3 = 24; the nearest that does is 48 or 72"):
        check_batch(50, 3, mesh)
    with pytest.raises(UserError, match="the nearest that does is 8"):
        check_batch(3, 1, mesh)
