"""The PyTorch side of the world model's pipeline tests: a tiny random SanaWMPipeline, and its runs with given noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    SanaWMPipeline,
    SanaWMTransformer3DModel,
)
from diffusers.pipelines.sana_wm import pipeline_sana_wm
from transformers import Gemma2ForCausalLM

from tests.parity import ltx2_vae_oracle, sana_wm_oracle
from tests.parity.pipeline_oracle import make_text_encoder, make_tokenizer, randomise

# of the autoencoder "one stage"
TEMPORAL, SPATIAL, CHANNELS = 2, 4, ltx2_vae_oracle.LATENT_CHANNELS
TRANSFORMER = {
    **sana_wm_oracle.TINY,
    **sana_wm_oracle.TWO,
    "in_channels": CHANNELS,
    "caption_channels": 24,
    "chunk_plucker_channels": 6 * TEMPORAL,
}


def make_pipeline() -> SanaWMPipeline:
    """A tiny pipeline, with every parameter random; one block with the delta rule, one with softmax."""
    text_encoder = Gemma2ForCausalLM(make_text_encoder().config).eval()
    randomise(text_encoder.model, torch.Generator().manual_seed(5))
    pipeline = SanaWMPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=text_encoder,
        vae=ltx2_vae_oracle.randomise(AutoencoderKLLTX2Video(**ltx2_vae_oracle.fields("one stage")), 3),
        transformer=sana_wm_oracle.randomise(SanaWMTransformer3DModel(**TRANSFORMER), 4),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=9.8),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(directory: Path) -> SanaWMPipeline:
    """Saves the pipeline as it is published and returns it."""
    pipeline = make_pipeline()
    pipeline.save_pretrained(directory)
    return pipeline


def noise(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Unit normal latents (1, C, T, h, w) of a video of ``frames`` x ``height`` x ``width`` pixels."""
    shape = (1, CHANNELS, 1 + (frames - 1) // TEMPORAL, height // SPATIAL, width // SPATIAL)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(pipeline: SanaWMPipeline, monkeypatch, latents: np.ndarray, **arguments):
    """The pipeline's output with this noise; softmax layers keep float32."""

    def given(shape, **_):
        assert tuple(shape) == latents.shape
        return torch.from_numpy(latents.copy())

    with monkeypatch.context() as patched, sana_wm_oracle.without_rounding(), torch.no_grad():
        patched.setattr(pipeline_sana_wm, "randn_tensor", given)
        return pipeline(**arguments)


def drifting_camera(frames: int, seed: int = 0) -> np.ndarray:
    """Rigid camera-to-world matrices (F, 4, 4) whose first is not the identity."""
    rng = np.random.default_rng(seed)
    start = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    start *= np.sign(np.linalg.det(start))
    step = np.linalg.qr(np.eye(3) + 0.05 * rng.standard_normal((3, 3)))[0]
    step = step * np.sign(np.diag(step))
    poses = np.tile(np.eye(4), (frames, 1, 1))
    for frame in range(frames):
        poses[frame, :3, :3] = start @ np.linalg.matrix_power(step, frame)
        poses[frame, :3, 3] = [1 + 0.1 * frame, 0.2, -0.05 * frame]
    return poses.astype(np.float32)
