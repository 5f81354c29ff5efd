"""The PyTorch side of the SANA-WM parity tests: tiny random models, their inputs, their weights in our layout."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import SanaWMTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from sana_jax.models.sana_wm import SanaWMConfig, SanaWMTransformer, init_params
from sana_jax.weights.rules import read_params
from sana_jax.weights.safetensors_files import TensorInfo
from sana_jax.weights.tables.sana_wm import NOT_PARAMETERS, transformer_rules
from tests.parity.sana_oracle import to_numpy

torch.set_num_threads(1)

TINY = {
    "in_channels": 4,
    "num_layers": 4,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "softmax_every_n": 4,
    "linear_head_dim": 24,
    "caption_channels": 8,
    "mlp_ratio": 2.0,
    "chunk_plucker_post_attn_blocks": 4,
}
TWO = {"softmax_every_n": 2, "num_layers": 2}  # one block of each kind
DELTA = {"softmax_every_n": 0, "num_layers": 2}
VARIANTS = {
    "published": {},
    "one of each": TWO,
    # several changes at once, for few programs; below, one by one
    "convolved patches": {"k_conv_only": False, "chunk_plucker_post_attn_blocks": 2, "patch_size": (1, 2, 2)}
    | {"softmax_every_n": 2, "num_layers": 3},
    "bare": {"qk_norm": False, "cross_norm": False, "y_norm": False, "use_pe": False, "conv_kernel_size": 0}
    | {"ffn_type": "mlp", "use_chunk_plucker_post_attn": False, "hidden_size": 64, "linear_head_dim": 32}
    | TWO,
    "delta rule alone": DELTA,
    "softmax alone": {"softmax_every_n": 1, "num_layers": 2},
    "no convolution": {"conv_kernel_size": 0} | DELTA,
    "all convolved": {"k_conv_only": False} | DELTA,
    "map of directions": {"use_chunk_plucker_post_attn": False} | TWO,
    "plain feed-forward": {"ffn_type": "mlp"} | TWO,
    "no positions": {"use_pe": False} | TWO,
    "no norms": {"qk_norm": False, "cross_norm": False, "y_norm": False} | TWO,
    "some Plücker": {"chunk_plucker_post_attn_blocks": 2},
    "patch of two": {"patch_size": (1, 2, 2)} | TWO,
    "heads of 32": {"hidden_size": 64, "linear_head_dim": 32} | TWO,
    "full width": {"hidden_size": 2240, "linear_head_dim": 112, "num_attention_heads": 20, "mlp_ratio": 3.0}
    | {"in_channels": 128, "caption_channels": 2304}
    | TWO,
}

BATCH, CAPTION_TOKENS, FRAMES = 2, 7, 5
LATENT_SIZE = (4, 6)
MASK = np.ones((BATCH, CAPTION_TOKENS), np.int32)
MASK[0, 4:] = 0


@dataclasses.dataclass
class Inputs:
    """One batch in our layout."""

    hidden_states: np.ndarray
    encoder_hidden_states: np.ndarray
    timestep: np.ndarray
    camera_conditions: np.ndarray
    chunk_plucker: np.ndarray | None
    output_weights: np.ndarray  # the loss is the sum of the output times this

    def arrays(self) -> dict[str, np.ndarray]:
        fields = dataclasses.asdict(self)
        del fields["output_weights"]
        return {name: value for name, value in fields.items() if value is not None}


def jax_config(variant: str) -> SanaWMConfig:
    return SanaWMConfig(**{**TINY, **VARIANTS[variant]})


def camera(rng: np.random.Generator, batch: int, frames: int, size: tuple[int, int]) -> np.ndarray:
    """A moving, turning camera: the first frame at the origin, ever farther from it."""
    conditions = np.zeros((batch, frames, 20))
    for sample in range(batch):
        axis, step = rng.standard_normal(3), 0.4 * rng.standard_normal(3)
        axis /= np.linalg.norm(axis)
        cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
        for frame in range(frames):
            angle, pose = 0.15 * frame, np.eye(4)
            pose[:3, :3] = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
            pose[:3, 3] = frame * step
            conditions[sample, frame, :16] = pose.reshape(-1)
    height, width = size
    focal = rng.uniform(0.8, 1.1, (batch, 1, 2)) * np.array([width, width])
    conditions[..., 16:18] = focal
    conditions[..., 18:] = np.array([width, height]) / 2 + rng.uniform(-0.4, 0.4, (batch, 1, 2))
    return conditions.astype(np.float32)


def draw_inputs(config: SanaWMConfig, frames: int = FRAMES, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    size = (BATCH, frames, *LATENT_SIZE)
    timestep = rng.uniform(0, 1000, (BATCH, frames)).astype(np.float32)  # not whole, on purpose
    timestep[:, 0] = 0  # a given first frame
    with_plucker = config.use_chunk_plucker_post_attn
    return Inputs(
        hidden_states=normal(*size, config.in_channels),
        encoder_hidden_states=normal(BATCH, CAPTION_TOKENS, config.caption_channels),
        timestep=timestep,
        camera_conditions=camera(rng, BATCH, frames, LATENT_SIZE),
        chunk_plucker=normal(*size, config.chunk_plucker_channels) if with_plucker else None,
        output_weights=normal(*size, config.in_channels),
    )


@functools.cache
def torch_model(variant: str) -> SanaWMTransformer3DModel:
    """The tiny model of a variant with every parameter random, also those that start at zero; do not change it.

    Plücker coordinates are weak and attention is strong, so that no error of the camera hides behind them.
    """
    return randomise(SanaWMTransformer3DModel(**{**TINY, **VARIANTS[variant]}), list(VARIANTS).index(variant))


def randomise(model: SanaWMTransformer3DModel, seed: int) -> SanaWMTransformer3DModel:
    """Every parameter random, as ``torch_model`` says."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if name.endswith("scale_shift_table"):
                parameter.copy_(0.5 * draw)  # gates of either sign, none near 0 throughout
            elif "norm" in name:
                parameter.copy_(1 + 0.2 * draw)
            elif name.endswith(("A_log", "dt_bias")):
                parameter.copy_(draw - 1)  # frames keep between a tenth and nearly all of the memory
            elif name.endswith("bias"):
                parameter.copy_(0.2 * draw)
            elif ".conv_" in name:
                parameter.copy_(0.5 * draw)
            else:
                parameter.copy_(draw / parameter[0].numel() ** 0.5)
            if name.startswith("plucker_embedder"):
                parameter.mul_(0.05)
            elif ".attn." in name and name.endswith("weight") and "norm" not in name and "conv_" not in name:
                parameter.mul_(1.5)
    return model


