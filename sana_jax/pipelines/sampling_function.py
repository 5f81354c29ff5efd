"""Sampling as pure functions of parameters, noise and encoded prompts: what pipelines and training previews share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from sana_jax.diffusion.guidance import (
    ProjectedGuidance,
    classifier_free_guidance,
    interval_guidance,
    projected_guidance,
)
from sana_jax.diffusion.samplers import Sampler, Schedule
from sana_jax.diffusion.samplers.longsana import causal_block_starts
from sana_jax.diffusion.sampling import VelocityFunction, sample_scan
from sana_jax.diffusion.step_caching import Decision, StepCache
from sana_jax.models.condition_tokens import ConditionTokens
from sana_jax.models.controlnet import SanaControlNet
from sana_jax.models.sana import SanaTransformer
from sana_jax.models.sana_video import SanaVideoTransformer
from sana_jax.nn.linear import LORA

SamplingFunction = Callable[..., Float[Array, "B *X C"]]


class Encoded(NamedTuple):
    """Encoded prompts: embeddings, a mask with 1 where a token counts, and further conditions if the model has any."""

    embeds: Float[Array, "B L C"]
    mask: Int[Array, "B L"]
    tokens: ConditionTokens | None = None


class Control(NamedTuple):
    """What a ControlNet reads: the control picture's latents, channels-last, and the weight of its result."""

    latents: Float[Array, "B H W C"]
    scale: Float[Array, ""]


class StepGuidance(NamedTuple):
    """What one step's velocity follows, and how strongly.

    Attributes:
        positive: encoded prompts.
        negative: encoded negative prompts, as many, or one for all; None leaves out classifier-free guidance. It has
            (null) tokens where ``positive`` has tokens.
        scale: of classifier-free guidance; read only with ``negative``.
        perturbed_layers: layers whose self-attention is the identity in the perturbed part; empty leaves it out
            (perturbed-attention guidance, arXiv 2403.17377).
        pag_scale: of perturbed-attention guidance; read only with ``perturbed_layers``.
        control: read only by a network with a ControlNet; of a video network the frames that are given.
    """

    positive: Encoded
    negative: Encoded | None = None
    scale: float | Float[Array, ""] = 1.0
    perturbed_layers: Sequence[int] = ()
    pag_scale: float | Float[Array, ""] = 0.0
    control: Control | Float[Array, "B G H W C"] | None = None


