"""What runs train, by their configuration."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from configs.schema import RunConfig
from configs.world import WorldChunksConfig
from sana_jax.autoencoders import VideoAutoencoder
from sana_jax.errors import UserError
from sana_jax.models.controlnet import SanaControlNet, SanaControlNetConfig
from sana_jax.models.sana import SanaTransformer
from train.batch import Batch
from train.networks import make_network
from train.recipes.base import Prompts, Recipe
from train.recipes.controlnet import ControlNetTraining
from train.recipes.longsana import ChunkCausalTraining, OdeTraining, SelfForcingTraining, causal_network
from train.recipes.lora import LoraTransformer
from train.recipes.sprint import SprintTraining, student_config
from train.recipes.whole import WholeTransformer
from train.recipes.world import WorldChunkCausalTraining

__all__ = ["DataShapes", "Prompts", "Recipe", "make_recipe", "student_config"]


class DataShapes(NamedTuple):
    """What training on windows of growing videos has to know: a batch as shapes, and the latents' autoencoder."""

    batch: Batch
    autoencoder: VideoAutoencoder


def make_recipe(config: RunConfig, data: DataShapes | None = None) -> Recipe:
    """The recipe of a settled configuration; ``data`` is what the few that depend on it need, once it is there."""
    transformer, told = make_network(config.transformer, config.compute), config.flow.embedded_guidance
    if config.sprint is not None:
        shape = dataclasses.replace(config.transformer, guidance_embeds=False)
        return SprintTraining(transformer, transformer.clone(config=shape), config.sprint)
    if config.controlnet is not None:
        return _controlnet(config, transformer)
    if config.lora is not None:
        encoders = None if config.tokens is None else config.tokens.network(config.transformer)
        return LoraTransformer(transformer, config.lora, encoders, getattr(config.data, "conditions", ()), told)
    if isinstance(config.chunk_causal, WorldChunksConfig):
        return WorldChunkCausalTraining(transformer, config.chunk_causal)
    if config.chunk_causal is not None:
        return ChunkCausalTraining(causal_network(transformer), config.chunk_causal)
    if config.ode is not None:
        return OdeTraining(causal_network(transformer), config.ode)
    if config.self_forcing is not None:
        return SelfForcingTraining(causal_network(transformer), transformer, config.self_forcing, *(data or ()))
    return WholeTransformer(transformer, guidance_scale=told)


def _controlnet(config: RunConfig, transformer: SanaTransformer) -> ControlNetTraining:
    layers, settings = config.transformer.num_layers, config.controlnet
    if settings.num_layers >= layers:
        raise UserError(
            f"--controlnet.num-layers {settings.num_layers}: the base model has {layers} blocks; choose 1 to "
            f"{layers - 1}"
        )
    shape = SanaControlNetConfig.beside(config.transformer, settings.num_layers)
    controlnet = SanaControlNet(
        shape, transformer.dtype, remat=transformer.remat, fp16_saturation=transformer.fp16_saturation
    )
    return ControlNetTraining(transformer, controlnet, settings.condition)
