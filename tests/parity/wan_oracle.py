"""The PyTorch side of the Wan parity tests: tiny random models, their inputs, and their weights in our layout."""

from __future__ import annotations

import functools

import jax
import numpy as np
import torch
from diffusers import AutoencoderKLWan

from sana_jax.autoencoders.wan import init_params
from sana_jax.autoencoders.wan_config import WanConfig
from sana_jax.weights.rules import read_params
from sana_jax.weights.tables.wan import wan_rules
from tests.parity.dc_ae_oracle import StateDict, channels_first, channels_last, draw, relative_error

__all__ = ["channels_first", "channels_last", "draw", "relative_error"]

# More threads than cores that are free make models of this size many times slower.
torch.set_num_threads(1)

SMALL = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2, 3],
    "num_res_blocks": 1,
    "latents_mean": (-0.7571, 0.1075, 1.5508, -0.0715),
    "latents_std": (2.8184, 1.4541, 0.3275, 1.1253),
}
VARIANTS = {
    "published order": {},
    # widths of the two halves differ, frames are halved where the pictures are largest, and two blocks follow another
    "another order": {
        "decoder_base_dim": 6,
        "dim_mult": [2, 1, 3],
        "temperal_downsample": [True, False],
        "num_res_blocks": 2,
        "scale_factor_temporal": 2,
        "scale_factor_spatial": 4,
    },
    # compiles fast
    "two levels": {
        "dim_mult": [1, 2],
        "temperal_downsample": [True],
        "scale_factor_temporal": 2,
        "scale_factor_spatial": 2,
    },
}


def fields(variant: str) -> dict:
    return SMALL | VARIANTS[variant]


def jax_config(variant: str) -> WanConfig:
    return WanConfig(**fields(variant))


def randomise(model: AutoencoderKLWan, seed: int) -> AutoencoderKLWan:
    """Every parameter random; decoded frames stay within [-1, 1], so that clamping hides nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma"):
                parameter.copy_(1 + 0.2 * values)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * values)
            else:
                parameter.copy_(values / parameter[0].numel() ** 0.5)
            if name.startswith("decoder.conv_out"):
                parameter.mul_(0.4)
    return model.eval()


@functools.cache
def torch_model(variant: str, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    """The tiny model of a variant; do not change it."""
    return randomise(AutoencoderKLWan(**fields(variant)), list(VARIANTS).index(variant)).to(dtype)


def abstract_params(config: WanConfig) -> dict:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


@functools.cache
def params_for(variant: str) -> dict:
    config = jax_config(variant)
    state = torch_model(variant).state_dict()
    return read_params(StateDict("the model", state), wan_rules(config), abstract_params(config))


def torch_moments(model: AutoencoderKLWan, videos: np.ndarray) -> np.ndarray:
    """Means and log-variances side by side as the network gives them, for a channels-last video."""
    with torch.no_grad():
        return channels_last(model.encode(channels_first(videos).to(model.dtype)).latent_dist.parameters)


def torch_decoded(model: AutoencoderKLWan, latents: np.ndarray) -> np.ndarray:
    """Decoded frames, channels-last."""
    with torch.no_grad():
        return channels_last(model.decode(channels_first(latents).to(model.dtype)).sample)


def statistics(variant: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and inverse of the standard deviation, as the pipelines of diffusers make them."""
    config = torch_model(variant).config
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, 1.0 / std


def quick_compile(name, function, *arguments, say=print, identity=None):
    """``compile_ahead`` for programs of which only values are wanted: LLVM's optimiser is most of the compile time."""
    say(f"compiling {name} ...")
    return function.lower(*arguments).compile(compiler_options={"xla_backend_optimization_level": 0})