class Network(NamedTuple):
    """A transformer, alone or with a ControlNet; parameters are then ``{"transformer": ..., "controlnet": ...}``."""

    transformer: SanaTransformer
    controlnet: SanaControlNet | None = None

    def velocity(
        self,
        params: PyTree,
        latents: Float[Array, "B H W C"],
        timestep: Float[Array, ""],
        conditions: Encoded,
        identity: Bool[Array, "layers B"] | None = None,
        control: Control | None = None,
        lora: PyTree | None = None,
        step_cache: StepCache | None = None,
    ) -> Float[Array, "B H W C"] | tuple[Float[Array, "B H W C"], StepCache, Decision]:
        """The velocity in float32; ``timestep`` is the sampler's, which the model's ``timestep_scale`` multiplies.

        ``lora`` is the transformer's, a tree beside its parameters; a ControlNet has none. With ``step_cache`` also the
        next step's, and what was decided.
        diffusers leaves ``timestep_scale`` out of its ControlNet and PAG pipelines; here it always applies.
        """
        timesteps = jnp.broadcast_to(timestep * self.transformer.config.timestep_scale, latents.shape[:1])
        residuals = None
        transformer_params = params
        if self.controlnet is not None:
            transformer_params = params["transformer"]
            parts = latents.shape[0] // control.latents.shape[0]
            residuals = self.controlnet.apply(
                {"params": params["controlnet"]},
                latents,
                jnp.concatenate([control.latents] * parts),
                conditions.embeds,
                timesteps,
                conditions.mask,
                control.scale,
            )
        result = self.transformer.apply(
            transformer_variables(transformer_params, lora),
            latents,
            conditions.embeds,
            timesteps,
            encoder_attention_mask=conditions.mask,
            controlnet_residuals=residuals,
            identity_attention=identity,
            condition_tokens=conditions.tokens,
            step_cache=step_cache,
        )
        if step_cache is None:
            return result.astype(jnp.float32)
        velocity, step_cache, decision = result
        return velocity.astype(jnp.float32), step_cache, decision

    def token_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(B, N, D) of the tokens of latents (B, H, W, C)."""
        config = self.transformer.config
        return shape[0], math.prod(n // config.patch_size for n in shape[1:3]), config.inner_dim


class VideoNetwork(NamedTuple):
    """A video transformer, as samplers see it.

    Attributes:
        transformer: the network.
        block_frames: latent frames of a causal block, of which the first takes the remainder; None: bidirectional.
    """

    transformer: SanaVideoTransformer
    block_frames: int | None = None

    def velocity(
        self,
        params: PyTree,
        latents: Float[Array, "B T H W C"],
        timestep: Float[Array, ""],
        conditions: Encoded,
        identity: None = None,
        given: Float[Array, "b G H W C"] | None = None,
        lora: PyTree | None = None,
        step_cache: StepCache | None = None,
    ) -> Float[Array, "B T H W C"] | tuple[Float[Array, "B T H W C"], StepCache, Decision]:
        """The velocity in float32; with ``step_cache`` also the next step's, and what was decided.

        ``given`` are clean latent frames that stand before ``latents``, such as an image that the video begins with:
        the network sees them at timestep 0, and their velocity is left out of the result. They are for the batch, or
        for a part of it that is repeated, as guidance does. ``identity`` is not for video models.
        """
        batch = latents.shape[0]
        timesteps = jnp.broadcast_to(timestep, (batch,))
        start = 0
        if given is not None:
            start = given.shape[1]
            latents = jnp.concatenate([jnp.concatenate([given] * (batch // given.shape[0])), latents], axis=1)
            timesteps = jnp.where(jnp.arange(latents.shape[1]) < start, 0.0, timesteps[:, None])
        starts = None if self.block_frames is None else causal_block_starts(latents.shape[1], self.block_frames)
        output = self.transformer.apply(
            transformer_variables(params, lora),
            latents,
            conditions.embeds,
            timesteps,
            conditions.mask,
            block_starts=starts,
            step_cache=step_cache,
        )
        return velocity_behind(start, output)

    def token_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(B, N, D) of the tokens of latents (B, T, H, W, C), those that are given included."""
        config = self.transformer.config
        return shape[0], math.prod(n // own for n, own in zip(shape[1:4], config.patch_size)), config.inner_dim


def velocity_behind(
    start: int, output: Float[Array, "B T H W C"] | tuple[Float[Array, "B T H W C"], StepCache, Decision]
) -> Float[Array, "B t H W C"] | tuple[Float[Array, "B t H W C"], StepCache, Decision]:
    """The velocity in float32 from frame ``start`` on, of a video network's output with a step cache or without."""
    if not isinstance(output, tuple):
        return output[:, start:].astype(jnp.float32)
    velocity, step_cache, decision = output
    return velocity[:, start:].astype(jnp.float32), step_cache, decision


def network_of(transformer: SanaTransformer | SanaVideoTransformer) -> Network | VideoNetwork:
    """A transformer as samplers see it."""
    return VideoNetwork(transformer) if isinstance(transformer, SanaVideoTransformer) else Network(transformer)


def transformer_variables(params: PyTree, lora: PyTree | None) -> dict[str, PyTree]:
    """What ``SanaTransformer.apply`` takes: the parameters and, where there is one, the LoRA beside them."""
    return {"params": params} if lora is None else {"params": params, LORA: lora}


def initial_latents(seed: int, count: int, shape: tuple[int, ...]) -> Float[Array, "B C *X"]:
    """Unit normal noise of ``count`` pictures of ``shape`` (C, H, W), or videos (C, T, H, W), float32.

    Picture i's noise is a function of (seed, i) alone: it does not change with ``count``.
    """
    key = jax.random.key(seed)
    draw = jax.vmap(lambda index: jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32))
    return draw(jnp.arange(count))


