"""Sampling as pure functions of parameters, noise and encoded prompts: what pipelines and training previews share."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.typing import Array, Float, Int, PRNGKeyArray, PyTree
from sana_jax.diffusion.guidance import (
    classifier_free_guidance,
    interval_guidance,
    join_negative_positive,
    split_negative_positive,
)
from sana_jax.diffusion.samplers import Sampler, Schedule
from sana_jax.diffusion.sampling import VelocityFunction, sample_scan
from sana_jax.models.sana import SanaTransformer

SamplingFunction = Callable[..., Float[Array, "B H W C"]]


def initial_latents(seed: int, count: int, shape: tuple[int, int, int]) -> Float[Array, "B C H W"]:
    """Unit normal noise of ``count`` pictures of ``shape`` (C, H, W), float32.

    Picture i's noise is a function of (seed, i) alone: it does not change with ``count``.
    """
    key = jax.random.key(seed)
    draw = jax.vmap(lambda index: jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32))
    return draw(jnp.arange(count))


def guided_velocity(
    transformer: SanaTransformer,
    params: PyTree,
    schedule: Schedule,
    positive: tuple[Float[Array, "B L C"], Int[Array, "B L"]],
    negative: tuple[Float[Array, "B L C"], Int[Array, "B L"]] | None = None,
    guidance_scale: float | Float[Array, ""] = 1.0,
    guidance_interval: tuple[float, float] | None = None,
) -> VelocityFunction:
    """The function (latents, timestep) -> velocity that the sampling loops call.

    With ``negative``, one call of the transformer sees the batch [negative, positive]; without, ``positive`` alone and
    no guidance. Both are (embeddings, mask); a batch of 1 in ``negative`` serves every picture.
    """
    batch = positive[0].shape[0]
    conditions = positive
    if negative is not None:
        repeated = jax.tree.map(lambda array: jnp.broadcast_to(array, (batch, *array.shape[1:])), negative)
        conditions = join_negative_positive(repeated, positive)
    embeds, mask = conditions
    scale = transformer.config.timestep_scale

    def velocity(latents: Float[Array, "B H W C"], timestep: Float[Array, ""]) -> Float[Array, "B H W C"]:
        inputs = latents if negative is None else join_negative_positive(latents, latents)
        timesteps = jnp.broadcast_to(timestep * scale, inputs.shape[:1])
        output = transformer.apply({"params": params}, inputs, embeds, timesteps, encoder_attention_mask=mask).astype(
            jnp.float32
        )
        if negative is None:
            return output
        halves = split_negative_positive(output)
        if guidance_interval is None:
            return classifier_free_guidance(*halves, guidance_scale)
        index = jnp.argmin(jnp.abs(jnp.asarray(schedule.timesteps) - timestep))
        sigma = jnp.asarray(schedule.sigmas)[index]
        return interval_guidance(*halves, guidance_scale, sigma, guidance_interval)

    return velocity


def make_sampling_fn(
    transformer: SanaTransformer,
    sampler: Sampler,
    num_inference_steps: int,
    guidance_scale: float,
    guidance_interval: tuple[float, float] | None = None,
) -> SamplingFunction:
    """A whole sampling run as one pure function, to be jitted.

    Returns:
        ``fn(params, latents, embeds, mask, null_embeds, null_mask, key)`` -> latents (B, H, W, C) in float32, where
        ``latents`` (B, H, W, C) are unit normal, ``embeds`` (B, L, C) and ``mask`` (B, L) are the prompts', and
        ``null_embeds`` (B or 1, L, C) and ``null_mask`` the negative ones. With a guidance scale of 1 or below the
        transformer sees each picture once per step, and the last two are not read and may be None. ``key`` serves
        samplers that draw noise, and may be None for the others.
    """
    schedule = sampler.schedule(num_inference_steps)

    def sample(
        params: PyTree,
        latents: Float[Array, "B H W C"],
        embeds: Float[Array, "B L C"],
        mask: Int[Array, "B L"],
        null_embeds: Float[Array, "B L C"] | None = None,
        null_mask: Int[Array, "B L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B H W C"]:
        negative = (null_embeds, null_mask) if is_guided(guidance_scale) else None
        velocity = guided_velocity(
            transformer, params, schedule, (embeds, mask), negative, guidance_scale, guidance_interval
        )
        return sample_scan(sampler, schedule, velocity, latents, key).latents

    return sample


def is_guided(guidance_scale: float) -> bool:
    """Whether a guidance scale needs the negative branch; 1 and below do not."""
    return guidance_scale > 1
