"""Whether drawn digits are read as the digits asked for, how much they differ, and whether they are copies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernels.typing import Float, Int
from train.data.digits import NAMES, load_images
from train.evaluation.similarity import count_copies, mean_distance, nearest, nearest_other


@dataclass(frozen=True)
class Figures:
    """What was measured.

    Attributes:
        samples: how many pictures.
        recognised: share that the support vector machine, which knows all ten digits, reads as the digit asked for.
        recognised_by_digit: the same for each digit.
        real_held_out: share of held-out real digits, of all ten, that it reads rightly, when trained on the rest.
        spread: mean distance of two samples of one caption over that of two real digits, averaged over captions.
        least_spread: the same for the caption where it is smallest: one collapsed digit shows here.
        nearest: smallest distance of a sample to a training picture, over the mean such distance among real digits.
        copies: samples that equal a training picture once they are brought to its 17 gray levels.
    """

    samples: int
    recognised: float
    recognised_by_digit: dict[int, float]
    real_held_out: float
    spread: float
    least_spread: float
    nearest: float
    copies: int


def measure(
    samples: Float[np.ndarray, "S 64"],
    asked: Int[np.ndarray, " S"],
    real: Float[np.ndarray, "R 64"],
    labels: Int[np.ndarray, " R"],
) -> Figures:
    """Compares samples with real digits of those that the run was trained on; both have values 0 to 16, as
    scikit-learn's."""
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import SVC

    # all ten, also of a run on some of them: who knows only these reads anything as one of them
    images, shown = load_images(tuple(range(len(NAMES))))
    images = (images.astype(np.float64).reshape(len(images), -1) + 1) * 8
    reader = SVC(gamma=0.001)
    held_out = cross_val_score(reader, images, shown, cv=5).mean()
    right = reader.fit(images, shown).predict(samples) == asked
    digits = np.unique(asked)
    spread = [mean_distance(samples[asked == d]) / mean_distance(real[labels == d]) for d in digits]
    return Figures(
        samples=len(samples),
        recognised=float(right.mean()),
        recognised_by_digit={int(d): float(right[asked == d].mean()) for d in digits},
        real_held_out=float(held_out),
        spread=float(np.mean(spread)),
        least_spread=float(np.min(spread)),
        nearest=float(nearest(samples, real).value.min() / nearest_other(real).mean()),
        copies=count_copies(samples, real),
    )


def describe(figures: Figures) -> list[str]:
    """One line for each figure."""
    by_digit = " ".join(f"{digit}:{share:.0%}" for digit, share in figures.recognised_by_digit.items())
    return [
        f"samples                            {figures.samples}",
        f"recognised as the digit asked for  {figures.recognised:.1%}",
        f"  by digit                         {by_digit}",
        f"real digits recognised (held out)  {figures.real_held_out:.1%}",
        f"spread within a caption / real     {figures.spread:.2f} (least: {figures.least_spread:.2f})",
        f"nearest training picture / real    {figures.nearest:.2f}",
        f"copies of training pictures        {figures.copies}",
    ]