def guided_velocity(
    network: Network | VideoNetwork,
    params: PyTree,
    latents: Float[Array, "B *X C"],
    timestep: Float[Array, ""],
    guidance: StepGuidance,
    lora: PyTree | None = None,
    split: bool = False,
    step_cache: StepCache | None = None,
) -> Any:
    """One step's velocity (B, ..., C) with classifier-free and perturbed-attention guidance.

    The network sees the batch [negative, positive, perturbed], without the parts that are not asked for. The result is
    ``negative + scale·(positive − negative) + pag_scale·(positive − perturbed)``.

    Args:
        network: the transformer, and its ControlNet if it has one.
        params: its parameters.
        latents: noised latents, channels-last.
        timestep: the sampler's.
        guidance: prompts, what else is given, and the scales.
        lora: beside the transformer's parameters; None for none.
        split: the network sees the parts one after another, which takes the memory of one of them.
        step_cache: of the whole batch of parts; not with ``split``.

    Returns:
        The velocity; with ``step_cache`` also the next step's, and what was decided.
    """
    batch, negative = latents.shape[0], guidance.negative
    parts = [guidance.positive]
    if negative is not None:
        parts.insert(0, jax.tree.map(lambda array: jnp.broadcast_to(array, (batch, *array.shape[1:])), negative))
    identity = None
    if guidance.perturbed_layers:
        parts.append(guidance.positive)
        chosen = np.isin(np.arange(network.transformer.config.num_layers), guidance.perturbed_layers)
        perturbed = np.arange(batch * len(parts)) >= batch * (len(parts) - 1)
        identity = jnp.asarray(chosen[:, None] & perturbed)
    predictions, rest = _predictions(
        network, params, latents, timestep, parts, identity, guidance.control, lora, split, step_cache
    )
    conditional = predictions[0 if negative is None else 1]
    result = conditional
    if negative is not None:
        result = classifier_free_guidance(predictions[0], conditional, guidance.scale)
    if guidance.perturbed_layers:
        result = result + guidance.pag_scale * (conditional - predictions[-1])
    return (result, *rest) if rest else result


def _joined(latents: Float[Array, "B *X C"], parts: Sequence[Encoded]) -> tuple[Float[Array, "R *X C"], Encoded]:
    """The latents once for every part, and the parts' conditions, as one batch."""
    conditions = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)
    return jnp.concatenate([latents] * len(parts)), conditions


def _predictions(
    network: Network | VideoNetwork,
    params: PyTree,
    latents: Float[Array, "B *X C"],
    timestep: Float[Array, ""],
    parts: Sequence[Encoded],
    identity: Bool[Array, "layers R"] | None,
    control: Control | Float[Array, "B G H W C"] | None,
    lora: PyTree | None,
    split: bool,
    step_cache: StepCache | None,
) -> tuple[list[Float[Array, "B *X C"]], tuple[()] | tuple[StepCache, Decision]]:
    """The network's velocity for each of the parts, from one batch of them or one after another.

    The second result is that of step caching.
    """
    if step_cache is not None or not split or len(parts) == 1:
        joined, conditions = _joined(latents, parts)
        output, rest = network.velocity(params, joined, timestep, conditions, identity, control, lora, step_cache), ()
        if step_cache is not None:
            output, *rest = output
        return jnp.split(output, len(parts)), tuple(rest)
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *parts)
    if identity is not None:
        identity = jnp.stack(jnp.split(identity, len(parts), axis=1))

    def one(part):
        return network.velocity(params, latents, timestep, part[0], part[1], control, lora)

    return list(jax.lax.map(one, (stacked, identity))), ()


def projected_velocity(
    network: Network | VideoNetwork,
    params: PyTree,
    latents: Float[Array, "B *X C"],
    timestep: Float[Array, ""],
    sigma: Float[Array, ""],
    guidance: StepGuidance,
    settings: ProjectedGuidance,
    running: Float[Array, "B *X C"],
    lora: PyTree | None = None,
    split: bool = False,
    step_cache: StepCache | None = None,
) -> Any:
    """One step's velocity with adaptive projected guidance, which acts on the clean samples x − sigma·velocity.

    Arguments as in ``guided_velocity`` and ``projected_guidance``, with negative prompts and no perturbed layers.
    ``running`` is 0 before the first step, and what is returned beside the velocity before the others; a step at scale
    1, outside of a guidance interval, adds nothing to it. With ``step_cache`` its results follow these two.
    """
    batch, given = latents.shape[0], guidance.control
    negative = jax.tree.map(lambda array: jnp.broadcast_to(array, (batch, *array.shape[1:])), guidance.negative)
    parts = [negative, guidance.positive]
    halves, rest = _predictions(network, params, latents, timestep, parts, None, given, lora, split, step_cache)
    unconditional, conditional = (latents - sigma * half for half in halves)
    guided, added = projected_guidance(unconditional, conditional, guidance.scale, settings, running)
    return (latents - guided) / sigma, jnp.where(guidance.scale == 1, running, added), *rest


