"""DreamBooth's data: a subject's pictures, and pictures of its class beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from kernels.typing import Float, Int
from sana_jax.images import save_png
from train.batch import Batch
from train.data.cached import CachedData, Shape
from train.data.sources.listing import PICTURE_SUFFIXES

LOSS_WEIGHT = "loss_weight"


class WithPrior:
    """Two data sets as one, with equal chances for a picture of the subject and one of its class.

    Everything but the samples is the subject's. A sample has its weight in the loss as the condition ``loss_weight``:
    1 for the subject, ``weight`` for its class.
    """

    def __init__(self, subject: CachedData, prior: CachedData, weight: float):
        self.subject, self.prior, self.weight = subject, prior, weight
        self.buckets = self._buckets()

    def _buckets(self) -> dict[Shape, Int[np.ndarray, " n"]]:
        """Both sets' samples by shape; of each shape the smaller part is repeated to the size of the larger one."""
        buckets = {}
        for shape in sorted({*self.subject.buckets, *self.prior.buckets}):
            own = np.asarray(self.subject.buckets.get(shape, ()), np.int64)
            others = np.asarray(self.prior.buckets.get(shape, ()), np.int64) + len(self.subject)
            most = max(len(own), len(others))
            buckets[shape] = np.concatenate([np.resize(part, most) for part in (own, others) if len(part)])
        return buckets

    def __len__(self) -> int:
        return len(self.subject) + len(self.prior)

    def __getattr__(self, name: str):
        # captions, encodings, validation and previews are those of the subject
        return getattr(self.subject, name)

    def batch(self, indices: Int[np.ndarray, " B"], choices: Float[np.ndarray, "B 2"] | None = None) -> Batch:
        """As ``CachedData.batch``, with the samples' weights."""
        indices = np.asarray(indices)
        choices = np.zeros((len(indices), 2)) if choices is None else np.asarray(choices)
        of_prior = indices >= len(self.subject)
        parts = [
            (np.flatnonzero(~of_prior), self.subject, 0, 1.0),
            (np.flatnonzero(of_prior), self.prior, len(self.subject), self.weight),
        ]
        batches = [
            (rows, source.batch(indices[rows] - first, choices[rows]), weight)
            for rows, source, first, weight in parts
            if len(rows)
        ]
        joined = []
        for field in ("latents", "prompt_embeds", "prompt_attention_mask"):
            first = getattr(batches[0][1], field)
            array = np.empty((len(indices), *first.shape[1:]), first.dtype)
            for rows, batch, _ in batches:
                array[rows] = getattr(batch, field)
            joined.append(array)
        weights = np.empty(len(indices), np.float32)
        for rows, _, weight in batches:
            weights[rows] = weight
        return Batch(*joined, {LOSS_WEIGHT: weights})

    def describe(self) -> str:
        """One line for the start of a run."""
        return f"{self.subject.describe()}; of the class {len(self.prior):,} pictures, of weight {self.weight:g}"


def draw_prior_pictures(
    folder: Path,
    caption: str,
    count: int,
    draw: Callable[[str, int], object],
    say: Callable[[str], None],
) -> int:
    """Fills a folder of pictures of a class up to ``count``; each picture appears whole or not at all.

    Args:
        folder: may be missing; pictures that are there count, whatever they are called.
        caption: of the class.
        count: how many there should be.
        draw: a PIL picture of a caption and a seed.
        say: prints a line.

    Returns:
        How many were drawn.
    """
    there = sum(path.suffix.lower() in PICTURE_SUFFIXES for path in folder.rglob("*")) if folder.is_dir() else 0
    if there >= count:
        return 0
    say(f"prior: {there} pictures of {caption!r} in {folder}; the base model draws {count - there} more")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = seed = 0
    while there + drawn < count:
        path = folder / f"drawn_{seed:05d}.png"
        if not path.exists():
            save_png(path, draw(caption, seed), metadata={"prompt": caption, "seed": seed})
            drawn += 1
            if drawn % 10 == 0:
                say(f"prior: {drawn} drawn, {count - there - drawn} to go")
        seed += 1
    return drawn
