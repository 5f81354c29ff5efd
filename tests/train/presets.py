"""Runs of presets as shapes over any mesh, concrete or abstract."""

from __future__ import annotations

import dataclasses

from jax.sharding import AbstractMesh, AxisType, Mesh

from configs import load_preset
from configs.data import ImageDataConfig
from configs.longsana_data import PromptsDataConfig
from configs.schema import DigitsDataConfig, RunConfig
from sana_jax.models.sana import SanaConfig
from train.plan import ModelShapes, PlannedRun, planned_run, settled
from train.sharding import AXES

MODEL, VIDEO_MODEL = "Sana_1600M_1024px_BF16_diffusers", "SANA-Video_2B_480p_diffusers"
WORLD_MODEL = "SANA-WM_bidirectional"


def abstract_mesh(**axes: int) -> AbstractMesh:
    """Devices that need not be there."""
    return AbstractMesh(tuple(axes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def needs_model(config: RunConfig) -> bool:
    """Whether a preset starts from a model that it does not name."""
    beside = (config.lora, config.controlnet, config.sprint, config.chunk_causal, config.few_steps)
    return config.transformer is None or any(group is not None for group in beside)


def preset_run(name: str, mesh: Mesh | AbstractMesh, narrower: int = 1, remat: str | None = None) -> PlannedRun:
    """The step of a preset, with the published 1.6B, 2B video or world model where it starts from one.

    Args:
        name: of the preset.
        mesh: the devices; the batch is made to divide by them.
        narrower: what heads and caption channels are divided by; the number of blocks stays.
        remat: another policy than the preset's.
    """
    config = load_preset(name)
    if needs_model(config):
        model = VIDEO_MODEL if config.trains_on_clips else MODEL
        config = dataclasses.replace(config, model=WORLD_MODEL if config.trains_a_world else model)
    parts = config.accumulation * mesh.shape["data"] * mesh.shape["fsdp"]
    config = dataclasses.replace(config, batch_size=max(parts, config.batch_size // parts * parts))
    if config.sprint is not None:
        config, model = _with_teacher(config)
    elif name.startswith("moving_digits_"):
        teacher = load_preset("moving_digits").transformer
        config, model = dataclasses.replace(config, transformer=teacher), ModelShapes(teacher, 1, 8, "float32", 1)
    elif name.startswith("moving_camera_"):
        teacher = load_preset("moving_camera").transformer
        config, model = dataclasses.replace(config, transformer=teacher), ModelShapes(teacher, 1, 4, "float32", 1)
    else:
        config, model = settled(config)
    if remat is not None:
        config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat=remat))
    if narrower > 1:
        config = dataclasses.replace(config, transformer=narrow(config.transformer, narrower), batch_size=parts)
        network = model.network and narrow(model.network, narrower)
        model = model._replace(network=network, tokens=16)
        if isinstance(config.data, PromptsDataConfig):
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, clip_size=(128, 192)))
        elif isinstance(config.data, ImageDataConfig):
            config = dataclasses.replace(
                config, data=dataclasses.replace(config.data, resolution=256, aspect_buckets=False)
            )
    return planned_run(config, model, mesh)


def _with_teacher(config: RunConfig) -> tuple[RunConfig, ModelShapes]:
    """Sprint's teacher is told times in [0, 1], which no published model in diffusers' format is."""
    digits = isinstance(config.data, DigitsDataConfig)
    teacher = load_preset("digits").transformer if digits else SanaConfig.sana15_1600m()
    teacher = dataclasses.replace(teacher, timestep_scale=0.001)
    student = dataclasses.replace(teacher, guidance_embeds=True)
    return dataclasses.replace(config, transformer=student), ModelShapes(
        teacher, *((1, 8, "float32") if digits else (32, 300, "bfloat16"))
    )


def narrow(network: SanaConfig, times: int) -> SanaConfig:
    """The same network with fewer heads."""
    heads, cross = network.num_attention_heads // times, network.num_cross_attention_heads // times
    width = heads * network.attention_head_dim
    return dataclasses.replace(
        network,
        num_attention_heads=heads,
        num_cross_attention_heads=cross,
        cross_attention_head_dim=width // cross,
        cross_attention_dim=width,
        caption_channels=network.caption_channels // times,
    )
