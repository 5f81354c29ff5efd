"""LoRA files made by hand for a tiny network; no PyTorch."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

from sana_jax.lora import Lora, lora_tree, read_lora
from sana_jax.models.sana import SanaConfig, SanaTransformer
from sana_jax.pipelines.opening import abstract_params
from sana_jax.weights.rules import flatten
from sana_jax.weights.safetensors_files import TensorInfo, write_safetensors
from sana_jax.weights.tables.sana import transformer_rules

CONFIG = SanaConfig(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=3,
    num_cross_attention_heads=2,
    cross_attention_head_dim=8,
    cross_attention_dim=16,
    caption_channels=12,
    patch_size=2,
)
WIDTH = 16
QUERY = "transformer_blocks.{}.attn1.to_q"


@functools.cache
def abstract():
    return abstract_params(SanaTransformer(CONFIG))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def pair(module: str, inputs: int = WIDTH, outputs: int = WIDTH, rank: int = 2, seed: int = 0) -> dict:
    """A dense layer's two tensors, as PEFT names them."""
    return {
        f"transformer.{module}.lora_A.weight": normal(rank, inputs, seed=seed),
        f"transformer.{module}.lora_B.weight": normal(outputs, rank, seed=seed),
    }


def good(rank: int = 2, seed: int = 0) -> dict:
    return pair(QUERY.format(0), rank=rank, seed=seed) | pair(QUERY.format(2), rank=rank, seed=seed + 1)


def write(path: Path, tensors: dict, metadata: dict | str | None = None) -> Path:
    header = {"format": "pt"}
    if metadata is not None:
        header["lora_adapter_metadata"] = metadata if isinstance(metadata, str) else json.dumps(metadata)
    infos = {name: TensorInfo(array.dtype, array.shape) for name, array in tensors.items()}
    write_safetensors(path, infos, tensors.items(), header)
    return path


def read(path: Path, tensors: dict | None = None, metadata: dict | str | None = None) -> Lora:
    """Reads a file, which is written first if tensors are given."""
    if tensors is not None:
        path = write(path / "lora.safetensors", tensors, metadata)
    return read_lora(path, transformer_rules(CONFIG), abstract())


def tree(*adapters: tuple[Lora, float], dtype=np.float32) -> dict:
    """The LoRA tree's leaves by path."""
    return flatten(lora_tree(adapters, abstract(), dtype))


def delta(leaves: dict, *path: str) -> np.ndarray:
    """What is added to a kernel, float32."""
    return np.asarray(leaves[(*path, "down")] @ leaves[(*path, "up")])
