"""A world model small enough to be compiled many times: one block of each kind, seven frames of 2x3 tokens."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax.models.sana_wm import SanaWMConfig, SanaWMTransformer, init_params
from tests.parity.sana_wm_oracle import camera
from train.batch import CAMERA, PLUCKER, Batch

CONFIG = SanaWMConfig(
    in_channels=3,
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    softmax_every_n=2,
    linear_head_dim=8,
    conv_kernel_size=3,
    chunk_plucker_channels=12,
    chunk_plucker_post_attn_blocks=2,
    caption_channels=5,
    mlp_ratio=2.0,
)
ROWS, HEIGHT, WIDTH, CHANNELS = 2, 2, 3, CONFIG.in_channels


def transformer() -> SanaWMTransformer:
    """The network, without the rounding of softmax layers."""
    return SanaWMTransformer(CONFIG, softmax_dtype=None, scan_blocks=False)


def world_params(seed: int) -> Any:
    """Parameters of which none is as it is drawn."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(transformer(), jax.random.key(0)))

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        numbers = rng.standard_normal(leaf.shape).astype(np.float32)
        if name.endswith("scale"):
            return jnp.asarray(1 + 0.2 * numbers)
        if name.endswith("kernel") and "conv_" not in name:
            return jnp.asarray(numbers / math.sqrt(leaf.shape[-2]))
        return jnp.asarray(0.3 * numbers)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def world_batch(seed: int, rows: int = ROWS, frames: int = 7) -> Batch:
    """Random latents, captions and camera paths."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    mask = np.ones((rows, 3), np.int32)
    mask[0, 2] = 0
    conditions = {
        CAMERA: camera(rng, rows, frames, (HEIGHT, WIDTH)),
        PLUCKER: normal(rows, frames, HEIGHT, WIDTH, CONFIG.chunk_plucker_channels),
    }
    latents = normal(rows, frames, HEIGHT, WIDTH, CHANNELS)
    return Batch(latents, normal(rows, 3, CONFIG.caption_channels), mask, conditions)
