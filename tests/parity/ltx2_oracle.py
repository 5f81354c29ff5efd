"""The PyTorch side of the LTX-2 parity tests: tiny random models, their inputs, their weights in our layout."""

from __future__ import annotations

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.transformers.transformer_sana_wm_refiner import (
    SanaWMLTX2RefinerTransformer3DModel,
    SanaWMRefinerKVCache,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

from sana_jax.models import ltx2, ltx2_connectors
from sana_jax.models.ltx2_config import LTX2Config
from sana_jax.models.ltx2_connectors import LTX2Connectors, LTX2ConnectorsConfig
from sana_jax.weights.rules import places, read_params
from sana_jax.weights.safetensors_files import TensorInfo
from sana_jax.weights.tables.ltx2 import AUDIO, connectors_rules, transformer_rules
from tests.parity.sana_oracle import to_numpy

torch.set_num_threads(1)

FPS = 16.0
AUDIO_SIZES = {
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
}
TINY = {
    "in_channels": 5,
    "out_channels": 6,
    "num_attention_heads": 2,
    "attention_head_dim": 14,  # a width of 28: two channel pairs that do not turn, as at full size
    "cross_attention_dim": 28,
    "num_layers": 2,
    "caption_channels": 12,
    **AUDIO_SIZES,
}
VARIANTS = {
    "split": {"rope_type": "split"},
    "split, gates": {"rope_type": "split", "gated_attn": True},
    "interleaved": {"attention_bias": False, "ff_bias": False, "norm_eps": 1e-5},
    "interleaved, gates": {"gated_attn": True, "attention_out_bias": False},
}
CONNECTORS = {
    "caption_channels": 16,
    "text_proj_in_factor": 4,
    "video_connector_num_attention_heads": 2,
    "video_connector_attention_head_dim": 8,
    "video_connector_num_layers": 2,
    "video_connector_num_learnable_registers": 4,
    "audio_connector_num_attention_heads": 2,
    "audio_connector_attention_head_dim": 8,
    "audio_connector_num_layers": 1,
    "audio_connector_num_learnable_registers": 4,
    "connector_rope_base_seq_len": 64,
}
CONNECTOR_VARIANTS = {
    "split": {"rope_type": "split"},
    "interleaved": {"video_gated_attn": True, "proj_bias": True},
    "no registers": {"video_connector_num_learnable_registers": None, "rope_type": "split"},
}

BATCH, PROMPT_TOKENS = 2, 5
GRID = (3, 2, 5)
MASK = np.ones((BATCH, PROMPT_TOKENS), np.int32)
MASK[0, 3:] = 0


class TorchSource:
    """Named tensors as what the tables read."""

    location = "a PyTorch model"

    def __init__(self, named: dict[str, torch.Tensor]) -> None:
        self._arrays = {name: to_numpy(tensor) for name, tensor in named.items()}
        self.tensors = {name: TensorInfo(array.dtype, array.shape) for name, array in self._arrays.items()}

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random, also those that start at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if name.endswith("scale_shift_table"):
                parameter.copy_(0.5 * draw)  # gates of either sign, none near 0 throughout
            elif "norm" in name:
                parameter.copy_(1 + 0.2 * draw)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * draw)
            elif name.endswith("registers"):
                parameter.copy_(draw)
            elif name.endswith(("to_q.weight", "to_k.weight")):
                parameter.copy_(2 * draw / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(draw / parameter[0].numel() ** 0.5)
            if ".to_k." in name:
                parameter.mul_(0.03)  # so small that the epsilon of the norm behind it shows
    return model.eval()


@functools.cache
def torch_model(variant: str) -> SanaWMLTX2RefinerTransformer3DModel:
    model = SanaWMLTX2RefinerTransformer3DModel(**{**TINY, **VARIANTS[variant]})
    return randomise(model, 1 + list(VARIANTS).index(variant))


@functools.cache
def torch_connectors(variant: str) -> LTX2TextConnectors:
    model = LTX2TextConnectors(**{**CONNECTORS, **CONNECTOR_VARIANTS[variant]})
    return randomise(model, 11 + list(CONNECTOR_VARIANTS).index(variant))


def jax_config(variant: str) -> LTX2Config:
    return LTX2Config(**{**TINY, **VARIANTS[variant]})


def connectors_config(variant: str) -> LTX2ConnectorsConfig:
    return LTX2ConnectorsConfig(**{**CONNECTORS, **CONNECTOR_VARIANTS[variant]})


def abstract_params(config: LTX2Config) -> dict:
    return jax.eval_shape(lambda: ltx2.init_params(ltx2.LTX2VideoTransformer(config), jax.random.key(0)))


def abstract_connectors(config: LTX2ConnectorsConfig) -> dict:
    return jax.eval_shape(lambda: ltx2_connectors.init_params(LTX2Connectors(config), jax.random.key(0)))


def our_params(named: dict[str, torch.Tensor], config: LTX2Config) -> dict:
    """Maps named tensors of a diffusers model (weights or their gradients) to our parameter tree, blocks stacked."""
    rules, abstract = transformer_rules(config), abstract_params(config)
    return read_params(TorchSource(named), rules, abstract, ignored=AUDIO)


def params_for(variant: str) -> dict:
    return jax.tree.map(jnp.asarray, our_params(torch_model(variant).state_dict(), jax_config(variant)))


def connectors_params(variant: str) -> dict:
    config, source = connectors_config(variant), TorchSource(torch_connectors(variant).state_dict())
    params = read_params(source, connectors_rules(config), abstract_connectors(config), ignored=AUDIO)
    return jax.tree.map(jnp.asarray, params)


def full_size(config: LTX2Config | LTX2ConnectorsConfig) -> tuple[torch.nn.Module, dict[str, tuple[int, ...]]]:
    """diffusers' model without memory, and the names and shapes of the tensors that our table asks for."""
    is_transformer = isinstance(config, LTX2Config)
    fields = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    with torch.device("meta"):
        model = (SanaWMLTX2RefinerTransformer3DModel if is_transformer else LTX2TextConnectors)(**fields)
    rules = (transformer_rules if is_transformer else connectors_rules)(config)
    abstract = (abstract_params if is_transformer else abstract_connectors)(config)
    return model, {name: place.shape for name, place in places(rules, abstract).items()}


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def inputs(variant: str, frames: int = GRID[0], per_frame: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """Latents, prompt and times in our layout."""
    config = jax_config(variant)
    times = np.random.default_rng(seed).uniform(0, 1000, (BATCH, frames)).astype(np.float32)
    return {
        "hidden_states": draw(BATCH, frames, *GRID[1:], config.in_channels, seed=seed),
        "encoder_hidden_states": draw(BATCH, PROMPT_TOKENS, config.caption_channels, seed=seed + 100),
        "timestep": times if per_frame else times[:, 0],
    }


def torch_forward(
    variant: str,
    arrays: dict[str, np.ndarray],
    first_frame: int = 0,
    cache: SanaWMRefinerKVCache | None = None,
    mode: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """diffusers' refiner on tokens: its output (B, T, H, W, C) and its inputs, which want gradients."""
    model = torch_model(variant) if dtype == torch.float32 else copy.deepcopy(torch_model(variant)).to(dtype)
    frames, height, width = arrays["hidden_states"].shape[1:4]
    leaves = {
        "hidden_states": torch.tensor(arrays["hidden_states"]).to(dtype).requires_grad_(),
        "encoder_hidden_states": torch.tensor(arrays["encoder_hidden_states"]).to(dtype).requires_grad_(),
    }
    times = arrays["timestep"] if arrays["timestep"].ndim == 2 else arrays["timestep"][:, None].repeat(frames, 1)
    out = model(
        hidden_states=leaves["hidden_states"].flatten(1, 3),
        encoder_hidden_states=leaves["encoder_hidden_states"],
        timestep=torch.from_numpy(np.repeat(times, height * width, axis=1)),
        video_rotary_emb=rotary_embedding(variant, list(range(first_frame, first_frame + frames)), (height, width)),
        encoder_attention_mask=torch.from_numpy(MASK),
        kv_cache=cache,
        kv_cache_mode=mode,
        return_dict=False,
    )[0]
    return out.unflatten(1, (frames, height, width)), leaves


def rotary_embedding(variant: str, positions: list[int], size: tuple[int, int], fps: float = FPS):
    build = torch_model(variant).build_rotary_emb_for_absolute_positions
    return build(BATCH, positions, *size, torch.device("cpu"), fps)


def torch_output_and_gradients(variant: str, arrays: dict, output_weights: np.ndarray) -> tuple[np.ndarray, dict]:
    """The output, and the gradients of the loss as ``{"params": tree, "hidden_states": ..., ...}``."""
    out, leaves = torch_forward(variant, arrays)
    weights = dict(torch_model(variant).named_parameters())
    wanted = {**leaves, **weights}
    loss = (out * torch.from_numpy(output_weights)).sum()
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    named = {name: gradient for name, gradient in zip(wanted, found) if gradient is not None}
    params = our_params({name: gradient for name, gradient in named.items() if name in weights}, jax_config(variant))
    return to_numpy(out), {"params": params} | {name: to_numpy(named[name]) for name in leaves}