class TorchTensors:
    """Named tensors, weights or their gradients, as a source of weights."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.location = "a model of diffusers"
        self._tensors = tensors
        self.tensors = {name: TensorInfo(np.dtype(np.float32), tuple(t.shape)) for name, t in tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return to_numpy(self._tensors[name])


def abstract_params(config: SanaWMConfig) -> dict:
    return jax.eval_shape(lambda: init_params(SanaWMTransformer(config), jax.random.key(0)))


def our_params(tensors: dict[str, torch.Tensor], config: SanaWMConfig) -> dict:
    """Maps named tensors of a diffusers model to our parameter tree."""
    rules = transformer_rules(config, tensors)
    return read_params(TorchTensors(tensors), rules, abstract_params(config), ignored=NOT_PARAMETERS)


def params_for(variant: str) -> dict:
    return jax.tree.map(jnp.asarray, our_params(torch_model(variant).state_dict(), jax_config(variant)))


def channels_first(video: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(video, -1, 1)))


def torch_inputs(inputs: Inputs, mask: np.ndarray, frame_valid: np.ndarray | None = None) -> dict:
    """The keyword arguments of the diffusers model; latent and caption are leaves that want gradients."""
    plucker = None if inputs.chunk_plucker is None else channels_first(inputs.chunk_plucker)
    return {
        "hidden_states": channels_first(inputs.hidden_states).requires_grad_(),
        "encoder_hidden_states": torch.from_numpy(inputs.encoder_hidden_states[:, None]).requires_grad_(),
        "timestep": torch.from_numpy(inputs.timestep[:, None]),
        "mask": torch.from_numpy(mask),
        "camera_conditions": torch.from_numpy(inputs.camera_conditions),
        "chunk_plucker": plucker,
        "frame_valid_mask": None if frame_valid is None else torch.from_numpy(frame_valid.astype(np.float32)),
    }


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    return np.moveaxis(to_numpy(tensor), 1, -1)


@contextlib.contextmanager
def without_rounding() -> Iterator[None]:
    """Softmax layers keep float32, and PyTorch computes them by their formula."""
    rounding = torch.Tensor.bfloat16
    torch.Tensor.bfloat16 = lambda self: self
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.Tensor.bfloat16 = rounding


@contextlib.contextmanager
def exact_exponentials() -> Iterator[None]:
    """Within, softmax attention in bfloat16 is fused attention's formula.

    PyTorch's own kernel for CPUs takes, in bfloat16, a fast exponential that is wrong by up to 4e-4 of its value.
    """
    fused = torch.nn.functional.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, **options):
        if query.dtype != torch.bfloat16:
            return fused(query, key, value, attn_mask=attn_mask, **options)
        assert not options
        scores = query.float() @ key.float().mT * query.shape[-1] ** -0.5
        scores = scores if attn_mask is None else scores + attn_mask.float()
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        out = weights.bfloat16().float() @ value.float() / weights.sum(-1, keepdim=True)
        return out.bfloat16()

    torch.nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = fused


def torch_output(variant: str, inputs: Inputs, mask: np.ndarray, **changes) -> np.ndarray:
    """The output (B, T, H, W, C)."""
    with torch.no_grad():
        out = torch_model(variant)(**(torch_inputs(inputs, mask) | changes), return_dict=False)[0]
    return channels_last(out)


def torch_output_and_gradients(variant: str, inputs: Inputs, mask: np.ndarray) -> tuple[np.ndarray, dict]:
    """The output without rounding, and the gradients of the loss as ``{"params": tree, "hidden_states": ..., ...}``."""
    model, config = torch_model(variant), jax_config(variant)
    arguments = torch_inputs(inputs, mask)
    wanted = {"hidden_states": arguments["hidden_states"], "caption": arguments["encoder_hidden_states"]}
    weights = dict(model.named_parameters())
    with without_rounding():
        out = model(**arguments, return_dict=False)[0]
    loss = (out * channels_first(inputs.output_weights)).sum()
    found = torch.autograd.grad(loss, [*wanted.values(), *weights.values()], materialize_grads=True)
    named = dict(zip([*wanted, *weights], found))
    gradients = {
        "params": our_params({name: named[name] for name in weights}, config),
        "hidden_states": channels_last(named["hidden_states"]),
        "encoder_hidden_states": to_numpy(named["caption"])[:, 0],
    }
    return channels_last(out), gradients
