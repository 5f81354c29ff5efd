"""Updates the same parameters over a mesh of 8 simulated devices and on one of them, with every optimizer.

python -m tests.train.optimizers_worker OUTPUT.json
"""

from __future__ import annotations

import json
import math
import os
import re
import sys

from tests.simulated_devices import simulated_devices

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = simulated_devices(8)

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs.optimizer import READS, OptimizerConfig
from configs.schema import MeshConfig
from tests.train.tiny_run import QUICKLY
from train.optimizers import make_optimizer, state_shardings
from train.sharding import make_mesh, parameter_paths, parameter_shardings

STEPS = 3
RULES = (
    (r"transformer_blocks/ff/kernel", (None, "fsdp", "tensor")),
    (r"transformer_blocks/out/kernel", (None, "tensor", "fsdp")),
    (r"transformer_blocks/ff/bias", (None, "tensor")),
    (r"transformer_blocks/scale_shift_table", (None, None, None)),
    (r"proj_out/kernel", ("fsdp", None)),
    (r"proj_out/bias", (None,)),
    (r"scale_shift_table", (None, None)),
)


def params(seed: int) -> dict:
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    return {
        "transformer_blocks": {
            "ff": {"kernel": normal(2, 128, 256), "bias": normal(2, 256)},
            "out": {"kernel": normal(2, 256, 128)},
            "scale_shift_table": normal(2, 6, 128),
        },
        "proj_out": {"kernel": normal(128, 20), "bias": normal(20)},
        "scale_shift_table": normal(2, 128),
    }


def relative_difference(expected, found, start) -> float:
    """Beyond one rounding of the parameter, over how far it moved; as it is where it did not move."""
    moved = np.abs(expected - start).max() or 1.0
    return float(max(0.0, np.abs(expected - found).max() - 1.2e-7 * np.abs(expected).max()) / moved)


def main() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    of_params, _ = parameter_shardings(params(0), RULES, mesh)
    report = {}
    for name in READS:
        settings = {"min_8bit_size": 1000} if name.endswith("8bit") else {}
        settings |= {"prodigy_initial_estimate": 0.1} if name == "prodigy" else {}  # or nothing would move
        settings |= {"block_size": 100} if name == "came_8bit" else {}
        rate = 1.0 if name == "prodigy" else 0.1
        config = OptimizerConfig(name=name, learning_rate=rate, weight_decay=0.1, frozen=("proj_out/bias",), **settings)
        optimizer = make_optimizer(config, STEPS, params(0))
        abstract = jax.eval_shape(optimizer.init, params(0))
        shardings = state_shardings(abstract, of_params, mesh)

        def step(tree, state, grads, optimizer=optimizer):
            updates, state = optimizer.update(grads, state, tree)
            return optax.apply_updates(tree, updates), state

        def run(place_params, place_state, optimizer=optimizer, step=step):
            tree = jax.device_put(params(0), place_params)
            init = jax.jit(optimizer.init, out_shardings=place_state)
            state = init.lower(tree).compile(QUICKLY)(tree)
            grads = jax.device_put(params(1), place_params)
            compiled = jax.jit(step, out_shardings=(place_params, place_state)).lower(tree, state, grads)
            compiled = compiled.compile(QUICKLY)
            for number in range(STEPS):
                grads = jax.device_put(params(1 + number), place_params)
                tree, state = compiled(tree, state, grads)
            return tree, state, compiled.as_text()

        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        expected, expected_state, _ = run(one, one)
        found, state, program = run(of_params, shardings)
        differences = jax.tree.map(relative_difference, *map(jax.device_get, (expected, found, params(0))))
        codes = [
            float((np.asarray(a) != np.asarray(b)).mean())
            for a, b in zip(jax.tree.leaves(expected_state), jax.tree.leaves(state))
            if a.dtype in (jnp.int8, jnp.uint8)
        ]
        report[name] = {
            "differences": dict(parameter_paths(differences)),
            "codes": codes,
            "gathered": [
                math.prod(map(int, shape.split(","))) for shape in re.findall(r"\[([\d,]+)\]\S* all-gather\(", program)
            ],
            "specs": {path: [*leaf.sharding.spec] for path, leaf in parameter_paths(state).items()},
            "largest": max(shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards),
            "whole": max(leaf.nbytes for leaf in jax.tree.leaves(state)),
        }
    with open(sys.argv[1], "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main()
