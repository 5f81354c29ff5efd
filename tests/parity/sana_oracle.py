"""The PyTorch side of the SANA parity tests: tiny random models, their inputs, and their weights in our layout."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import SanaTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from sana_jax.models.sana import QK_NORM, SanaConfig

# More threads than cores that are free make models of this size many times slower.
torch.set_num_threads(1)

TINY = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "mlp_ratio": 2.5,
    "sample_size": 32,
}
VARIANTS = {
    "sana-1.0": {},
    "sana-1.5": {"qk_norm": QK_NORM},
    "sprint": {"qk_norm": QK_NORM, "guidance_embeds": True},
    "2k": {"sample_size": 64, "interpolation_scale": 1.0},
    "4k": {"sample_size": 128, "interpolation_scale": 2.0},
    "patch-2": {"patch_size": 2, "norm_eps": 1e-3},
    "biased": {"attention_bias": True, "out_channels": 6, "num_layers": 4},
}

BATCH, CAPTION_TOKENS = 3, 7
LATENT_SIZE = (6, 10)
MASK = np.ones((BATCH, CAPTION_TOKENS), np.int32)
MASK[0, 4:] = 0
# The last caption is nothing but padding.
MASK_WITH_EMPTY_ROW = MASK.copy()
MASK_WITH_EMPTY_ROW[-1] = 0


@dataclasses.dataclass
class Inputs:
    """One batch in our layout: latents are channels-last, ``guidance`` is None where the model takes none."""

    hidden_states: np.ndarray
    encoder_hidden_states: np.ndarray
    timestep: np.ndarray
    guidance: np.ndarray | None
    output_weights: np.ndarray  # the loss is the sum of the output times this

    def arrays(self) -> dict[str, np.ndarray]:
        fields = dataclasses.asdict(self)
        del fields["output_weights"]
        return fields


def draw_inputs(config: SanaConfig, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    sprint = config.guidance_embeds
    return Inputs(
        hidden_states=normal(BATCH, *LATENT_SIZE, config.in_channels),
        encoder_hidden_states=normal(BATCH, CAPTION_TOKENS, config.caption_channels),
        timestep=np.array([1.0, 0.78, 0.3] if sprint else [999.0, 3.0, 412.5], np.float32),
        guidance=np.array([0.45, 0.2, 0.45], np.float32) if sprint else None,
        output_weights=normal(BATCH, *LATENT_SIZE, config.out_channels),
    )


@functools.cache
def torch_model(variant: str, dtype: torch.dtype = torch.float32) -> SanaTransformer2DModel:
    """The tiny model of a variant with every parameter random, also those that start at zero; do not change it."""
    generator = torch.Generator().manual_seed(list(VARIANTS).index(variant))
    model = SanaTransformer2DModel(**{**TINY, **VARIANTS[variant]}).eval()
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
            # Linear attention does not depend on the length of a query, so a query of which the ReLU leaves a single
            # small channel has a gradient that is all rounding, in any implementation. With heads of 8 channels
            # instead of 32 that happens; a common offset of q and k leaves about a sixth of the channels clipped.
            if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
                parameter.add_(1.5 / parameter.shape[1])
            if name.startswith("transformer_blocks") and name.endswith("scale_shift_table"):
                parameter[0] += 1
    return model.to(dtype)


def jax_config(variant: str) -> SanaConfig:
    return SanaConfig(**{**TINY, **VARIANTS[variant]})


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float32).numpy()


def our_params(tensors: dict[str, torch.Tensor], config: SanaConfig) -> dict:
    """Maps named tensors of a diffusers model (weights or their gradients) to our parameter tree, blocks stacked."""
    params: dict = {}

    def put(path: str, value: np.ndarray) -> None:
        *parents, leaf = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        assert leaf not in node, path
        node[leaf] = value

    def convert(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
        path = name.replace("time_embed.emb.", "time_embed.").replace("to_out.0", "to_out").replace(".", "/")
        if name.endswith("scale_shift_table") or name.endswith("bias"):
            return path, value
        stem = path.removesuffix("/weight")
        if value.ndim == 1:
            return f"{stem}/scale", value
        if "conv_depth" in name:
            return f"{stem}/kernel", value[:, 0].transpose(1, 2, 0)
        if name == "patch_embed.proj.weight":  # (D, C, p, p) -> (p p C, D)
            return f"{stem}/kernel", value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
        if value.ndim == 4:
            value = value[:, :, 0, 0]
        return f"{stem}/kernel", value.T

    converted = dict(convert(name, to_numpy(tensor)) for name, tensor in tensors.items())
    blocks: dict[str, dict[int, np.ndarray]] = {}
    for path, value in converted.items():
        if path.startswith("transformer_blocks/"):
            _, layer, rest = path.split("/", 2)
            blocks.setdefault(rest, {})[int(layer)] = value
        else:
            put(path, np.ascontiguousarray(value))
    for rest, layers in blocks.items():
        put(f"transformer_blocks/{rest}", np.stack([layers[i] for i in range(config.num_layers)]))
    return params


def params_for(variant: str) -> dict:
    return jax.tree.map(jnp.asarray, our_params(torch_model(variant).state_dict(), jax_config(variant)))


def torch_inputs(inputs: Inputs, mask: np.ndarray | None, dtype: torch.dtype = torch.float32) -> dict:
    """The keyword arguments of the diffusers model; latent and caption are leaves that want gradients."""
    latent = torch.from_numpy(np.ascontiguousarray(inputs.hidden_states.transpose(0, 3, 1, 2))).to(dtype)
    caption = torch.from_numpy(inputs.encoder_hidden_states).to(dtype)
    return {
        "hidden_states": latent.requires_grad_(),
        "encoder_hidden_states": caption.requires_grad_(),
        "timestep": torch.from_numpy(inputs.timestep),
        "guidance": None if inputs.guidance is None else torch.from_numpy(inputs.guidance),
        "encoder_attention_mask": None if mask is None else torch.from_numpy(mask),
    }


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    return to_numpy(tensor).transpose(0, 2, 3, 1)


def torch_output(variant: str, inputs: Inputs, mask: np.ndarray | None, dtype: torch.dtype) -> np.ndarray:
    """The output (B, H, W, C) as float32 numbers, computed in ``dtype``."""
    with torch.no_grad():
        out = torch_model(variant, dtype)(**torch_inputs(inputs, mask, dtype), return_dict=False)[0]
    return channels_last(out)


def distance_to_a_corner(variant: str, inputs: Inputs, mask: np.ndarray | None) -> float:
    """``nearest_corner`` of a variant's network."""
    model = torch_model(variant, torch.float32)
    return nearest_corner(model, lambda: torch_output(variant, inputs, mask, torch.float32))


