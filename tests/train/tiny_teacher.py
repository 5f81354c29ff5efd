"""A video model of moving digits, with random weights, as a training run would leave it; and its trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs import load_preset
from configs.data import MovingDigitsDataConfig
from configs.serialization import to_dict
from sana_jax.diffusion.samplers import FlowEuler
from sana_jax.files import write_json
from sana_jax.models.sana_video import SanaVideoConfig, SanaVideoTransformer, init_params
from sana_jax.pipelines.model_directory import SamplingDefaults
from sana_jax.pipelines.text_to_video import SanaVideoPipeline
from train.data.video.moving_digits import MovingDigitsData
from train.make_trajectories import MakeTrajectoriesConfig

DATA = MovingDigitsDataConfig(digits=(3, 7), frames=3)
NETWORK = SanaVideoConfig(
    in_channels=1,
    out_channels=1,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    num_cross_attention_heads=1,
    cross_attention_head_dim=16,
    cross_attention_dim=16,
    caption_channels=DATA.embedding_dim,
    sample_size=6,
    patch_size=(1, 2, 2),
    rope_max_seq_len=64,
)
FLOW_SHIFT, NUM_STEPS, GUIDANCE = 3.0, 4, 2.0
TIMESTEPS = (1000, 900, 500)  # steps 0, 1 and 3 of the four


def save_teacher(directory: Path) -> Path:
    """Writes the model's directory."""
    transformer = SanaVideoTransformer(NETWORK)
    params = jax.jit(lambda: init_params(transformer, jax.random.key(0)))()
    generator = np.random.default_rng(0)
    # what begins as zero would hide what it is multiplied with
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf + 0.1 * generator.standard_normal(leaf.shape), np.float32), params
    )
    dataset = MovingDigitsData(DATA)
    pipeline = SanaVideoPipeline(
        transformer,
        params,
        FlowEuler(flow_shift=FLOW_SHIFT),
        dataset.text_encoder,
        dataset.autoencoder,
        SamplingDefaults(GUIDANCE, NUM_STEPS, DATA.canvas, DATA.canvas, frames=DATA.frames, fps=4.0),
    )
    pipeline.save_pretrained(directory)
    preset = load_preset("moving_digits")
    write_json(directory / "config.json", to_dict(preset) | {"data": to_dict(DATA), "transformer": to_dict(NETWORK)})
    return directory


def trajectories_config(teacher: Path, out: Path, **changes: Any) -> MakeTrajectoriesConfig:
    """Options for three batches, of which the last is not full."""
    values = {
        "num_steps": NUM_STEPS,
        "flow_shift": FLOW_SHIFT,
        "timesteps": TIMESTEPS,
        "batch_size": 3,
        "seed": 5,
        "device": "cpu",
        **changes,
    }
    return MakeTrajectoriesConfig(str(teacher), str(out), **values)
