"""What differs between the transformers that are trained, by their configurations: network, sharding, time."""

from __future__ import annotations

import jax.numpy as jnp

from configs.schema import ComputeConfig
from kernels.typing import Array, Float, PyTree
from sana_jax.models.condition_tokens import ConditionTokens
from sana_jax.models.sana_video import SanaVideoConfig
from sana_jax.models.sharding_rules import SANA, SANA_VIDEO, Rule
from sana_jax.pipelines.families import Transformer, TransformerConfig, family_of
from sana_jax.pipelines.sampling_function import transformer_variables
from train.batch import Batch


def make_network(config: TransformerConfig, compute: ComputeConfig) -> Transformer:
    """The transformer of a configuration, computed as a run computes it."""
    network = family_of(config).transformer
    return network(config, jnp.dtype(compute.dtype), remat=compute.remat, scan_blocks=compute.scan_blocks)


def sharding_rules(config: TransformerConfig) -> tuple[Rule, ...]:
    """Where the parameters of a transformer lie on a mesh."""
    return SANA_VIDEO if isinstance(config, SanaVideoConfig) else SANA


def predicted_velocity(
    transformer: Transformer,
    params: PyTree,
    noisy: Float[Array, "B *X C"],
    timestep: Float[Array, " B"] | Float[Array, "B T"],
    batch: Batch,
    lora: PyTree | None = None,
    tokens: ConditionTokens | None = None,
) -> Float[Array, "B *X C"]:
    """What a transformer predicts for a batch's captions.

    Args:
        transformer: of pictures, or of videos.
        params: its parameters.
        noisy: noised latents.
        timestep: 0 to 1000; of each latent frame for video models alone.
        batch: its captions are read.
        lora: beside the parameters; None for none.
        tokens: condition tokens, for models of pictures; None for none.
    """
    config = transformer.config
    # SANA-Video takes times as they are
    scale = 1.0 if isinstance(config, SanaVideoConfig) else config.timestep_scale
    more = {} if tokens is None else {"condition_tokens": tokens}
    return transformer.apply(
        transformer_variables(params, lora),
        noisy,
        batch.prompt_embeds,
        timestep * scale,
        encoder_attention_mask=batch.prompt_attention_mask,
        **more,
    )
