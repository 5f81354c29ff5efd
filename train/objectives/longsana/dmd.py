"""Distribution matching: the generator's gradient is the difference of two score networks' predictions.

The fake score has learnt the generator's videos, the real score the data. Both clean a noised video of the generator;
the difference, normalised, is the direction in which the video should go (DMD, arXiv 2405.14867; self-forcing, arXiv
2506.08009).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.typing import Array, Float, Int, Shaped
from sana_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS, align_leading


def score_level(uniform: Float[Array, " B"], lowest: int | Int[Array, ""] = 0) -> Int[Array, " B"]:
    """Whole levels in [lowest, 1000) from U[0, 1) draws; a ``lowest`` of 1000 leaves 999 alone."""
    lowest = jnp.minimum(jnp.asarray(lowest, jnp.float32), NUM_TRAIN_TIMESTEPS - 1)
    level = jnp.floor(lowest + uniform * (NUM_TRAIN_TIMESTEPS - lowest)).astype(jnp.int32)
    return jnp.minimum(level, NUM_TRAIN_TIMESTEPS - 1)


def score_timestep(level: Int[Array, " B"], timestep_shift: float, least: float, greatest: float) -> Float[Array, " B"]:
    """The time at which scores are compared: s·l/(1 + (s − 1)·l), in thousandths, between ``least`` and ``greatest``.

    Args:
        level: whole levels in [0, 1000).
        timestep_shift: s; 5 in the published recipe.
        least: 20 there.
        greatest: 980 there.
    """
    level = jnp.asarray(level, jnp.float32) / NUM_TRAIN_TIMESTEPS
    shifted = timestep_shift * level / (1 + (timestep_shift - 1) * level) * NUM_TRAIN_TIMESTEPS
    return jnp.clip(shifted, least, greatest)


def guided_prediction(
    conditional: Float[Array, "*X"], unconditional: Float[Array, "*X"], guidance: float
) -> Float[Array, "*X"]:
    """cond + guidance·(cond − uncond): the published 3 is a classifier-free guidance scale of 4."""
    return conditional + guidance * (conditional - unconditional)


class DistributionGradient(NamedTuple):
    """The direction of the loss, and what it was divided by."""

    gradient: Float[Array, "B *X"]
    normalizer: Float[Array, " B"]


def distribution_gradient(
    generated: Float[Array, "B *X"], real: Float[Array, "B *X"], fake: Float[Array, "B *X"], least: float = 0.0
) -> DistributionGradient:
    """(fake − real) / mean|generated − real|, the mean over all of a sample; no gradient passes.

    Where a video equals the real prediction, 0/0 becomes 0. What a score itself gives that is not finite stays so, and
    the step does not count: the published code makes it 0, and a score that has overflowed teaches nothing, unseen.

    Args:
        generated: the generator's video.
        real: the real score's clean prediction, guided.
        fake: the fake score's.
        least: what is divided by at least.
    """
    generated, real, fake = jax.lax.stop_gradient((generated, real, fake))
    normalizer = jnp.maximum(jnp.abs(generated - real).mean(tuple(range(1, generated.ndim))), least)
    apart = fake - real
    gradient = jnp.nan_to_num(apart / align_leading(normalizer, generated))
    return DistributionGradient(jnp.where(jnp.isfinite(apart), gradient, jnp.nan), normalizer)


def dmd_loss(
    generated: Float[Array, "B *X"], gradient: Float[Array, "B *X"], mask: Shaped[Array, "B *M"] | None = None
) -> Float[Array, " B"]:
    """Each sample's ½·mean(gradient²), whose derivative by the video is gradient/count.

    It is ½·mean((x − (x − gradient))²) with the bracket held fixed, without the digits that the subtraction loses.

    Args:
        generated: the generator's video, with gradients.
        gradient: of ``distribution_gradient``.
        mask: which elements count, lined up with the leading axes: (B, T) to leave frames out. The mean runs over
            the elements that count.
    """
    gradient = jax.lax.stop_gradient(jnp.asarray(gradient, jnp.float32))
    generated = jnp.asarray(generated, jnp.float32)
    moved = gradient * (generated - jax.lax.stop_gradient(generated)) + 0.5 * jnp.square(gradient)
    return masked_mean(moved, mask)


def masked_mean(values: Float[Array, "B *X"], mask: Shaped[Array, "B *M"] | None) -> Float[Array, " B"]:
    """Each sample's mean over the elements that count; 0 where none does."""
    rest = tuple(range(1, values.ndim))
    if mask is None:
        return values.mean(rest)
    weight = jnp.broadcast_to(align_leading(jnp.asarray(mask, jnp.float32), values, "mask"), values.shape)
    return jnp.sum(values * weight, rest) / jnp.maximum(jnp.sum(weight, rest), 1.0)
