"""Compiles the train step of a preset for simulated devices and writes down what they would exchange.

    python -m tests.train.full_size_worker OUTPUT.json PRESET fsdp=8 [width=8] [remat=full]

``width`` divides heads and caption channels: a stand-in with all of the blocks that compiles in seconds.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time

from tests.simulated_devices import simulated_devices

WORDS = dict(word.split("=") for word in sys.argv[3:])
AXES = {name: int(size) for name, size in WORDS.items() if name in ("data", "fsdp", "tensor")}
# The partitioner decides the same without them, and compilation takes half as long.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = simulated_devices(math.prod(AXES.values()))

import jax  # noqa: E402

from tests.train.compiled_text import exchanges  # noqa: E402
from tests.train.presets import preset_run  # noqa: E402
from tests.train.tiny_run import mesh_config  # noqa: E402
from train.memory import compiled_bytes  # noqa: E402
from train.plan import estimated_memory  # noqa: E402
from train.sharding import make_mesh, parameter_paths  # noqa: E402


def main() -> None:
    mesh = make_mesh(mesh_config(**AXES))
    jax.set_mesh(mesh)
    run = preset_run(sys.argv[2], mesh, int(WORDS.get("width", 1)), WORDS.get("remat"))
    started = time.perf_counter()
    arguments = run.state.abstract, run.frozen, run.batch
    steps = [step.lower(*arguments).compile() for step in run.jitted_steps()]  # Sprint has two
    report = {
        "seconds": time.perf_counter() - started,
        "exchanges": [exchange for compiled in steps for exchange in exchanges(compiled.as_text())],
        "parameters": {
            path: [leaf.shape, leaf.sharding.shard_shape(leaf.shape)]
            for path, leaf in parameter_paths(run.frozen or run.state.abstract.params).items()
        },
        "trained": {
            path: [leaf.shape, leaf.sharding.shard_shape(leaf.shape)]
            for path, leaf in parameter_paths(run.state.abstract._replace(step=None)).items()
        },
        "layers": run.config.transformer.num_layers,
        "bytes": max(compiled_bytes(compiled) for compiled in steps),
        "estimated": estimated.total if (estimated := estimated_memory(run)) else None,
    }
    with open(sys.argv[1], "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main()
