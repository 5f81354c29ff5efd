"""Classifier-free guidance and the doubled batch it runs on.

The network is evaluated once on a batch [negative, positive] and its two halves are combined
(Ho and Salimans, arXiv 2207.12598). Guidance may be restricted to an interval of noise levels
(Kynkäänniemi et al., arXiv 2404.07724); outside it the positive half is used alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.typing import Array, Float, PyTree, Shaped
from sana_jax.errors import UserError


def classifier_free_guidance(
    negative: Float[Array, "*X"], positive: Float[Array, "*X"], guidance_scale: float | Float[Array, ""]
) -> Float[Array, "*X"]:
    """negative + guidance_scale·(positive − negative).

    Args:
      negative: prediction for the negative (or empty) prompt.
      positive: prediction for the prompt.
      guidance_scale: 1 gives ``positive``; 0 gives ``negative``; SANA images use 4.5, videos 6.
    """
    return negative + guidance_scale * (positive - negative)


def interval_guidance(
    negative: Float[Array, "*X"],
    positive: Float[Array, "*X"],
    guidance_scale: float | Float[Array, ""],
    sigma: float | Float[Array, ""],
    interval: tuple[float, float] = (0.0, 1.0),
) -> Float[Array, "*X"]:
    """Classifier-free guidance while ``sigma`` lies in the interval, the positive prediction otherwise.

    Args:
      negative: prediction for the negative prompt.
      positive: prediction for the prompt.
      guidance_scale: scale inside the interval.
      sigma: the step's noise level in [0, 1]; may be traced.
      interval: (lowest, highest) level, both included.

    Raises:
      UserError: if the interval is not 0 <= lowest <= highest <= 1.
    """
    lowest, highest = interval
    if not 0.0 <= lowest <= highest <= 1.0:
        raise UserError(
            f"guidance interval {interval} is not 0 <= lowest <= highest <= 1; give noise levels, e.g. (0.0, 1.0)"
        )
    active = (sigma >= lowest) & (sigma <= highest)
    return jnp.where(active, classifier_free_guidance(negative, positive, guidance_scale), positive)


def join_negative_positive(negative: PyTree, positive: PyTree) -> PyTree:
    """Stacks two batches into one, [negative, positive] along the first axis: (B, ...) and (B, ...) to (2·B, ...).

    Works leaf by leaf on trees (embeddings with their masks). For latents, which both halves share, pass them twice.
    """
    return jax.tree.map(lambda first, second: jnp.concatenate([first, second], axis=0), negative, positive)


def split_negative_positive(joined: Shaped[Array, "B2 *X"]) -> tuple[Shaped[Array, "B *X"], Shaped[Array, "B *X"]]:
    """Takes a doubled batch apart: (2·B, ...) to (negative, positive), each (B, ...).

    Raises:
      UserError: if the batch is odd.
    """
    if joined.shape[0] % 2:
        raise UserError(
            f"a batch of {joined.shape[0]} cannot be halved into negative and positive; join both with "
            "join_negative_positive first"
        )
    half = joined.shape[0] // 2
    return joined[:half], joined[half:]
