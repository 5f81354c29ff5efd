"""Runs SANA-WM on one device and with its frames split over simulated ones, and writes down how much they differ.

python -m tests.models.context_parallel_worker OUTPUT.json CASE [gradients]
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys

from tests.simulated_devices import simulated_devices

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = simulated_devices(4)

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sana_jax.models.context_parallel import context_parallel
from sana_jax.models.sana_wm import SanaWMConfig, SanaWMTransformer, init_params
from sana_jax.models.sharding_rules import SANA_WM
from train.sharding import AXES, BATCH_AXES, batch_stays_cut, parameter_shardings

CONFIG = SanaWMConfig(
    in_channels=4,
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    softmax_every_n=2,
    linear_head_dim=8,
    chunk_plucker_channels=6,
    chunk_plucker_post_attn_blocks=2,
    caption_channels=6,
    mlp_ratio=2.0,
)
BATCH, SIZE, CAPTION_TOKENS = 2, (2, 3), 3
# name: (frames, axes of the mesh, changes of the configuration, of the network, and of the call; padded frames)
CASES = {
    # two devices' worth of frames are filled up, and a convolution's neighbours are two devices away
    "bidirectional over 4": (6, {"context": 4}, {"revision": "legacy"}, {}, {}, 0),
    # borders of chunks within devices and between them, those of the convolution elsewhere, and padding
    "chunks over 2, parameters over 2": (
        7,
        {"context": 2, "fsdp": 2},
        {"revision": "current"},
        {"remat": "full"},
        {"block_starts": (0, 3, 4), "convolution_starts": (0, 2, 4, 6)},
        1,
    ),
    "chunks over 4, no filling up": (
        8,
        {"context": 4},
        {"revision": "legacy", "k_conv_only": False, "num_layers": 3},
        {"scan_blocks": False},
        {"block_starts": (0, 2, 5), "first_frame": 3},
        0,
    ),
    "bidirectional over 2": (8, {"context": 2, "data": 2}, {"ffn_type": "mlp", "use_pe": False}, {}, {}, 2),
}


def draw_params(config: SanaWMConfig):
    """Random numbers everywhere, also where training starts with zeros."""
    shapes = jax.eval_shape(lambda: init_params(SanaWMTransformer(config), jax.random.key(0)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        numbers = rng.standard_normal(leaf.shape).astype(np.float32)
        if name.endswith("scale"):
            return 1 + 0.2 * numbers
        return numbers / math.sqrt(leaf.shape[-2]) if name.endswith("kernel") and "conv_" not in name else 0.5 * numbers

    return jax.tree_util.tree_map_with_path(draw, shapes)


def draw_inputs(frames: int, padded: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    inputs = {
        "hidden_states": normal(BATCH, frames, *SIZE, CONFIG.in_channels),
        "encoder_hidden_states": normal(BATCH, CAPTION_TOKENS, CONFIG.caption_channels),
        "timestep": rng.uniform(0, 1000, (BATCH, frames)).astype(np.float32),
        "encoder_attention_mask": np.array([[1, 1, 0], [1, 1, 1]], np.int32),
        "camera_conditions": draw_camera(rng, frames),
        "chunk_plucker": normal(BATCH, frames, *SIZE, CONFIG.chunk_plucker_channels),
    }
    if padded:
        inputs["frame_valid_mask"] = np.arange(frames) < np.array([[frames], [frames - padded]])
    return inputs


def draw_camera(rng: np.random.Generator, frames: int) -> np.ndarray:
    """A camera that turns about its vertical axis and moves away."""
    angles = 0.15 * np.arange(frames)
    poses = np.zeros((BATCH, frames, 4, 4))
    poses[..., 1, 1] = poses[..., 3, 3] = 1
    poses[..., 0, 0] = poses[..., 2, 2] = np.cos(angles)
    poses[..., 0, 2], poses[..., 2, 0] = np.sin(angles), -np.sin(angles)
    # away from the origin: what turns a ray's features alone does not make them longer, but for rounding, and there
    # the gradient by the camera has a kink
    poses[..., :3, 3] = rng.standard_normal((BATCH, 1, 3)) * (1 + 0.4 * np.arange(frames)[:, None])
    height, width = SIZE
    intrinsics = np.broadcast_to([0.9 * width, 1.1 * width, 0.45 * width, 0.6 * height], (BATCH, frames, 4))
    return np.concatenate([poses.reshape(BATCH, frames, 16), intrinsics], axis=-1).astype(np.float32)


def run(name: str, gradients: bool) -> dict[str, float]:
    """By what part of its own size each array differs: the velocity, and the gradient by each parameter and input."""
    frames, axes, config, network, call, padded = CASES[name]
    transformer = SanaWMTransformer(dataclasses.replace(CONFIG, **config), softmax_dtype=None, **network)
    params, inputs = draw_params(transformer.config), draw_inputs(frames, padded)
    weights = np.random.default_rng(2).standard_normal(inputs["hidden_states"].shape).astype(np.float32)
    differentiable = {name for name, array in inputs.items() if array.dtype == np.float32} - {"timestep"}
    moving = {name: inputs[name] for name in differentiable}
    still = {name: array for name, array in inputs.items() if name not in differentiable}

    def evaluate(apply):
        def loss(arrays, still):
            params, moving = arrays
            with batch_stays_cut(BATCH):
                velocity = apply({"params": params}, **moving, **still, **call)
            return (velocity * weights).sum(), velocity

        def values(arrays, still):
            return {"velocity": loss(arrays, still)[1]}

        def values_and_gradients(arrays, still):
            (_, velocity), found = jax.value_and_grad(loss, has_aux=True)(arrays, still)
            return {"velocity": velocity, "gradient": found}

        return jax.jit(values_and_gradients if gradients else values)

    expected = evaluate(transformer.apply)((params, moving), still)
    sizes = [axes.get(axis, 1) for axis in AXES]
    devices = jax.devices()[: math.prod(sizes)]
    mesh = jax.make_mesh(tuple(sizes), AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))
    with jax.set_mesh(mesh):
        own_params = jax.device_put(params, parameter_shardings(params, SANA_WM, mesh)[0])
        own, own_still = jax.device_put((moving, still), NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
        found = evaluate(context_parallel(transformer).apply)((own_params, own), own_still)
    paths = jax.tree_util.tree_leaves_with_path(expected)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): difference(mine, wanted)
        for (path, wanted), mine in zip(paths, jax.tree.leaves(found), strict=True)
    }


def difference(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    size = np.linalg.norm(expected)
    # arrays of nothing but rounding are compared with rounding
    return float(np.linalg.norm(found - expected) / max(size, 1e-3))


def main() -> None:
    output, case, *more = sys.argv[1:]
    with jax.default_matmul_precision("highest"):
        report = run(case, gradients=more == ["gradients"])
    with open(output, "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main()
