"""Tiny models to draw with: runs of several checkpoints, of random weights, made without training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from configs import load_preset
from configs.serialization import to_dict
from sana_jax.diffusion.samplers import FlowEuler
from sana_jax.pipelines.model_directory import write_model_directory
from tests.lora.files import pair, write
from tests.pipelines.tiny_model import random_params, tiny_config
from train.checkpoints import CheckpointStore
from train.data.digits import DigitsData

DIGITS = (3, 7)
SEVEN, THREE = "a handwritten seven", "a handwritten three"


def digits_run(directory: Path, steps: Sequence[int] = (5, 10), first_seed: int = 0) -> Path:
    """A run on two of the digits as training leaves it, with raw and averaged weights; 16 wide, 2 blocks."""
    preset = load_preset("digits")
    transformer = tiny_config(caption_channels=preset.data.embedding_dim)
    config = dataclasses.replace(
        preset, transformer=transformer, data=dataclasses.replace(preset.data, digits=DIGITS), run_dir=str(directory)
    )
    data = DigitsData(config.data)
    write_model_directory(
        directory,
        transformer_config=transformer,
        sampler=FlowEuler(flow_shift=1.0),
        text_encoder=data.text_encoder,
        autoencoder=data.autoencoder,
        defaults={"guidance_scale": 2.0, "num_inference_steps": 2, "height": 8, "width": 8},
    )
    (directory / "config.json").write_text(json.dumps(to_dict(config)))
    save_checkpoints(directory, steps, first_seed)
    return directory


def save_checkpoints(directory: Path, steps: Sequence[int], first_seed: int = 0) -> None:
    transformer = tiny_config(caption_channels=32)
    with CheckpointStore(directory / "checkpoints", keep_last=99, keep_every=None, asynchronous=False) as store:
        for seed, step in enumerate(steps, first_seed):
            store.save(
                step,
                params=random_params(transformer, 100 + seed),
                ema=random_params(transformer, seed),
                opt_state={"count": jnp.zeros(())},
                data_position=0,
                config={},
                wait=True,
            )


def lora_file(path: Path, seed: int, rank: int = 2) -> Path:
    """A LoRA for the first block's queries of ``digits_run``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, pair("transformer_blocks.0.attn1.to_q", rank=rank, seed=seed))
