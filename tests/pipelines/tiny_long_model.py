"""A tiny real LongSANA: in memory with latents that are pixels, and a directory with a Wan autoencoder."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from kernels.typing import PyTree
from sana_jax.autoencoders import PixelVideoAutoencoder
from sana_jax.autoencoders.wan import init_params
from sana_jax.autoencoders.wan_autoencoder import WanAutoencoder
from sana_jax.autoencoders.wan_config import WanConfig
from sana_jax.diffusion.samplers import LongSanaSampler, to_scheduler_config
from sana_jax.models.sana_video import SanaVideoConfig, SanaVideoTransformer
from sana_jax.pipelines.families import abstract_params
from sana_jax.pipelines.long_video import LongSanaVideoPipeline
from sana_jax.pipelines.model_directory import SamplingDefaults
from sana_jax.text_encoders import WordEncoder

WORDS = ("a", "handwritten", "zero", "one", "seven")
PROMPT = "a handwritten seven"
BLOCK = 3


def random_like(shapes: PyTree, seed: int) -> PyTree:
    """Parameters of these shapes that are not at their initial values."""
    leaves, structure = jax.tree.flatten(shapes)
    draw = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [0.3 * draw.standard_normal(x.shape, np.float32) for x in leaves])


def tiny_wan(**changes: Any) -> WanConfig:
    """A Wan autoencoder with 4 channels everywhere."""
    given = {"base_dim": 4, "z_dim": 4, "dim_mult": (1, 1, 1, 1), "latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4}
    return WanConfig(**{**given, **changes})


def tiny_pipeline(*, wan: bool | WanConfig = False) -> LongSanaVideoPipeline:
    """Gray videos of 8 x 8 pixels in blocks of three frames; with ``wan`` of 16 x 16 in colour, from latents."""
    autoencoder, side = PixelVideoAutoencoder(1), 8
    if wan:
        shape = wan if isinstance(wan, WanConfig) else tiny_wan()
        params = random_like(jax.eval_shape(lambda: init_params(shape, jax.random.key(0))), 1)
        autoencoder, side = WanAutoencoder.from_params(shape, params), 16
    config = SanaVideoConfig(
        in_channels=autoencoder.latent_channels,
        out_channels=autoencoder.latent_channels,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
        rope_max_seq_len=1024,
    )
    transformer = SanaVideoTransformer(config, attention_epsilon=1e-8)
    return LongSanaVideoPipeline(
        transformer,
        random_like(abstract_params(transformer), 0),
        LongSanaSampler(block_frames=BLOCK),
        WordEncoder(WORDS, embedding_dim=12, max_length=5),
        autoencoder,
        SamplingDefaults(guidance_scale=1.0, num_inference_steps=4, height=side, width=side, frames=7, fps=4.0),
    )


def as_longsana(video_model: pathlib.Path, directory: pathlib.Path) -> pathlib.Path:
    """A copy of a SANA-Video directory that says of itself that it is LongSANA, with blocks of three latent frames."""
    shutil.copytree(video_model, directory)
    index = json.loads((directory / "model_index.json").read_text())
    index |= {"_class_name": "LongSanaVideoPipeline", "scheduler": ["sana_jax", "LongSanaScheduler"]}
    (directory / "model_index.json").write_text(json.dumps(index))
    scheduler = to_scheduler_config(LongSanaSampler(block_frames=BLOCK))
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return directory
