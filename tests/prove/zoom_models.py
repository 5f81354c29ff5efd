"""Small models to teach zoom to: a SANA on pixels that has learned nothing yet, and a SigLIP with random weights."""

from __future__ import annotations

import json
import pathlib

import jax

from kernels.typing import PyTree
from sana_jax.autoencoders import PixelAutoencoder
from sana_jax.diffusion.samplers import DPMSolver
from sana_jax.models.sana import SanaConfig, SanaTransformer, init_params
from sana_jax.models.siglip import SiglipVision, SiglipVisionConfig
from sana_jax.models.siglip import init_params as init_siglip
from sana_jax.pipelines.model_directory import SamplingDefaults, write_model_directory
from sana_jax.text_encoders import WordEncoder
from sana_jax.weights import save_params
from sana_jax.weights.components import CONVERTED

WORDS = ("china", "flower")  # the photographs' names, which are their captions
SIGLIP = SiglipVisionConfig(
    hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=4
)


def network(size: int, heads: int = 4, layers: int = 3) -> SanaConfig:
    """The digits preset's network, for colour pictures of size x size pixels."""
    width = 16 * heads
    return SanaConfig(
        in_channels=3,
        out_channels=3,
        num_attention_heads=heads,
        attention_head_dim=16,
        num_layers=layers,
        num_cross_attention_heads=width // 32,
        cross_attention_head_dim=32,
        cross_attention_dim=width,
        caption_channels=32,
        sample_size=size,
        patch_size=4,
        qk_norm="rms_norm_across_heads",
        timestep_scale=0.001,
    )


def write_model(directory: pathlib.Path, config: SanaConfig, params: PyTree | None = None) -> pathlib.Path:
    """Writes a model directory as ``convert.main import`` would, without ``params`` an untrained one; returns it."""
    size = config.sample_size
    if params is None:
        params = init_params(SanaTransformer(config), jax.random.key(0))
    save_params(directory / "transformer" / CONVERTED, params)
    write_model_directory(
        directory,
        transformer_config=config,
        sampler=DPMSolver(flow_shift=3.0),
        text_encoder=WordEncoder(WORDS, embedding_dim=config.caption_channels, max_length=2),
        autoencoder=PixelAutoencoder(3),
        defaults=SamplingDefaults(guidance_scale=1.0, num_inference_steps=20, height=size, width=size),
    )
    return directory


def write_siglip(directory: pathlib.Path, config: SiglipVisionConfig = SIGLIP, seed: int = 0) -> pathlib.Path:
    """Writes a SigLIP of random weights, whose vectors still tell pictures apart; returns its directory."""
    save_params(directory / CONVERTED, init_siglip(SiglipVision(config), jax.random.key(seed)))
    (directory / "config.json").write_text(
        json.dumps({"model_type": "siglip_vision_model", **{name: getattr(config, name) for name in _SHAPE}})
    )
    side = {"height": config.image_size, "width": config.image_size}
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "SiglipImageProcessor", "size": side})
    )
    return directory


_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)
