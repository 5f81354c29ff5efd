"""The PyTorch side of the SANA-Video parity tests: tiny random models, their inputs, their weights in our layout."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import SanaVideoTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from sana_jax.models.sana_video import SanaVideoConfig
from tests.parity.sana_oracle import our_params as image_params
from tests.parity.sana_oracle import to_numpy

torch.set_num_threads(1)

TINY = {
    "in_channels": 5,
    "out_channels": 6,
    "num_attention_heads": 2,
    "attention_head_dim": 16,  # frame 8, row 4, column 4
    "num_layers": 3,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 32,
    "caption_channels": 12,
    "mlp_ratio": 3.0,
}
VARIANTS = {
    "patch-2": {},
    "patch-1": {"patch_size": (1, 1, 1), "in_channels": 7, "out_channels": 7},
    "plain": {"qk_norm": None, "attention_bias": True, "attention_head_dim": 10, "num_layers": 2, "norm_eps": 1e-5}
    | {"cross_attention_head_dim": 5, "cross_attention_dim": 20, "patch_size": (1, 1, 2)},
}

BATCH, CAPTION_TOKENS, FRAMES = 2, 5, 4
LATENT_SIZE = (6, 10)
MASK = np.ones((BATCH, CAPTION_TOKENS), np.int32)
MASK[0, 3:] = 0


@dataclasses.dataclass
class Inputs:
    """One batch in our layout; ``timestep`` is (B,) or (B, T)."""

    hidden_states: np.ndarray
    encoder_hidden_states: np.ndarray
    timestep: np.ndarray
    output_weights: np.ndarray  # the loss is the sum of the output times this

    def arrays(self) -> dict[str, np.ndarray]:
        fields = dataclasses.asdict(self)
        del fields["output_weights"]
        return fields


def jax_config(variant: str) -> SanaVideoConfig:
    return SanaVideoConfig(**{**TINY, **VARIANTS[variant]})


def draw_inputs(config: SanaVideoConfig, per_frame: bool = False, frames: int = FRAMES, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    size = (BATCH, frames, *LATENT_SIZE)
    timestep = np.array([997.0, 3.25], np.float32)
    if per_frame:
        timestep = rng.uniform(0, 1000, (BATCH, frames)).astype(np.float32)
        timestep[:, 0] = 0  # a clean first frame, as in image-to-video
    return Inputs(
        hidden_states=normal(*size, config.in_channels),
        encoder_hidden_states=normal(BATCH, CAPTION_TOKENS, config.caption_channels),
        timestep=timestep,
        output_weights=normal(*size, config.velocity_channels),
    )


@functools.cache
def torch_model(variant: str, dtype: torch.dtype = torch.float32) -> SanaVideoTransformer3DModel:
    """The tiny model of a variant with every parameter random, also those that start at zero; do not change it."""
    generator = torch.Generator().manual_seed(list(VARIANTS).index(variant))
    model = SanaVideoTransformer3DModel(**{**TINY, **VARIANTS[variant]}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if name.endswith("scale_shift_table"):
                parameter.copy_(0.5 * draw)  # gates of either sign, none near 0 throughout
            elif "norm" in name:
                parameter.copy_(1 + 0.2 * draw)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * draw)
            else:
                parameter.copy_(draw / parameter[0].numel() ** 0.5)
            # As in the image models' oracle: no query that the ReLU leaves a single small channel.
            if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
                parameter.add_(1.5 / parameter.shape[1])
            if name.startswith("transformer_blocks") and name.endswith("scale_shift_table"):
                parameter[0] += 1
    return model.to(dtype)


def our_params(tensors: dict[str, torch.Tensor], config: SanaVideoConfig) -> dict:
    """Maps named tensors of a diffusers model (weights or their gradients) to our parameter tree, blocks stacked."""
    patch = to_numpy(tensors["patch_embedding.weight"])  # (D, C, 1, rows, columns)
    temporal = [name for name in tensors if name.endswith("conv_temp.weight")]  # (D, D, 3, 1)
    others = {name: t for name, t in tensors.items() if name not in (*temporal, "patch_embedding.weight")}
    params = image_params(others, config)
    params["patch_embedding"]["kernel"] = patch.transpose(2, 3, 4, 1, 0).reshape(-1, patch.shape[0])
    kernels = [to_numpy(tensors[f"transformer_blocks.{i}.ff.conv_temp.weight"]) for i in range(config.num_layers)]
    stacked = np.stack([kernel[:, :, :, 0].transpose(2, 1, 0).reshape(-1, len(kernel)) for kernel in kernels])
    params["transformer_blocks"]["ff"]["conv_temp"] = {"kernel": stacked}
    return params


def params_for(variant: str) -> dict:
    return jax.tree.map(jnp.asarray, our_params(torch_model(variant).state_dict(), jax_config(variant)))


def per_token(timestep: np.ndarray, config: SanaVideoConfig) -> torch.Tensor:
    """Times as diffusers takes them: one per sample, or one per token."""
    if timestep.ndim == 1:
        return torch.from_numpy(timestep)
    height, width = (side // patch for side, patch in zip(LATENT_SIZE, config.patch_size[1:]))
    return torch.from_numpy(np.repeat(timestep, height * width, axis=1))


def torch_inputs(
    inputs: Inputs, mask: np.ndarray | None, config: SanaVideoConfig, dtype: torch.dtype = torch.float32
) -> dict:
    """The keyword arguments of the diffusers model; latent and caption are leaves that want gradients."""
    latent = torch.from_numpy(np.ascontiguousarray(inputs.hidden_states.transpose(0, 4, 1, 2, 3))).to(dtype)
    return {
        "hidden_states": latent.requires_grad_(),
        "encoder_hidden_states": torch.from_numpy(inputs.encoder_hidden_states).to(dtype).requires_grad_(),
        "timestep": per_token(inputs.timestep, config),
        "encoder_attention_mask": None if mask is None else torch.from_numpy(mask),
    }


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    return to_numpy(tensor).transpose(0, 2, 3, 4, 1)


def torch_output(variant: str, inputs: Inputs, mask: np.ndarray | None, dtype: torch.dtype) -> np.ndarray:
    """The output (B, T, H, W, C) as float32 numbers, computed in ``dtype``."""
    with torch.no_grad():
        model = torch_model(variant, dtype)
        out = model(**torch_inputs(inputs, mask, jax_config(variant), dtype), return_dict=False)[0]
    return channels_last(out)


def torch_output_and_gradients(variant: str, inputs: Inputs, mask: np.ndarray | None) -> tuple[np.ndarray, dict]:
    """The float32 output, and the gradients of the loss as ``{"params": tree, "hidden_states": ..., ...}``."""
    model, config = torch_model(variant), jax_config(variant)
    arguments = torch_inputs(inputs, mask, config)
    wanted = {"hidden_states": arguments["hidden_states"], "caption": arguments["encoder_hidden_states"]}
    weights = dict(model.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):  # the fused one's backward pass is good to 5e-4 beside a mask
        out = model(**arguments, return_dict=False)[0]
    loss = (out * torch.from_numpy(np.ascontiguousarray(inputs.output_weights.transpose(0, 4, 1, 2, 3)))).sum()
    found = torch.autograd.grad(loss, [*wanted.values(), *weights.values()])
    named = dict(zip([*wanted, *weights], found))
    gradients = {
        "params": our_params({name: named[name] for name in weights}, config),
        "hidden_states": channels_last(named["hidden_states"]),
        "encoder_hidden_states": to_numpy(named["caption"]),
    }
    return channels_last(out), gradients
