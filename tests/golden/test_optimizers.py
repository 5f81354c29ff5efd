"""CAME, CAME with an 8-bit momentum, and Lion against recorded steps.

Recorded tensors are PyTorch's: a linear weight (out, in), a convolution (out, in, height, width). Here they are
(in, out) and (height, width, in, out). In the recording the table is a matrix as well, so here it has a matrix's name.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs.optimizer import OptimizerConfig, check_optimizer
from tests.golden.golden_files import GoldenFile, assert_golden, load_golden
from train.optimizers import make_optimizer
from train.optimizers.came import Factored, OutputBlocks

TOLERANCE = 5e-6
SCALE_TOLERANCE = 1e-6
EQUAL_CODES = 0.999
# Of the average over a row or column, in which a neighbouring code may have been taken at an earlier step.
ROUNDED_RESIDUAL_TOLERANCE = 1e-3
FACTORS = {
    "second_per_output": "exp_avg_sq_row",
    "second_per_input": "exp_avg_sq_col",
    "residual_per_output": "exp_avg_res_row",
    "residual_per_input": "exp_avg_res_col",
}


def to_jax(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 else array


def to_torch(array) -> np.ndarray:
    array = np.asarray(array)
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T if array.ndim == 2 else array


def run(golden: GoldenFile, config: OptimizerConfig):
    """(parameters, state) after every step."""
    check_optimizer(config)
    names = golden.children("in/param0/")
    params = {
        name: {"kernel" if golden[f"in/param0/{name}"].ndim > 1 else "bias": to_jax(golden[f"in/param0/{name}"])}
        for name in names
    }
    params = jax.tree.map(jnp.asarray, params)
    optimizer = make_optimizer(config, golden.hparams["steps"], params)
    state = optimizer.init(params)
    step_function = jax.jit(optimizer.update)
    for step in range(golden.hparams["steps"]):
        grads = {
            name: {kind: jnp.asarray(to_jax(golden[f"in/grads/{name}"][step])) for kind in params[name]}
            for name in names
        }
        updates, state = step_function(grads, state, params)
        params = optax.apply_updates(params, updates)
        yield step, {name: next(iter(leaf.values())) for name, leaf in params.items()}, state


def came_config(golden: GoldenFile, **settings) -> OptimizerConfig:
    hparams = golden.hparams
    return OptimizerConfig(
        learning_rate=hparams["lr"],
        beta1=hparams["betas"][0],
        beta2=hparams["betas"][1],
        beta3=hparams["betas"][2],
        came_epsilon_gradient=hparams["eps"][0],
        came_epsilon_residual=hparams["eps"][1],
        came_clip_threshold=hparams["clip_threshold"],
        weight_decay=hparams["weight_decay"],
        no_decay=(),
        clip_norm=None,
        **settings,
    )


def expect(golden: GoldenFile, port, name: str, tolerance: float = TOLERANCE) -> int:
    """Compares with what was recorded under a name, if anything was; how many."""
    recorded = f"out64/{name}" if f"out64/{name}" in golden else f"out/{name}"
    if recorded not in golden:
        return 0
    assert_golden(port, golden[recorded], tolerance, name)
    return 1


def compare_memory(golden: GoldenFile, step: int, state) -> int:
    """Compares the memory that was recorded for a step; how many arrays."""
    (moments,) = [node.moments for node in jax.tree.leaves(state, is_leaf=has_moments) if has_moments(node)]
    compared = 0
    for tensor in golden.children("in/param0/"):
        memory, place = next(iter(moments[tensor].values())), f"step{step}/{tensor}"
        if isinstance(memory, Factored):
            for field, name in FACTORS.items():
                rounded = step > 0 and isinstance(memory.momentum, OutputBlocks) and "residual" in field
                tolerance = ROUNDED_RESIDUAL_TOLERANCE if rounded else TOLERANCE
                compared += expect(golden, np.asarray(getattr(memory, field)).reshape(-1), f"{place}/{name}", tolerance)
        else:
            compared += expect(golden, to_torch(memory.second), f"{place}/exp_avg_sq")
        if not isinstance(memory.momentum, OutputBlocks):
            compared += expect(golden, to_torch(memory.momentum), f"{place}/exp_avg")
            continue
        for field, name in (("block_scales", "scale"), ("block_minimums", "min")):
            port = np.asarray(getattr(memory.momentum, field)).reshape(-1)
            compared += expect(golden, port, f"{place}/exp_avg.{name}", SCALE_TOLERANCE)
        if f"out/{place}/exp_avg.data" in golden:
            difference = to_torch(memory.momentum.codes).astype(int) - golden[f"out/{place}/exp_avg.data"].astype(int)
            assert np.abs(difference).max() <= 1, place
            assert (difference == 0).mean() >= EQUAL_CODES, place
            compared += 1
    return compared


def recorded_memory(golden: GoldenFile) -> int:
    return sum("/exp_avg" in name for name in golden.names("out/step"))


def has_moments(node) -> bool:
    return hasattr(node, "moments")


def test_came():
    golden = load_golden("optim_came")
    compared = 0
    for step, params, state in run(golden, came_config(golden, name="came")):
        for name, value in params.items():
            assert expect(golden, to_torch(value), f"step{step}/{name}/param")
        compared += compare_memory(golden, step, state)
    assert compared == recorded_memory(golden) > 0


def test_came_8bit():
    """The first step is exact. Then a value that lies between two codes may be rounded to either (in 0.1 % of entries):

    the parameter moves by up to a learning rate more or less at the next step, and the residual's averages over that
    value's row and column with it.
    """
    golden = load_golden("optim_came8bit")
    sizes = {name: golden.hparams[name] for name in ("block_size", "min_8bit_size")}
    compared = 0
    for step, params, state in run(golden, came_config(golden, name="came_8bit", **sizes)):
        for name, value in params.items():
            if f"out/step{step}/{name}/param" in golden:
                recorded = golden[f"out/step{step}/{name}/param"]
                difference = np.abs(to_torch(value) - recorded)
                equal = (difference <= TOLERANCE * np.abs(recorded).max()).mean()
                assert equal >= 1 - step * (1 - EQUAL_CODES), name
                assert difference.max() <= TOLERANCE * np.abs(recorded).max() + step * golden.hparams["lr"], name
        compared += compare_memory(golden, step, state)
    assert compared == recorded_memory(golden) > 0


def test_the_8_bit_momentum_is_close_to_the_full_one():
    golden = load_golden("optim_came8bit")
    *_, (step, params, _) = run(golden, came_config(golden, name="came"))
    for name, value in params.items():
        assert expect(golden, to_torch(value), f"unquantised_came/step{step}/{name}/param")


def test_lion():
    golden = load_golden("optim_lion")
    hparams = golden.hparams
    config = OptimizerConfig(
        name="lion",
        learning_rate=hparams["lr"],
        beta1=hparams["betas"][0],
        beta2=hparams["betas"][1],
        weight_decay=hparams["weight_decay"],
        no_decay=(),
        clip_norm=None,
    )
    compared = 0
    for step, params, state in run(golden, config):
        momentum = optax.tree_utils.tree_get(state, "mu")
        for name, value in params.items():
            assert expect(golden, to_torch(value), f"step{step}/{name}/param")
            compared += expect(golden, to_torch(next(iter(momentum[name].values()))), f"step{step}/{name}/exp_avg")
    assert compared == recorded_memory(golden) > 0
