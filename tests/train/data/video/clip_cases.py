"""Data sets of videos, models and runs for the tests of caches of clips: tiny, and the same every time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from configs import load_preset
from configs.data import VideoDataConfig
from configs.schema import RunConfig
from sana_jax.autoencoders import PixelVideoAutoencoder
from sana_jax.diffusion.samplers import FlowEuler
from sana_jax.models.sana_video import SanaVideoConfig
from sana_jax.pipelines.model_directory import ModelDirectory, read_model_directory, write_model_directory
from sana_jax.text_encoders import WordEncoder
from tests.train.data.video.clip_files import write_video

WORDS = ("a", "long", "short", "tall", "video", "picture", "motion", "score:", "5.", "7.")
SIZE = (16, 32)  # of the model's clips
FPS = 10


def video_model(directory: Path) -> ModelDirectory:
    """A model whose latents are RGB pixels and whose captions are words; without a transformer's weights."""
    config = SanaVideoConfig(
        in_channels=3,
        out_channels=3,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
    )
    write_model_directory(
        directory,
        transformer_config=config,
        sampler=FlowEuler(flow_shift=1.0),
        text_encoder=WordEncoder(WORDS, embedding_dim=12, max_length=8),
        autoencoder=PixelVideoAutoencoder(3),
        defaults={
            **{"guidance_scale": 2.0, "num_inference_steps": 2, "height": 16, "width": 32},
            **{"frames": 5, "fps": 10.0},
        },
        pipeline="SanaVideoPipeline",
    )
    return read_model_directory(directory, "SanaVideoPipeline")


def videos(directory: Path) -> Path:
    """Three videos of 2, 1.2 and 0.3 seconds at ten frames per second, the second taller than the others."""
    (directory / "more").mkdir(parents=True)
    write_video(directory / "long.mp4", 20, fps=FPS, key_every=4)
    write_video(directory / "more" / "tall.mkv", 12, fps=FPS, size=(128, 64), first=100)
    write_video(directory / "short.mp4", 3, fps=FPS)
    for name, text in {"long": "a long video", "more/tall": "a tall video", "short": "a short video"}.items():
        (directory / f"{name}.txt").write_text(text)
    return directory


def clip_config(path: Path | None, cache: Path | None, *, batch_size: int = 2, **data: Any) -> RunConfig:
    """The finetune preset on these videos; ``data`` are fields of its data."""
    values = {
        "path": None if path is None else str(path),
        "cache": None if cache is None else str(cache),
        **{"clip_frames": 5, "clip_fps": float(FPS), "clip_size": SIZE},
        **data,
    }
    return dataclasses.replace(load_preset("finetune"), data=VideoDataConfig(**values), batch_size=batch_size)
