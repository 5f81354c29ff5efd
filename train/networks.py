"""What differs between the transformers that are trained, by their configurations: network, sharding, time."""

from __future__ import annotations

import jax.numpy as jnp

from configs.schema import ComputeConfig
from kernels.typing import Array, Float, PyTree
from sana_jax.models.condition_tokens import ConditionTokens
from sana_jax.models.context_parallel import split_where_possible
from sana_jax.models.sana_video import SanaVideoConfig
from sana_jax.models.sana_wm import SanaWMConfig
from sana_jax.models.sharding_rules import SANA, SANA_VIDEO, SANA_WM, Rule
from sana_jax.pipelines.families import Transformer, TransformerConfig, make_transformer
from sana_jax.pipelines.sampling_function import transformer_variables
from train.batch import CAMERA, FRAME_VALID, PLUCKER, Batch


def make_network(config: TransformerConfig, compute: ComputeConfig) -> Transformer:
    """The transformer of a configuration, computed as a run computes it.

    Raises:
        UserError: float16's saturation for a video model, none of which was trained with it.
    """
    network = make_transformer(config, jnp.dtype(compute.dtype), compute.emulate_fp16_saturation)
    return network.clone(remat=compute.remat, scan_blocks=compute.scan_blocks)


def sharding_rules(config: TransformerConfig) -> tuple[Rule, ...]:
    """Where the parameters of a transformer lie on a mesh."""
    if isinstance(config, SanaWMConfig):
        return SANA_WM
    return SANA_VIDEO if isinstance(config, SanaVideoConfig) else SANA


def network_conditions(config: TransformerConfig) -> tuple[str, ...]:
    """Names of the conditions that a transformer reads from a batch: a world model's camera."""
    if not isinstance(config, SanaWMConfig):
        return ()
    return (CAMERA, PLUCKER) if config.use_chunk_plucker_post_attn else (CAMERA,)


def predicted_velocity(
    transformer: Transformer,
    params: PyTree,
    noisy: Float[Array, "B *X C"],
    timestep: Float[Array, " B"] | Float[Array, "B T"],
    batch: Batch,
    lora: PyTree | None = None,
    tokens: ConditionTokens | None = None,
    block_starts: tuple[int, ...] | None = None,
    guidance_scale: float | None = None,
) -> Float[Array, "B *X C"]:
    """What a transformer predicts for a batch's captions and, of a world model, its camera.

    Args:
        transformer: of pictures, or of videos.
        params: its parameters.
        noisy: noised latents.
        timestep: 0 to 1000; of each latent frame for video models alone.
        batch: its captions are read; by world models ``network_conditions`` as well and, where it is there, which
            frames are no padding.
        lora: beside the parameters; None for none.
        tokens: condition tokens, for models of pictures; None for none.
        block_starts: first latent frame of every causal block, for video and world models; None: bidirectional.
        guidance_scale: what SANA-Sprint's network is told; None for networks that have no such input.
    """
    config = transformer.config
    variables = transformer_variables(params, lora)
    if isinstance(config, SanaWMConfig):
        given = {name: batch.conditions[name] for name in network_conditions(config)}
        times = timestep if timestep.ndim == 2 else timestep[:, None]
        return split_where_possible(transformer).apply(
            variables,
            noisy,
            batch.prompt_embeds,
            jnp.broadcast_to(times, noisy.shape[:2]),
            batch.prompt_attention_mask,
            **given,
            frame_valid_mask=batch.conditions.get(FRAME_VALID),
            block_starts=block_starts,
        )
    # SANA-Video takes times as they are
    scale = 1.0 if isinstance(config, SanaVideoConfig) else config.timestep_scale
    more = {} if tokens is None else {"condition_tokens": tokens}
    if block_starts is not None:
        more["block_starts"] = block_starts
    if guidance_scale is not None:
        scale = 1e-3  # its times are noise levels from 0 to 1
        more["guidance"] = jnp.full(noisy.shape[0], guidance_scale * config.guidance_embeds_scale)
    return transformer.apply(
        variables,
        noisy,
        batch.prompt_embeds,
        timestep * scale,
        encoder_attention_mask=batch.prompt_attention_mask,
        **more,
    )