def nearest_corner(model: torch.nn.Module, run: Callable[[], object]) -> float:
    """The least size of a query or key of linear attention while ``run`` runs, relative to their root mean square.

    At 0 the ReLU has a corner: what lies so near it that rounding decides the side has one gradient or another.
    """
    sizes = []

    def note(_module, _arguments, out: torch.Tensor) -> None:
        sizes.append((out.abs().min() / out.square().mean().sqrt()).item())

    attentions = [block.attn1 for block in model.transformer_blocks]
    last = [(a.to_q, a.to_k) if a.norm_q is None else (a.norm_q, a.norm_k) for a in attentions]
    hooks = [module.register_forward_hook(note) for pair in last for module in pair]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return min(sizes)


def rounding_of_gradients(variant: str, inputs: Inputs, mask: np.ndarray | None) -> float:
    """How far PyTorch's own float32 gradients of the parameters are from its float64 ones: the largest relative error.

    Linear attention does not see how long a query is, nor how long all keys are: gradients of their biases are what is
    left of terms that cancel, in some draws so few digits that no float32 gradient is as good as is asked.
    """
    found, exact = (
        torch_output_and_gradients(variant, inputs, mask, dtype=dtype)[1]["params"]["transformer_blocks"]["attn1"]
        for dtype in (torch.float32, torch.float64)
    )
    return max(jax.tree.leaves(jax.tree.map(relative_error, found, exact)))


def torch_output_and_gradients(
    variant: str,
    inputs: Inputs,
    mask: np.ndarray | None,
    controlnet_residuals: np.ndarray | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[np.ndarray, dict]:
    """The output, and the gradients of the loss as ``{"params": tree, "hidden_states": ..., ...}``, as float32."""
    model = torch_model(variant, dtype)
    arguments = torch_inputs(inputs, mask, dtype)
    wanted = {"hidden_states": arguments["hidden_states"], "caption": arguments["encoder_hidden_states"]}
    if controlnet_residuals is not None:
        samples = [torch.from_numpy(residual).requires_grad_() for residual in controlnet_residuals]
        arguments["controlnet_block_samples"] = tuple(samples)
        wanted |= {f"residual {i}": sample for i, sample in enumerate(samples)}
    weights = dict(model.named_parameters())
    # PyTorch's fused attention keeps only the rounded logarithm of the softmax's sum for its backward pass, which is
    # good to 5e-4 beside a mask of -10000; the plain form is exact.
    with sdpa_kernel(SDPBackend.MATH):
        out = model(**arguments, return_dict=False)[0]
    loss = (out * torch.from_numpy(np.ascontiguousarray(inputs.output_weights.transpose(0, 3, 1, 2)))).sum()
    found = torch.autograd.grad(loss, [*wanted.values(), *weights.values()])
    named = dict(zip([*wanted, *weights], found))
    gradients = {
        "params": our_params({name: named[name] for name in weights}, jax_config(variant)),
        "hidden_states": channels_last(named["hidden_states"]),
        "encoder_hidden_states": to_numpy(named["caption"]),
    }
    if controlnet_residuals is not None:
        residuals = [to_numpy(named[f"residual {i}"]) for i in range(len(controlnet_residuals))]
        gradients["controlnet_residuals"] = np.stack(residuals)
    return channels_last(out), gradients


def relative_error(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
