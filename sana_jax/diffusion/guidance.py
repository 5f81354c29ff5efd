"""Classifier-free guidance and its adaptive projected form.

The network is evaluated once on a batch [negative, positive] and its two halves are combined
(Ho and Salimans, arXiv 2207.12598). Guidance may be restricted to an interval of noise levels
(Kynkäänniemi et al., arXiv 2404.07724); outside it the positive half is used alone. Adaptive projected guidance (Sadat
et al., arXiv 2410.02416) tames high scales: it bounds the difference of the halves and weakens the part of it that lies
along the prediction, which is what oversaturates.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp

from kernels.typing import Array, Float
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


@dataclasses.dataclass(frozen=True)
class ProjectedGuidance:
    """Settings of adaptive projected guidance, which acts on predictions of the clean sample.

    Attributes:
      eta: how much of the difference along the prediction is kept; 1 keeps all of it, 0 is the paper's choice.
      norm_threshold: largest norm of the difference; longer ones are shortened to it; 0 is no bound.
      momentum: how much of the differences of earlier guided steps is added; negative turns away from them (the paper:
        -0.5).
      rescale: how far the result's standard deviation is brought back to that of the positive prediction, 0 to 1.
      over: what norms and projections are taken over, channels among it: each ``frame``, the whole ``clip``, or each
        point through ``time``; for pictures all three are the picture.
    """

    eta: float = 0.0
    norm_threshold: float = 0.0
    momentum: float = 0.0
    rescale: float = 0.0
    over: Literal["frame", "clip", "time"] = "frame"

    def __post_init__(self) -> None:
        allowed = {
            "eta": math.isfinite(self.eta),
            "norm_threshold": math.isfinite(self.norm_threshold) and self.norm_threshold >= 0,
            "momentum": -1 < self.momentum < 1,
            "rescale": 0 <= self.rescale <= 1,
            "over": self.over in ("frame", "clip", "time"),
        }
        if wrong := [name for name, good in allowed.items() if not good]:
            shown = ", ".join(f"{name} {getattr(self, name)!r}" for name in wrong)
            raise UserError(
                f"projected guidance: {shown} is not allowed; choose a finite eta, norm_threshold from 0, momentum "
                "between -1 and 1, rescale from 0 to 1, over frame, clip or time"
            )


def projected_guidance(
    negative: Float[Array, "B *X C"],
    positive: Float[Array, "B *X C"],
    guidance_scale: float | Float[Array, ""],
    settings: ProjectedGuidance,
    running: Float[Array, "B *X C"] | None = None,
) -> tuple[Float[Array, "B *X C"], Float[Array, "B *X C"]]:
    """positive + (guidance_scale − 1)·(across + eta·along), of the bounded difference's parts to the positive.

    Args:
      negative: clean samples predicted for the negative prompt, channels-last, float32.
      positive: those predicted for the prompt.
      guidance_scale: 1 gives ``positive``.
      settings: see ``ProjectedGuidance``.
      running: the sum of differences that the last step returned; None before the first.

    Returns:
      The guided prediction, and the sum of differences for the next step.
    """
    difference = positive - negative
    if running is not None:
        difference = difference + settings.momentum * running
    running = difference
    every = tuple(range(1, positive.ndim))
    is_video = positive.ndim == 5
    axes = {"frame": every[1:] if is_video else every, "clip": every, "time": (1, 4) if is_video else every}
    axes = axes[settings.over]
    if settings.norm_threshold > 0:
        norm = jnp.sqrt(jnp.sum(jnp.square(difference), axes, keepdims=True))
        difference = difference * jnp.minimum(1.0, settings.norm_threshold / norm)
    length = jnp.sqrt(jnp.sum(jnp.square(positive), axes, keepdims=True))
    direction = positive / jnp.maximum(length, 1e-12)
    along = jnp.sum(difference * direction, axes, keepdims=True) * direction
    guided = positive + (guidance_scale - 1.0) * (difference - along + settings.eta * along)
    if settings.rescale > 0:
        ratio = jnp.std(positive, every, keepdims=True) / jnp.std(guided, every, keepdims=True)
        guided = settings.rescale * ratio * guided + (1.0 - settings.rescale) * guided
    return guided, running
