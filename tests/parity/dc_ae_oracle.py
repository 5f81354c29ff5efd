"""The PyTorch side of the DC-AE parity tests: tiny random models, their inputs, and their weights in our layout."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import numpy as np
import torch
from diffusers import AutoencoderDC

from sana_jax.autoencoders.dc_ae import init_params
from sana_jax.autoencoders.dc_ae_config import DCAEConfig
from sana_jax.weights.rules import read_params
from sana_jax.weights.safetensors_files import TensorInfo
from sana_jax.weights.tables.dc_ae import NOT_PARAMETERS, dc_ae_rules

# More threads than cores that are free make models of this size many times slower.
torch.set_num_threads(1)

_TYPES = ("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock")
SANA_STYLE = {
    "in_channels": 3,
    "latent_channels": 8,
    "attention_head_dim": 8,
    "encoder_block_types": _TYPES,
    "decoder_block_types": _TYPES,
    "encoder_block_out_channels": (8, 16, 16, 32),
    "decoder_block_out_channels": (8, 16, 16, 32),
    "encoder_layers_per_block": (1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,), (5,)),
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}
IN_STYLE = {
    "encoder_layers_per_block": (0, 1, 1, 1),
    "decoder_layers_per_block": (0, 1, 1, 1),
    "encoder_qkv_multiscales": ((),) * 4,
    "decoder_qkv_multiscales": ((),) * 4,
    "downsample_block_type": "pixel_unshuffle",
    "upsample_block_type": "pixel_shuffle",
    "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm", "rms_norm"),
    "decoder_act_fns": ("relu", "relu", "silu", "silu"),
    "scaling_factor": 0.3189,
}
# Changes to the sana style; together they turn every switch.
VARIANTS = {
    "sana": {},
    "in": IN_STYLE,
    "sana with unequal depths": {
        "encoder_layers_per_block": (2, 1, 3, 2),
        "decoder_layers_per_block": (1, 2, 2, 3),
        "encoder_block_out_channels": (8, 32, 16, 32),
        "decoder_block_out_channels": (8, 8, 32, 32),
    },
    "sana with an empty first stage": {
        "encoder_layers_per_block": (0, 1, 1, 2),
        "decoder_layers_per_block": (0, 2, 1, 1),
    },
    "in with batch norm in attention": IN_STYLE
    | {"decoder_norm_types": "batch_norm", "decoder_act_fns": "relu", "decoder_layers_per_block": (1, 1, 2, 1)},
    "without shortcuts": {
        "encoder_out_shortcut": False,
        "decoder_in_shortcut": False,
        "decoder_conv_act_fn": "silu",
        "latent_channels": 6,
    },
    "two scales": {
        "encoder_qkv_multiscales": ((), (), (3, 5), (5,)),
        "decoder_qkv_multiscales": ((), (), (5,), (3, 5)),
        "encoder_block_types": "ResBlock",
    },
}
# Of the last latents: 8 x 8 and 3 x 5 take the linear form of attention, 2 x 2 and 1 x 3 the quadratic one.
SIZES = {"64 px": (64, 64), "24 x 40 px": (24, 40), "16 px": (16, 16), "8 x 24 px": (8, 24)}
BATCH = 2


def sizes(variant: str) -> dict[str, tuple[int, int]]:
    """All sizes for the two styles; one for each form of attention for their variations."""
    return SIZES if variant in ("sana", "in") else {name: SIZES[name] for name in ("24 x 40 px", "8 x 24 px")}


class StateDict(NamedTuple):
    """A PyTorch state dict as ``read_params`` takes it."""

    location: str
    state: dict[str, torch.Tensor]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        dtypes = {torch.float32: np.float32, torch.int64: np.int64}
        return {
            name: TensorInfo(np.dtype(dtypes[tensor.dtype]), tuple(tensor.shape)) for name, tensor in self.state.items()
        }

    def read(self, name: str) -> np.ndarray:
        return self.state[name].detach().numpy().copy()


def fields(variant: str) -> dict:
    return SANA_STYLE | VARIANTS[variant]


def jax_config(variant: str) -> DCAEConfig:
    return DCAEConfig(**fields(variant))


def randomise(model: AutoencoderDC, seed: int) -> AutoencoderDC:
    """Every parameter and statistic random, also those that start at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            draw = torch.randn(tensor.shape, generator=generator)
            if name.endswith("num_batches_tracked"):
                tensor.copy_(torch.randint(1, 1 << 40, (), generator=generator))
            elif name.endswith("running_var"):
                tensor.copy_((0.3 * draw).exp())
            elif "norm" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.2 * draw)
            elif tensor.ndim == 1:
                tensor.copy_(0.2 * draw)
            else:
                tensor.copy_(draw / tensor[0].numel() ** 0.5)
            # Attention does not depend on the length of a query, so a query of which the ReLU leaves a single small
            # channel has a gradient that is all rounding, in any implementation. With heads of 8 channels instead of
            # 32 that happens; a common offset leaves fewer channels clipped.
            if name.endswith(("to_q.weight", "to_k.weight", "to_v.weight")):
                tensor.add_(1.5 / tensor.shape[1])
    return model.eval()


@functools.cache
def torch_model(variant: str, dtype: torch.dtype = torch.float32) -> AutoencoderDC:
    """The tiny model of a variant; do not change it."""
    return randomise(AutoencoderDC(**fields(variant)), list(VARIANTS).index(variant)).to(dtype)


def abstract_params(config: DCAEConfig) -> dict:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def our_params(state: dict[str, torch.Tensor], config: DCAEConfig) -> dict:
    """A state dict in our layout, by the table that loads checkpoints."""
    return read_params(
        StateDict("the model", state), dc_ae_rules(config), abstract_params(config), ignored=NOT_PARAMETERS
    )


@functools.cache
def params_for(variant: str) -> dict:
    return our_params(torch_model(variant).state_dict(), jax_config(variant))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    return np.moveaxis(tensor.detach().to(torch.float32).numpy(), 1, -1)


def torch_output(model: AutoencoderDC, half: str, x: np.ndarray) -> np.ndarray:
    """The encoder's or the decoder's output for a channels-last array, computed in the model's dtype."""
    with torch.no_grad():
        return channels_last(getattr(model, half)(channels_first(x).to(model.dtype)))


def torch_output_and_gradients(variant: str, half: str, x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, dict]:
    """The output, and the gradients of its sum times ``weights``: ``{"params": tree, "input": array}``."""
    model = torch_model(variant)
    leaf = channels_first(x).requires_grad_()
    out = getattr(model, half)(leaf)
    named = {name: p for name, p in model.named_parameters() if name.startswith(half)}
    found = torch.autograd.grad((out * channels_first(weights)).sum(), [leaf, *named.values()])
    # Statistics have no gradient, and the other half none of this loss.
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    state |= dict(zip(named, found[1:]))
    return channels_last(out), {
        "params": our_params(state, jax_config(variant))[half],
        "input": channels_last(found[0]),
    }


def relative_error(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
