"""The flow-matching loss at fixed noise levels and fixed noise: a curve that falls because the network gets better.

The training loss jumps with the noise levels that happen to be drawn. Here every sample has the same noise at every
step, in every run that resumes, on any number of devices and in any batch: its noise is a function of the seed and of
the sample's number alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kernels.typing import Array, Float, Int, Shaped
from sana_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS, add_noise, flow_matching_loss, velocity_target
from sana_jax.errors import UserError
from train.batch import FRAME_VALID, Batch
from train.randomness import stream

# (noisy latents (B, H, W, C), timestep (B,) in 0..1000, batch) -> velocity (B, H, W, C)
VelocityFunction = Callable[[Array, Array, Batch], Array]


def validation_losses(
    velocity: VelocityFunction,
    batch: Batch,
    sigmas: Sequence[float],
    seed: int,
    indices: Int[Array, " B"] | None = None,
    counted: Shaped[Array, " B"] | None = None,
    first_given: bool = False,
) -> Float[Array, " K"]:
    """The mean loss at each noise level; ``jax.jit`` it with everything but the arrays closed over.

    Args:
        velocity: the network, as ``sample_losses`` calls it.
        batch: samples with their captions; nothing is dropped.
        sigmas: K noise levels above 0 and below 1.
        seed: of the noise.
        indices: each sample's number in the validation set; by default 0 to B - 1.
        counted: 1 for samples that count, 0 for those that only fill the batch; by default all count. A batch in which
            none counts has loss 0. The mean over several batches weighs each with its number of samples that count.
        first_given: whether the first latent frame of clips is given, as ``FlowMatching`` gives it.

    Raises:
        UserError: noise levels that are not allowed.
    """
    losses = sample_losses(velocity, batch, sigmas, seed, indices, first_given)
    weight = jnp.ones(losses.shape[1]) if counted is None else jnp.asarray(counted, jnp.float32)
    # a sample that only fills the batch may hold anything
    total = jnp.where(weight > 0, losses * weight, 0.0).sum(axis=1)
    return total / jnp.maximum(weight.sum(), 1.0)


def sample_losses(
    velocity: VelocityFunction,
    batch: Batch,
    sigmas: Sequence[float],
    seed: int,
    indices: Int[Array, " B"] | None = None,
    first_given: bool = False,
) -> Float[Array, "K B"]:
    """Every sample's loss at every noise level, float32; arguments and errors as in ``validation_losses``.

    A sample has the same noise at all levels. The levels are computed one after another, so that K of them take no
    more memory than one.
    """
    timesteps = [_timestep(sigma) for sigma in sigmas]
    if not timesteps:
        raise UserError("no noise levels to validate at; give one or more above 0 and below 1, such as 0.1 0.5 0.9")
    latents = jnp.asarray(batch.latents, jnp.float32)
    rows = latents.shape[0]
    noise = validation_noise(seed, jnp.arange(rows) if indices is None else indices, latents.shape[1:])
    target = velocity_target(latents, noise)
    axes, noised = (rows,), None  # which frames have the level, where it is not all of them
    if first_given:
        axes, noised = latents.shape[:2], jnp.arange(latents.shape[1]) > 0
    counted = batch.conditions.get(FRAME_VALID)
    if noised is not None:
        counted = jnp.broadcast_to(noised if counted is None else noised & counted, axes)

    def at(level: tuple[Array, Array]) -> Array:
        sigma, timestep = (jnp.broadcast_to(each if noised is None else each * noised, axes) for each in level)
        noisy = add_noise(latents, noise, sigma)
        return flow_matching_loss(velocity(noisy, timestep, batch), target, counted)

    return jax.lax.map(at, (jnp.asarray(list(sigmas), jnp.float32), jnp.asarray(timesteps, jnp.float32)))


def validation_noise(seed: int, indices: Int[Array, " B"], shape: Sequence[int]) -> Float[Array, "B *X"]:
    """Unit normal noise of samples with these numbers: each a function of the seed and its number alone."""
    key = stream(seed, 0, "validation_noise")
    draw = jax.vmap(lambda index: jax.random.normal(jax.random.fold_in(key, index), tuple(shape), jnp.float32))
    return draw(jnp.asarray(indices, jnp.int32))


def _timestep(sigma: float) -> int:
    """What the network is told at a noise level: floor(1000·σ), as in training."""
    if not 0 < sigma < 1:
        raise UserError(f"noise level {sigma} is not allowed; choose levels above 0 (clean) and below 1 (pure noise)")
    return math.floor(round(NUM_TRAIN_TIMESTEPS * sigma, 6))  # 0.57 is 570, not 569.99...
