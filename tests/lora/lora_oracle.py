"""The PyTorch side of the LoRA tests: random LoRAs that PEFT makes and diffusers saves and loads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import SanaPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

ATTENTION = ["to_k", "to_q", "to_v"]
ALL_LINEAR = [*ATTENTION, "to_out.0", "linear_1", "linear_2", "time_embed.linear", "proj_out"]
CONV = ["ff.conv_inverted", "ff.conv_point", "patch_embed.proj"]
FILE = "pytorch_lora_weights.safetensors"


def make_lora(pipeline, directory: Path, config: dict, seed: int = 0, metadata: bool = True) -> Path:
    """Saves a LoRA with random values, as diffusers' training scripts save one; returns its directory."""
    transformer = pipeline.transformer
    transformer.add_adapter(LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_" in name:
                draw = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(draw * (0.4 / parameter[0].numel() ** 0.5))
    SanaPipeline.save_lora_weights(
        directory,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        **(_collate_lora_metadata({"transformer": transformer}) if metadata else {}),
    )
    transformer.unload_lora()
    return directory


def rewrite(source: Path, directory: Path, rename, metadata: dict | None = None) -> Path:
    """The file of ``source`` with every (key, tensor) replaced by what ``rename`` gives, a list of such pairs."""
    directory.mkdir(exist_ok=True)
    tensors = dict(pair for key, tensor in load_file(source / FILE).items() for pair in rename(key, tensor))
    header = {"format": "pt"} | ({} if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)})
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / FILE, header)
    return directory
