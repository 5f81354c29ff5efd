"""A tiny real model, as a training run leaves it."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax.autoencoders import PixelAutoencoder, PixelVideoAutoencoder
from sana_jax.diffusion.samplers import FlowEuler
from sana_jax.models.sana import SanaConfig, SanaTransformer
from sana_jax.models.sana_video import SanaVideoConfig, SanaVideoTransformer
from sana_jax.pipelines.model_directory import write_model_directory
from sana_jax.pipelines.text_to_image import abstract_params
from sana_jax.text_encoders import WordEncoder
from train.checkpoints import CheckpointStore

WORDS = ("a", "handwritten", "zero", "one", "seven")
STEP = 7


@dataclasses.dataclass(frozen=True)
class Run:
    directory: pathlib.Path
    config: SanaConfig
    params: dict
    ema: dict


class Unreadable:
    """What NumPy can't read, as a tensor of torch in bfloat16."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.ndim = shape, len(shape)

    def __array__(self, *arguments, **options):
        raise TypeError("Got unsupported ScalarType BFloat16")


def tiny_config(**changes) -> SanaConfig:
    values = {
        "in_channels": 1,
        "out_channels": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
        "sample_size": 8,
    }
    return SanaConfig.from_dict({**values, **changes})


def random_params(config: SanaConfig, seed: int) -> dict:
    """Parameters that are not at their initial values, so that every input reaches the output."""
    leaves, structure = jax.tree.flatten(abstract_params(SanaTransformer(config)))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(structure, [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


def write_video_run(directory: pathlib.Path) -> None:
    """A run of a gray video model of 8 x 8 pixels and 6 frames, whose latents are the pixels."""
    values = dataclasses.asdict(tiny_config())
    names = {field.name for field in dataclasses.fields(SanaVideoConfig)} - {"patch_size", "sample_size"}
    config = SanaVideoConfig.from_dict({name: values[name] for name in names if name in values})
    transformer = SanaVideoTransformer(config)
    leaves, structure = jax.tree.flatten(abstract_params(transformer))
    draw = np.random.default_rng(0)
    params = jax.tree.unflatten(structure, [0.3 * draw.standard_normal(x.shape, np.float32) for x in leaves])
    defaults = {"guidance_scale": 2.0, "num_inference_steps": 2, "height": 8, "width": 8, "frames": 6, "fps": 8.0}
    write_model_directory(
        directory,
        transformer_config=config,
        sampler=FlowEuler(flow_shift=3.0),
        text_encoder=WordEncoder(WORDS, embedding_dim=12, max_length=5),
        autoencoder=PixelVideoAutoencoder(1),
        defaults=defaults,
        pipeline="SanaVideoPipeline",
    )
    with CheckpointStore(directory / "checkpoints", keep_last=2, keep_every=None, asynchronous=False) as store:
        state = {"opt_state": {"count": jnp.zeros(())}, "data_position": 0, "config": {}}
        store.save(STEP, params=params, ema=None, wait=True, **state)


def write_run(directory: pathlib.Path, params: dict, ema: dict | None, config: SanaConfig, channels: int = 1) -> None:
    write_model_directory(
        directory,
        transformer_config=config,
        sampler=FlowEuler(flow_shift=3.0),
        text_encoder=WordEncoder(WORDS, embedding_dim=12, max_length=5),
        autoencoder=PixelAutoencoder(channels),
        defaults={"guidance_scale": 2.5, "num_inference_steps": 3, "height": 8, "width": 8, "license": "CC-BY-4.0"},
    )
    with CheckpointStore(directory / "checkpoints", keep_last=2, keep_every=None, asynchronous=False) as store:
        state = {"opt_state": {"count": jnp.zeros(())}, "data_position": 0, "config": {}}
        store.save(STEP, params=params, ema=ema, wait=True, **state)
