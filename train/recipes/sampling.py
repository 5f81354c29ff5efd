"""Whole sampling runs of the networks that are trained, as previews draw them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from kernels.typing import Array, Float, PyTree
from sana_jax.diffusion.samplers import SCM, Sampler
from sana_jax.diffusion.sampling import sample_scan
from sana_jax.models.condition_tokens import ConditionTokens
from sana_jax.models.sana import SanaTransformer
from sana_jax.models.sana_wm import SanaWMTransformer
from sana_jax.pipelines.families import Transformer
from sana_jax.pipelines.sampling_function import (
    Encoded,
    StepGuidance,
    guided_velocity,
    is_guided,
    make_sampling_fn,
)
from sana_jax.pipelines.world_network import WorldGiven, WorldNetwork
from train.batch import CAMERA, FIRST_FRAME, PLUCKER
from train.objectives.scm import network_velocity
from train.recipes.base import Prompts

PreviewFunction = Callable[..., Float[Array, "B *X C"]]


def preview_sampling(
    transformer: Transformer, sampler: Sampler, num_inference_steps: int, guidance_scale: float
) -> PreviewFunction:
    """``fn(params, latents, prompts, conditions, lora=None, tokens=None, null_tokens=None)`` -> latents, to be jitted.

    Guided sampling as the network's pipeline does it. Of ``conditions`` world models alone read: see
    ``world_sampling``; condition tokens are neither for them nor for SANA-Sprint.
    """
    if isinstance(sampler, SCM):
        return consistency_sampling(transformer, sampler, num_inference_steps, guidance_scale)
    if isinstance(transformer, SanaWMTransformer):
        return world_sampling(transformer, sampler, num_inference_steps, guidance_scale)
    sample = make_sampling_fn(transformer, sampler, num_inference_steps, guidance_scale)

    def function(
        params: PyTree,
        latents: Float[Array, "B *X C"],
        prompts: Prompts,
        conditions: Mapping[str, Array],
        lora: PyTree | None = None,
        tokens: ConditionTokens | None = None,
        null_tokens: ConditionTokens | None = None,
    ) -> Float[Array, "B *X C"]:
        return sample(params, latents, *prompts, lora=lora, tokens=tokens, null_tokens=null_tokens)

    return function


def consistency_sampling(
    transformer: SanaTransformer, sampler: SCM, num_inference_steps: int, guidance_scale: float
) -> Callable[..., Float[Array, "B H W C"]]:
    """``fn(params, latents, prompts, conditions, lora=None)`` -> latents: a sampling run as ``SanaSprintPipeline`` does
    it, whose noise between the steps depends on the starting noise alone."""
    if num_inference_steps != 2:  # as SanaSprintPipeline does
        sampler = dataclasses.replace(sampler, intermediate_timesteps=None)
    schedule = sampler.schedule(num_inference_steps)

    def sample(
        params: PyTree,
        latents: Float[Array, "B H W C"],
        prompts: Prompts,
        conditions: Mapping[str, Array],
        lora: PyTree | None = None,
    ) -> Float[Array, "B H W C"]:
        rows = latents.shape[0]
        guidance = jnp.full(rows, guidance_scale * transformer.config.guidance_embeds_scale)

        def velocity(noisy, angle):
            angles, captions = jnp.broadcast_to(angle, (rows,)), (prompts.embeds, prompts.mask)
            scaled = noisy / sampler.sigma_data
            return sampler.sigma_data * network_velocity(
                transformer, params, scaled, angles, captions, guidance, 1.0, lora
            )

        state = sample_scan(sampler, schedule, velocity, latents * sampler.sigma_data, jax.random.key(0))
        return state.denoised / sampler.sigma_data

    return sample


def world_sampling(
    transformer: SanaWMTransformer,
    sampler: Sampler,
    num_inference_steps: int,
    guidance_scale: float,
    blocks: Callable[[int], tuple[int, ...]] | None = None,
) -> Callable[..., Float[Array, "B T H W C"]]:
    """``fn(params, latents, prompts, conditions, lora=None)`` -> latents: a sampling run as ``SanaWMPipeline`` does it.

    ``conditions`` holds the camera and, as ``first_frame``, the clean latents of what the clips begin with, whose place
    in ``latents`` is not read.

    Args:
        transformer: the network.
        sampler: whose steps leave given frames alone.
        num_inference_steps: steps.
        guidance_scale: of classifier-free guidance.
        blocks: number of latent frames -> first frames of causal blocks, which share their noise level; None:
            bidirectional.
    """
    schedule = sampler.schedule(num_inference_steps)

    def sample(
        params: PyTree,
        latents: Float[Array, "B T H W C"],
        prompts: Prompts,
        conditions: Mapping[str, Array],
        lora: PyTree | None = None,
    ) -> Float[Array, "B T H W C"]:
        first = conditions[FIRST_FRAME].astype(jnp.float32)
        given = WorldGiven(first, conditions[CAMERA], conditions.get(PLUCKER))
        network = WorldNetwork(transformer, None if blocks is None else blocks(latents.shape[1]))
        positive = Encoded(prompts.embeds, prompts.mask)
        negative = Encoded(prompts.null_embeds, prompts.null_mask) if is_guided(guidance_scale) else None

        def velocity(noisy, timestep):
            guidance = StepGuidance(positive, negative, guidance_scale, control=given)
            return guided_velocity(network, params, noisy, timestep, guidance, lora)

        sampled = sample_scan(sampler, schedule, velocity, latents[:, first.shape[1] :], None).latents
        return jnp.concatenate([first, sampled], axis=1)

    return sample
