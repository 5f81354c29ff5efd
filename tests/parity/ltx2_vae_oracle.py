"""The PyTorch side of the LTX-2 autoencoder's tests: tiny random models, inputs, and their weights in our layout."""

from __future__ import annotations

import functools

import jax
import numpy as np
import torch
from diffusers import AutoencoderKLLTX2Video

from sana_jax.autoencoders.ltx2 import init_params
from sana_jax.autoencoders.ltx2_config import LTX2AutoencoderConfig
from sana_jax.weights.rules import read_params
from sana_jax.weights.tables.ltx2_vae import ltx2_vae_rules
from tests.parity.dc_ae_oracle import StateDict, channels_first, channels_last, draw, relative_error

__all__ = ["channels_first", "channels_last", "draw", "relative_error"]

# More threads than cores that are free make models of this size many times slower.
torch.set_num_threads(1)

LATENT_CHANNELS = 8
SMALL = {
    "latent_channels": LATENT_CHANNELS,
    "block_out_channels": (8, 16, 16, 32),
    "decoder_block_out_channels": (8, 16, 32),
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 4,
    "decoder_causal": False,
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
VARIANTS = {
    "published order": {},
    # other strides, paddings, numbers of blocks and widths; stages without residuals; factors 8 and 2
    "another order": {
        "block_out_channels": (4, 8),
        "down_block_types": ("LTX2VideoDownBlock3D",) * 2,
        "decoder_block_out_channels": (8, 8),
        "layers_per_block": (2, 1, 2),
        "decoder_layers_per_block": (1, 2, 2),
        "spatio_temporal_scaling": True,
        "decoder_spatio_temporal_scaling": True,
        "decoder_inject_noise": False,
        "downsample_type": ("temporal", "spatial"),
        "upsample_type": ("temporal", "spatial"),
        "upsample_residual": (False, True),
        "upsample_factor": (2, 1),
        "patch_size": 2,
        "encoder_spatial_padding_mode": "reflect",
        "decoder_spatial_padding_mode": "zeros",
        "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 2,
        "scaling_factor": 1.3,
    },
    # compiles fast; factors 4 and 2
    "one stage": {
        "block_out_channels": (16,),
        "down_block_types": ("LTX2VideoDownBlock3D",),
        "decoder_block_out_channels": (16,),
        "layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "spatio_temporal_scaling": (True,),
        "decoder_spatio_temporal_scaling": (True,),
        "decoder_inject_noise": (False, False),
        "downsample_type": ("spatiotemporal",),
        "upsample_type": ("spatiotemporal",),
        "upsample_residual": (True,),
        "upsample_factor": (2,),
        "patch_size": 2,
        "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 2,
    },
}


def fields(variant: str, **changes) -> dict:
    return SMALL | VARIANTS[variant] | changes


def jax_config(variant: str, **changes) -> LTX2AutoencoderConfig:
    return LTX2AutoencoderConfig(**fields(variant, **changes))


def randomise(model: AutoencoderKLLTX2Video, seed: int) -> AutoencoderKLLTX2Video:
    """Every parameter and statistic random; decoded frames stay within [-1, 1], so that clamping hides nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            values = torch.randn(tensor.shape, generator=generator)
            if name == "latents_std":
                tensor.copy_((0.4 * values).exp())
            elif tensor.ndim == 1:
                tensor.copy_(0.2 * values)
            else:
                tensor.copy_(values / tensor[0].numel() ** 0.5)
            if name.startswith("decoder.conv_out"):
                tensor.mul_(0.2)
    return model.eval()


@functools.cache
def torch_model(variant: str, dtype: torch.dtype = torch.float32) -> AutoencoderKLLTX2Video:
    """The tiny model of a variant; do not change it."""
    return randomise(AutoencoderKLLTX2Video(**fields(variant)), list(VARIANTS).index(variant)).to(dtype)


def abstract_params(config: LTX2AutoencoderConfig) -> dict:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


@functools.cache
def params_for(variant: str) -> dict:
    config = jax_config(variant)
    state = torch_model(variant).state_dict()
    return read_params(StateDict("the model", state), ltx2_vae_rules(config), abstract_params(config))


def torch_moments(model: AutoencoderKLLTX2Video, videos: np.ndarray) -> np.ndarray:
    """Means and log-variances side by side as the network gives them, for a channels-last video."""
    with torch.no_grad():
        return channels_last(model.encode(channels_first(videos).to(model.dtype)).latent_dist.parameters)


def torch_decoded(model: AutoencoderKLLTX2Video, latents: np.ndarray, causal: bool | None = None) -> np.ndarray:
    """Decoded frames, channels-last."""
    with torch.no_grad():
        return channels_last(model.decode(channels_first(latents).to(model.dtype), causal=causal).sample)


def pipelines_latents(model: AutoencoderKLLTX2Video, mean: torch.Tensor) -> torch.Tensor:
    """The encoder's means as the world model's pipeline normalises them."""
    center, deviation = (tensor.view(1, -1, 1, 1, 1).float() for tensor in (model.latents_mean, model.latents_std))
    return (mean.float() - center) * model.config.scaling_factor / deviation


def pipelines_encode(model: AutoencoderKLLTX2Video, videos: np.ndarray) -> np.ndarray:
    """Latents of a channels-last video as the world model's pipeline makes them."""
    with torch.no_grad():
        mode = model.encode(channels_first(videos).to(model.dtype)).latent_dist.mode()
        return channels_last(pipelines_latents(model, mode))


def pipelines_decode(model: AutoencoderKLLTX2Video, latents: np.ndarray, causal: bool | None = None) -> np.ndarray:
    """Frames of channels-last latents as the world model's pipeline makes them."""
    center, deviation = (tensor.view(1, -1, 1, 1, 1).float() for tensor in (model.latents_mean, model.latents_std))
    with torch.no_grad():
        latents = channels_first(latents) / model.config.scaling_factor * deviation + center
        return channels_last(model.decode(latents.to(model.dtype), causal=causal).sample)
