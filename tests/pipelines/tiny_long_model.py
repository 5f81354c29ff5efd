"""A tiny real LongSANA: in memory with latents that are pixels, and a directory with a Wan autoencoder."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import numpy as np

from sana_jax.autoencoders import PixelVideoAutoencoder
from sana_jax.diffusion.samplers import LongSanaSampler, to_scheduler_config
from sana_jax.models.sana_video import SanaVideoConfig, SanaVideoTransformer
from sana_jax.pipelines.families import abstract_params
from sana_jax.pipelines.long_video import LongSanaVideoPipeline
from sana_jax.pipelines.model_directory import SamplingDefaults
from sana_jax.text_encoders import WordEncoder

WORDS = ("a", "handwritten", "zero", "one", "seven")
PROMPT = "a handwritten seven"
BLOCK = 3


def tiny_pipeline(**changes) -> LongSanaVideoPipeline:
    """Gray videos of 8 x 8 pixels in blocks of three frames; ``changes`` are the sampler's."""
    config = SanaVideoConfig(
        in_channels=1,
        out_channels=1,
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
    leaves, structure = jax.tree.flatten(abstract_params(transformer))
    draw = np.random.default_rng(0)
    params = jax.tree.unflatten(structure, [0.3 * draw.standard_normal(x.shape, np.float32) for x in leaves])
    return LongSanaVideoPipeline(
        transformer,
        params,
        LongSanaSampler(**{"block_frames": BLOCK, **changes}),
        WordEncoder(WORDS, embedding_dim=12, max_length=5),
        PixelVideoAutoencoder(1),
        SamplingDefaults(guidance_scale=1.0, num_inference_steps=4, height=8, width=8, frames=7, fps=4.0),
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
