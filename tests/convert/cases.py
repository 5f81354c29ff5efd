"""Published directories made by diffusers, tiny and random, and the same weights under NVlabs' names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import SanaControlNetModel, SanaTransformer2DModel

from tests.parity.pipeline_oracle import TRANSFORMER, randomise

QK_NORM = {"qk_norm": "rms_norm_across_heads"}
VARIANTS = {
    "sana-1.0": {},
    "sana-1.5": QK_NORM,
    "sprint": {**QK_NORM, "guidance_embeds": True},
    "patch-2": {"patch_size": 2},
}


def transformer(variant: str = "sana-1.0", dtype: torch.dtype = torch.float32, **changes) -> SanaTransformer2DModel:
    model = SanaTransformer2DModel(**{**TRANSFORMER, **VARIANTS[variant], **changes}).eval()
    randomise(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model


def controlnet() -> SanaControlNetModel:
    model = SanaControlNetModel(**{**TRANSFORMER, "num_layers": 2}).eval()
    randomise(model, torch.Generator().manual_seed(2))
    return model


def as_original(state: dict[str, torch.Tensor], image_size: int = 1024) -> dict[str, torch.Tensor]:
    """A transformer's published state dict under NVlabs' names, q, k and v joined; written from their description."""
    original: dict[str, torch.Tensor] = {}
    plain = {
        "patch_embed.proj": "x_embedder.proj",
        "patch_embedding": "x_embedder.proj",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        "caption_norm": "attention_y_norm",
        "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_embed.guidance_embedder.linear_1": "cfg_embedder.mlp.0",
        "time_embed.guidance_embedder.linear_2": "cfg_embedder.mlp.2",
        "time_embed.linear": "t_block.1",
        "proj_out": "final_layer.linear",
    }
    in_block = {
        "attn1.to_out.0": "attn.proj",
        "attn1.norm_q": "attn.q_norm",
        "attn1.norm_k": "attn.k_norm",
        "attn2.to_q": "cross_attn.q_linear",
        "attn2.to_out.0": "cross_attn.proj",
        "attn2.norm_q": "cross_attn.q_norm",
        "attn2.norm_k": "cross_attn.k_norm",
        "ff.conv_inverted": "mlp.inverted_conv.conv",
        "ff.conv_depth": "mlp.depth_conv.conv",
        "ff.conv_point": "mlp.point_conv.conv",
        "ff.conv_temp": "mlp.t_conv",
    }
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        if name == "scale_shift_table":
            original["final_layer.scale_shift_table"] = tensor
        elif layer in plain:
            original[f"{plain[layer]}.{kind}"] = tensor
        elif name.startswith("transformer_blocks."):
            _, number, rest = name.split(".", 2)
            inner = rest.rpartition(".")[0]
            if rest == "scale_shift_table":
                original[f"blocks.{number}.scale_shift_table"] = tensor
            elif inner in in_block:
                original[f"blocks.{number}.{in_block[inner]}.{kind}"] = tensor
            elif inner == "attn1.to_q":
                stem = f"transformer_blocks.{number}.attn1.to_"
                original[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat([state[f"{stem}{n}.{kind}"] for n in "qkv"])
            elif inner == "attn2.to_k":
                stem = f"transformer_blocks.{number}.attn2.to_"
                joined = torch.cat([state[f"{stem}{n}.{kind}"] for n in "kv"])
                original[f"blocks.{number}.cross_attn.kv_linear.{kind}"] = joined
            else:
                assert inner in ("attn1.to_k", "attn1.to_v", "attn2.to_v"), name
        else:
            raise AssertionError(name)
    width = state["caption_norm.weight"].shape[0]
    original["y_embedder.y_embedding"] = torch.randn(300, state["caption_projection.linear_1.weight"].shape[1])
    if "patch_embed.proj.weight" in state:  # videos have rotary positions
        patch = state["patch_embed.proj.weight"].shape[-1]
        original["pos_embed"] = torch.zeros(1, (image_size // 32 // patch) ** 2, width)
    if any("guidance_embedder" in name for name in state):
        original["logvar_linear.weight"], original["logvar_linear.bias"] = torch.randn(1, width), torch.randn(1)
    return original


def as_original_controlnet(
    state: dict[str, torch.Tensor], base: dict[str, torch.Tensor], image_size: int = 1024
) -> dict[str, torch.Tensor]:
    """A ControlNet's published state dict under NVlabs' names, beside the transformer's blocks."""
    own = {name: t for name, t in state.items() if not name.startswith(("controlnet_blocks", "input_block"))}
    renamed = as_original(own, image_size)
    original: dict[str, torch.Tensor] = {}
    for name, tensor in renamed.items():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            name = f"controlnet.{number}.copied_block.{rest}"
        original[name] = tensor
    for name, tensor in state.items():
        if name.startswith("controlnet_blocks."):
            _, number, kind = name.split(".")
            original[f"controlnet.{number}.after_proj.{kind}"] = tensor
        elif name.startswith("input_block."):
            original[f"controlnet.0.before_proj.{name.split('.')[1]}"] = tensor
    other = as_original(base, image_size)
    return original | {name: t for name, t in other.items() if name.startswith(("blocks.", "final_layer."))}


def tensors_of(directory: Path, stem: str = "diffusion_pytorch_model") -> dict[str, tuple[str, tuple, bytes]]:
    """Name -> dtype, shape and bytes of a published component's tensors."""
    from sana_jax.weights.safetensors_files import SafetensorsSource, find_weights_file

    source = SafetensorsSource(find_weights_file(directory, stem))
    return {name: (info.dtype.name, info.shape, source.read(name).tobytes()) for name, info in source.tensors.items()}


def files_of(directory: Path) -> dict[str, int]:
    """Every file below a directory with its size; empty where there is none."""
    return {str(f.relative_to(directory)): f.stat().st_size for f in sorted(directory.rglob("*")) if f.is_file()}


def same(first: np.ndarray, second: np.ndarray) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()
