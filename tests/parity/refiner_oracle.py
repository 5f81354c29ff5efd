"""The PyTorch side of the refiner's tests: a tiny random model as diffusers saves it, and its loop with given noise."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMLTX2RefinerTransformer3DModel
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.sana_wm import refiner
from transformers import AutoTokenizer, Gemma3ForConditionalGeneration
from transformers import Gemma3Config as TorchConfig

from tests.parity import ltx2_oracle
from tests.text_encoders import tiny_gemma

TEXT_TOKENS, CHANNELS, SIZE = 32, 8, (2, 3)
TRANSFORMER = {
    **ltx2_oracle.TINY, "in_channels": CHANNELS, "out_channels": CHANNELS, "caption_channels": 16, "rope_type": "split",
}  # fmt: skip
CONNECTORS = {
    **ltx2_oracle.CONNECTORS,
    "video_connector_num_learnable_registers": 8,
    "audio_connector_num_learnable_registers": 8,
    "rope_type": "split",
}
TEXT = {
    "head_dim": 8, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 3, "query_pre_attn_scalar": 8, "sliding_window": 7, "max_position_embeddings": 512,
    "sliding_window_pattern": 2, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}  # fmt: skip
VISION = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def save(directory: pathlib.Path) -> None:
    """A whole refiner without an autoencoder, every weight random."""
    torch.set_num_threads(1)
    tokenizer = tiny_gemma.gemma_like_tokenizer(begin_token=True)
    tiny_gemma.save_tokenizer(tokenizer, directory / "tokenizer", published_as_gemma=True)
    text = {**TEXT, "vocab_size": tokenizer.get_vocab_size()}
    encoder = Gemma3ForConditionalGeneration(TorchConfig(text_config=text, vision_config=VISION))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            scale = 1.0 if "embed" in name else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    pipeline = refiner.SanaWMLTX2Refiner(
        transformer=ltx2_oracle.randomise(SanaWMLTX2RefinerTransformer3DModel(**TRANSFORMER), 3),
        connectors=ltx2_oracle.randomise(LTX2TextConnectors(**CONNECTORS), 4),
        tokenizer=AutoTokenizer.from_pretrained(directory / "tokenizer"),
        text_encoder=encoder.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=None,
        text_max_sequence_length=TEXT_TOKENS,
    )
    pipeline.save_pretrained(directory)


def load(directory: pathlib.Path) -> refiner.SanaWMLTX2Refiner:
    parts: dict[str, Any] = {
        "transformer": SanaWMLTX2RefinerTransformer3DModel.from_pretrained(directory / "transformer").eval(),
        "connectors": LTX2TextConnectors.from_pretrained(directory / "connectors").eval(),
        "tokenizer": AutoTokenizer.from_pretrained(directory / "tokenizer"),
        "text_encoder": Gemma3ForConditionalGeneration.from_pretrained(
            directory / "text_encoder", attn_implementation="eager", dtype=torch.float32
        ).eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(directory / "scheduler"),
    }
    pipeline = refiner.SanaWMLTX2Refiner(**parts, vae=None, text_max_sequence_length=TEXT_TOKENS)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def refine(
    pipeline: refiner.SanaWMLTX2Refiner, monkeypatch, latents: np.ndarray, noise: np.ndarray, prompt: str, **options
) -> tuple[np.ndarray, list[list[int]]]:
    """The refined latents or their frames, and the frame positions of all tables of rotations in the loop's order."""
    positions, given = [], torch.from_numpy(noise)
    drawn = [0]
    build = type(pipeline.transformer).build_rotary_emb_for_absolute_positions

    def next_noise(shape, **_):
        begin, drawn[0] = drawn[0], drawn[0] + shape[2]
        return given[:, :, begin : drawn[0]]

    def recorded(self, *args, frame_positions, **rest):
        positions.append(frame_positions)
        return build(self, *args, frame_positions=frame_positions, **rest)

    with monkeypatch.context() as patched:
        patched.setattr(refiner, "randn_tensor", next_noise)
        patched.setattr(type(pipeline.transformer), "build_rotary_emb_for_absolute_positions", recorded)
        with torch.no_grad():
            out = pipeline(torch.from_numpy(latents), prompt, **{"output_type": "latent", **options})
    assert drawn[0] == noise.shape[2]
    return np.asarray(out), positions


def draw_video(frames: int, seed: int = 0, batch: int = 1) -> np.ndarray:
    """Latents of (B, C, T, h, w)."""
    return np.random.default_rng(seed).standard_normal((batch, CHANNELS, frames, *SIZE)).astype(np.float32)
