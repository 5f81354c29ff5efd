"""The PyTorch side of the video pipelines' parity tests: tiny random diffusers pipelines, saved as published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLLTX2Video,
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaImageToVideoPipeline,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)

from tests.parity import ltx2_vae_oracle, wan_oracle
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
# as the 720p model: every latent is a token
TRANSFORMER_OF_LTX2 = TRANSFORMER | {
    "in_channels": ltx2_vae_oracle.LATENT_CHANNELS,
    "out_channels": ltx2_vae_oracle.LATENT_CHANNELS,
    "patch_size": (1, 1, 1),
    "sample_size": 22,
}
KINDS = {"video": SanaVideoPipeline, "image-to-video": SanaImageToVideoPipeline}


def make_pipeline(kind: str, autoencoder: str = "wan"):
    """A tiny pipeline of a kind, with every parameter random; both kinds have the same weights."""
    generator = torch.Generator().manual_seed(5)
    wan = autoencoder == "wan"
    parts = {
        "tokenizer": make_tokenizer(),
        "text_encoder": make_text_encoder(),
        "transformer": SanaVideoTransformer3DModel(**(TRANSFORMER if wan else TRANSFORMER_OF_LTX2)),
        "scheduler": make_scheduler("dpm" if kind == "video" else "euler"),
    }
    for name in ("text_encoder", "transformer"):
        randomise(parts[name].eval(), generator)
    if wan:
        vae = AutoencoderKLWan(**{**wan_oracle.SMALL, "dim_mult": [1, 1, 1, 1], "base_dim": 4})
        parts["vae"] = wan_oracle.randomise(vae, 3)
    else:
        vae = AutoencoderKLLTX2Video(**ltx2_vae_oracle.fields("published order"))
        parts["vae"] = ltx2_vae_oracle.randomise(vae, 3)
    pipeline = KINDS[kind](**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_scheduler(name: str):
    """The schedulers of the published video models."""
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=8.0)
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)


def noise(count: int, frames: int, height: int, width: int, seed: int = 0, autoencoder: str = "wan") -> np.ndarray:
    """Unit normal latents (B, C, T, h, w) of videos of ``frames`` x ``height`` x ``width`` pixels."""
    channels, temporal, spatial = (
        (LATENT_CHANNELS, 4, 8) if autoencoder == "wan" else (ltx2_vae_oracle.LATENT_CHANNELS, 8, 32)
    )
    shape = (count, channels, (frames - 1) // temporal + 1, height // spatial, width // spatial)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def save(kind: str, directory: Path, autoencoder: str = "wan"):
    """Saves the pipeline of a kind and returns it."""
    pipeline = make_pipeline(kind, autoencoder)
    pipeline.save_pretrained(directory)
    return pipeline