def make_sampling_fn(
    transformer: SanaTransformer | SanaVideoTransformer,
    sampler: Sampler,
    num_inference_steps: int,
    guidance_scale: float,
    guidance_interval: tuple[float, float] | None = None,
) -> SamplingFunction:
    """A whole sampling run as one pure function, to be jitted.

    Returns:
        ``fn(params, latents, embeds, mask, null_embeds, null_mask, key, lora, tokens, null_tokens)`` -> latents
        (B, H, W, C) in float32, or (B, T, H, W, C) of a video transformer, where ``latents`` of that shape are unit
        normal, ``embeds`` (B, L, C) and ``mask`` (B, L) are the prompts', and ``null_embeds`` (B or 1, L, C) and
        ``null_mask`` the negative ones. With a guidance scale of 1 or below the transformer sees each sample once per
        step, and the last two are not read and may be None. ``key`` serves samplers that draw noise, and may be None
        for the others. ``lora`` is a tree beside the parameters, or None. ``tokens`` are condition tokens of B samples,
        or None, and ``null_tokens`` those of B or 1 without conditions.
    """
    schedule = sampler.schedule(num_inference_steps)
    network = network_of(transformer)

    def sample(
        params: PyTree,
        latents: Float[Array, "B *X C"],
        embeds: Float[Array, "B L C"],
        mask: Int[Array, "B L"],
        null_embeds: Float[Array, "B L C"] | None = None,
        null_mask: Int[Array, "B L"] | None = None,
        key: PRNGKeyArray | None = None,
        lora: PyTree | None = None,
        tokens: ConditionTokens | None = None,
        null_tokens: ConditionTokens | None = None,
    ) -> Float[Array, "B *X C"]:
        positive = Encoded(embeds, mask, tokens)
        negative = Encoded(null_embeds, null_mask, null_tokens) if is_guided(guidance_scale) else None
        velocity = _velocity_of_schedule(
            network, params, schedule, positive, negative, guidance_scale, guidance_interval, lora
        )
        return sample_scan(sampler, schedule, velocity, latents, key).latents

    return sample


def _velocity_of_schedule(
    network: Network | VideoNetwork,
    params: PyTree,
    schedule: Schedule,
    positive: Encoded,
    negative: Encoded | None,
    guidance_scale: float,
    interval: tuple[float, float] | None,
    lora: PyTree | None,
) -> VelocityFunction:
    """``guided_velocity`` as the sampling loops call it, with the guidance that a step's noise level asks for."""

    def velocity(latents: Float[Array, "B *X C"], timestep: Float[Array, ""]) -> Float[Array, "B *X C"]:
        scale = guidance_scale
        if interval is not None:
            index = jnp.argmin(jnp.abs(jnp.asarray(schedule.timesteps) - timestep))
            scale = scale_in_interval(guidance_scale, jnp.asarray(schedule.sigmas)[index], interval)
        return guided_velocity(network, params, latents, timestep, StepGuidance(positive, negative, scale), lora)

    return velocity


def scale_in_interval(
    guidance_scale: float, sigma: float | Float[Array, ""], interval: tuple[float, float]
) -> Float[Array, ""]:
    """The guidance scale at a noise level: 1, which is the positive prediction alone, outside the interval.

    Raises:
        UserError: if the interval is not 0 <= lowest <= highest <= 1.
    """
    return interval_guidance(jnp.float32(0.0), jnp.float32(1.0), guidance_scale, sigma, interval)


def is_guided(guidance_scale: float) -> bool:
    """Whether a guidance scale needs the negative branch; 1 and below do not."""
    return guidance_scale > 1
