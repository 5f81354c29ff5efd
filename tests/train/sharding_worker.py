"""Trains a few steps over a mesh of simulated devices and writes down what happened.

    python -m tests.train.sharding_worker OUTPUT.npz data=2 fsdp=2 tensor=2 [accumulation=2]

The number of devices is the product of the axes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys

from tests.simulated_devices import simulated_devices

AXES = {name: int(size) for name, size in (word.split("=") for word in sys.argv[2:])}
ACCUMULATION = AXES.pop("accumulation", 1)
# The partitioner decides the same without them, and compilation takes half as long.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = simulated_devices(math.prod(AXES.values()))

import jax  # noqa: E402
import numpy as np  # noqa: E402

from tests.train.tiny_run import mesh_config, tiny_config, tiny_run  # noqa: E402
from train.sharding import parameter_paths  # noqa: E402

STEPS = 4


def main() -> None:
    config = tiny_config(mesh=mesh_config(**AXES), accumulation=ACCUMULATION)
    # Adam's update is a gradient over its own size, which scales the smallest gradients' rounding up to whole steps
    # (where linear attention's ReLU switches a channel off they are nothing but rounding). With an epsilon above the
    # gradients it is in proportion to them: rounding stays rounding over several steps.
    optimizer = dataclasses.replace(config.optimizer, epsilon=1e-3, learning_rate=1e-2)
    config = dataclasses.replace(config, optimizer=optimizer)
    run = tiny_run(config)
    jax.set_mesh(run.mesh)
    step = run.compiled_step()
    state = run.initialize()
    results = {f"initial/{path}": np.asarray(leaf) for path, leaf in parameter_paths(state.params).items()}
    rows = []
    for _ in range(STEPS):
        state, metrics = step(state, run.next_batch())
        rows.append({name: np.asarray(value) for name, value in metrics._asdict().items() if name != "figures"})
    for name in rows[0]:
        results[f"metrics/{name}"] = np.stack([row[name] for row in rows])
    shards = {}
    for path, leaf in parameter_paths(state).items():
        shards[path] = [leaf.size, max(shard.data.size for shard in leaf.addressable_shards)]
        results[f"state/{path}"] = np.asarray(leaf)
    memory = step.memory_analysis()
    report = {
        "shards": shards,
        "whole": run.plan.whole,
        "temporary": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "flops": step.cost_analysis()["flops"],
        "program": step.as_text(),
    }
    np.savez(sys.argv[1], report=json.dumps(report), **results)


if __name__ == "__main__":
    main()
