"""The PyTorch side of the video pipelines' parity tests: tiny random diffusers pipelines, saved as published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaImageToVideoPipeline,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)

from tests.parity import wan_oracle
from tests.parity.pipeline_oracle import INSTRUCTION, PROMPTS, make_text_encoder, make_tokenizer, picture, randomise

__all__ = ["INSTRUCTION", "PROMPTS", "make_pipeline", "noise", "picture", "save"]

LATENT_CHANNELS = 4
TRANSFORMER = {
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": 24,
    "mlp_ratio": 3.0,
    "sample_size": 30,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}
KINDS = {"video": SanaVideoPipeline, "image-to-video": SanaImageToVideoPipeline}


def make_pipeline(kind: str):
    """A tiny pipeline of a kind, with every parameter random; both kinds have the same weights."""
    generator = torch.Generator().manual_seed(5)
    parts = {
        "tokenizer": make_tokenizer(),
        "text_encoder": make_text_encoder(),
        "vae": AutoencoderKLWan(**{**wan_oracle.SMALL, "dim_mult": [1, 1, 1, 1], "base_dim": 4}),
        "transformer": SanaVideoTransformer3DModel(**TRANSFORMER),
        "scheduler": make_scheduler("dpm" if kind == "video" else "euler"),
    }
    for name in ("text_encoder", "transformer"):
        randomise(parts[name].eval(), generator)
    wan_oracle.randomise(parts["vae"], 3)
    pipeline = KINDS[kind](**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_scheduler(name: str):
    """The schedulers of the published video models."""
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=8.0)
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)


def noise(count: int, frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Unit normal latents (B, C, T, h, w) of videos of ``frames`` x ``height`` x ``width`` pixels."""
    shape = (count, LATENT_CHANNELS, (frames - 1) // 4 + 1, height // 8, width // 8)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def save(kind: str, directory: Path):
    """Saves the pipeline of a kind and returns it."""
    pipeline = make_pipeline(kind)
    pipeline.save_pretrained(directory)
    return pipeline
