"""Data sets, models and runs for the tests of caches: tiny, real, and the same every time."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from configs import load_preset
from configs.data import ImageDataConfig
from configs.schema import RunConfig
from sana_jax.autoencoders import PixelAutoencoder
from sana_jax.diffusion.samplers import FlowEuler
from sana_jax.models.sana import SanaConfig
from sana_jax.pipelines.model_directory import ModelDirectory, read_model_directory, write_model_directory
from sana_jax.text_encoders import WordEncoder
from train.data.cache import LATENTS, PROMPTS, CacheReader
from train.precompute import precompute

WORDS = ("a", "handwritten", "red", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBERS = WORDS[3:]
SIDE = 8  # px of the gray model's pictures
TEXTS = ("A red panda", "two small birds on a wire", "user prompt")
# Aspect ratios of the tiny published model's data; its sizes are 64x64 and 32x96.
SHAPES = ((80, 80), (60, 180))


def gray_model(directory: Path) -> ModelDirectory:
    """A model whose latents are gray pixels and whose captions are words; without a transformer's weights."""
    config = SanaConfig(
        in_channels=1,
        out_channels=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=SIDE,
    )
    write_model_directory(
        directory,
        transformer_config=config,
        sampler=FlowEuler(flow_shift=1.0),
        text_encoder=WordEncoder(WORDS, embedding_dim=12, max_length=5),
        autoencoder=PixelAutoencoder(1),
        defaults={"guidance_scale": 2.0, "num_inference_steps": 2, "height": SIDE, "width": SIDE},
    )
    return read_model_directory(directory)


def published_model(directory: Path) -> ModelDirectory:
    """A tiny random DC-AE, without attention, and Gemma, as diffusers publishes them."""
    import torch
    from diffusers import AutoencoderDC

    from tests.parity import pipeline_oracle

    pipeline = pipeline_oracle.make_pipeline("sana-1.0")
    types, channels, layers = ("ResBlock",) * 6, (4, 4, 4, 4, 4, 8), (1,) * 6
    small = AutoencoderDC(
        latent_channels=pipeline_oracle.LATENT_CHANNELS,
        encoder_block_types=types,
        decoder_block_types=types,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    pipeline_oracle.randomise(small.eval(), torch.Generator().manual_seed(3))
    pipeline.register_modules(vae=small)
    pipeline.save_pretrained(directory)
    return read_model_directory(directory)


def gray_pictures(directory: Path, count: int = 20, first: int = 0) -> Path:
    """Pictures p000.png, ... of the gray model's size, with captions of which there are ten."""
    directory.mkdir(exist_ok=True)
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE), np.uint8)
        Image.fromarray(pixels).save(directory / f"p{number:03d}.png")
        (directory / f"p{number:03d}.txt").write_text(f"a handwritten {NUMBERS[number % 10]}")
    return directory


def colour_pictures(directory: Path, count: int = 6) -> Path:
    """Smooth pictures q0.png, ... of two shapes in turn."""
    from tests.parity.pipeline_oracle import picture

    directory.mkdir(exist_ok=True)
    for number in range(count):
        picture(*SHAPES[number % 2], seed=number).save(directory / f"q{number}.png")
        (directory / f"q{number}.txt").write_text(
            ("A red panda", "two small birds on a wire", "user prompt")[number % 3]
        )
    return directory


def run_config(pictures: Path | None, cache: Path | None, *, batch_size: int = 2, **data: Any) -> RunConfig:
    """The finetune preset on these pictures; ``data`` are fields of its data."""
    config = load_preset("finetune")
    values = {"path": None if pictures is None else str(pictures), "cache": None if cache is None else str(cache)}
    data = dataclasses.replace(config.data, **values, **data)
    return dataclasses.replace(config, data=data, batch_size=batch_size)


def prepared(config: RunConfig, model: ModelDirectory, **options: Any) -> tuple[Path, list[str]]:
    """Makes the cache; what was printed comes with it."""
    lines: list[str] = []
    return precompute(config, model, say=lines.append, **options), lines


def image_data(**fields: Any) -> ImageDataConfig:
    return dataclasses.replace(ImageDataConfig(), **fields)


def contents(directory: Path) -> dict[tuple, dict[str, tuple]]:
    """Every array of a cache by kind and name: dtype, shape and bytes."""
    reader = CacheReader(directory)
    return {
        (kind, *name): {n: (a.dtype.name, a.shape, a.tobytes()) for n, a in reader.read(place).items()}
        for kind in (LATENTS, PROMPTS)
        for name, place in reader.places(kind).items()
    }


def stop_request() -> Any:
    """A request to stop as training makes it, without signals: set its ``signal``."""
    return SimpleNamespace(signal=None, nothing_to_lose=True, writing=threading.Lock())
