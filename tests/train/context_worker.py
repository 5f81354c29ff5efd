"""Trains a small SANA-WM for two steps on one device, then over parameters x frames, and writes both down.

python -m tests.train.context_worker OUTPUT.npz
"""

from __future__ import annotations

import dataclasses
import os
import sys

from tests.simulated_devices import simulated_devices

os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = simulated_devices(4)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from configs import load_preset
from configs.schema import RunConfig
from tests.models.context_parallel_worker import CONFIG, draw_inputs
from tests.train.tiny_run import QUICKLY, mesh_config
from train.batch import CAMERA, PLUCKER, Batch
from train.networks import make_network
from train.objectives.flow_matching import FlowMatching
from train.recipes.whole import WholeTransformer
from train.sharding import AXES, batch_sharding, parameter_paths
from train.state_plan import plan_state
from train.step import make_train_step

STEPS, FRAMES = 2, 7


def tiny_config(**axes: int) -> RunConfig:
    preset = load_preset("moving_camera")
    # see sharding_worker: rounding stays rounding
    optimizer = dataclasses.replace(preset.optimizer, epsilon=1e-3, learning_rate=1e-2, warmup_steps=0)
    data = dataclasses.replace(preset.data, embedding_dim=CONFIG.caption_channels)
    return dataclasses.replace(
        preset, transformer=CONFIG, data=data, optimizer=optimizer, batch_size=2, mesh=mesh_config(**axes)
    )


def train(config: RunConfig) -> dict[str, np.ndarray]:
    sizes = [getattr(config.mesh, axis) for axis in AXES]
    devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    # without the rounding of softmax layers: of a number between two of bfloat16 it may choose either
    recipe = WholeTransformer(make_network(config.transformer, config.compute).clone(softmax_dtype=None))
    null = jnp.zeros((1, 3, CONFIG.caption_channels)), jnp.ones((1, 3), jnp.int32)
    objective = FlowMatching(recipe, config.flow, *null)
    with jax.set_mesh(mesh):
        plan = plan_state(config, recipe, None, mesh)
        state = plan.initialize.lower(None).compile(QUICKLY)(None)
        step = make_train_step(objective, plan.optimizer, config)
        given = draw_inputs(FRAMES, 0)
        conditions = {CAMERA: given["camera_conditions"], PLUCKER: given["chunk_plucker"]}
        names = ("hidden_states", "encoder_hidden_states", "encoder_attention_mask")
        batch = jax.device_put(Batch(*(given[name] for name in names), conditions), batch_sharding(mesh))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract)
        run = jax.jit(lambda state, batch: step(state, None, batch), out_shardings=(shardings, None))
        compiled, found = run.lower(state, batch).compile(QUICKLY), []
        for _ in range(STEPS):
            state, metrics = compiled(state, batch)
            found.append((metrics.loss, metrics.grad_norm, metrics.update_norm))
    results = {f"metrics/{i}": np.array(row) for i, row in enumerate(zip(*found))}
    kernel = state.params["delta_blocks"]["attn1"]["to_qkv"]["kernel"]
    results["parts"] = np.array(kernel.size // kernel.addressable_shards[0].data.size)
    return results | {f"params/{path}": np.asarray(leaf) for path, leaf in parameter_paths(state.params).items()}


def main() -> None:
    one, many = train(tiny_config()), train(tiny_config(fsdp=2, context=2))
    assert one.keys() == many.keys()
    np.savez(sys.argv[1], **{f"one/{k}": x for k, x in one.items()}, **{f"many/{k}": x for k, x in many.items()})


if __name__ == "__main__":
    main()
