"""Draw candidates, score them, keep the best: inference-time scaling (SANA-1.5, arXiv 2501.18427)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from sana_jax.errors import UserError
from sana_jax.pipelines.base import ImagePipeline

# (picture, prompt) -> a score, higher is better
ScoreFunction = Callable[[Any, str], float]


@dataclasses.dataclass(frozen=True)
class BestOf:
    """What ``best_of`` found.

    Attributes:
        images: the best pictures, the best one first.
        scores: theirs.
        seeds: the seeds that draw them again, each with ``num_images_per_prompt=1``.
        all_scores: of every candidate, in the order of their seeds.
    """

    images: list[Any]
    scores: list[float]
    seeds: list[int]
    all_scores: list[float]


def best_of(
    pipeline: ImagePipeline,
    prompt: str,
    score_fn: ScoreFunction,
    num_candidates: int,
    *,
    keep: int = 1,
    seed: int = 0,
    **arguments: Any,
) -> BestOf:
    """Draws ``num_candidates`` pictures of one prompt, one at a time, and keeps those that score highest.

    Candidate i is what ``pipeline(prompt, seed=seed + i)`` draws. Text is encoded and programs are compiled once.

    Args:
        pipeline: an image pipeline.
        prompt: one text.
        score_fn: (picture as ``output_type`` has it, prompt) -> a number, higher is better; for example a CLIP or VILA
            score.
        num_candidates: pictures to draw.
        keep: pictures to keep.
        seed: of the first candidate.
        arguments: all other arguments of the pipeline.

    Raises:
        UserError: numbers that are not allowed, more than one prompt, or a score that is not a number.
    """
    if not isinstance(prompt, str):
        raise UserError(f"best_of takes one prompt, not {type(prompt).__name__}; call it once for each")
    if num_candidates < 1 or not 1 <= keep <= num_candidates:
        raise UserError(
            f"num_candidates {num_candidates} and keep {keep}; allowed are 1 or more candidates, and from 1 to all of "
            "them kept"
        )
    if not 0 <= seed <= 2**32 - num_candidates:
        raise UserError(
            f"seed {seed} with {num_candidates} candidates is not allowed; the last one's must be below 2³²: choose "
            f"from 0 to {2**32 - num_candidates}"
        )
    if arguments.get("num_images_per_prompt", 1) != 1 or "latents" in arguments:
        raise UserError("num_images_per_prompt and latents would draw one candidate again; leave them out")
    kept: list[tuple[float, int, Any]] = []
    scores: list[float] = []
    for index in range(num_candidates):
        image = pipeline(prompt, seed=seed + index, **arguments).images[0]
        score = _number(score_fn(image, prompt), index)
        scores.append(score)
        # of equal scores the earlier one stays
        kept = sorted([*kept, (score, seed + index, image)], key=lambda entry: (-entry[0], entry[1]))[:keep]
    return BestOf(
        images=[image for _, _, image in kept],
        scores=[score for score, _, _ in kept],
        seeds=[candidate for _, candidate, _ in kept],
        all_scores=scores,
    )


def _number(score: Any, index: int) -> float:
    try:
        number = float(score)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise UserError(f"score_fn gave {score!r} for candidate {index}; allowed is a number: mend score_fn")
    return number
