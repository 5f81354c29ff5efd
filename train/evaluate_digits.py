"""Whether a model trained on the digits really writes them: ``python -m train.evaluate_digits --model runs/digits``.

Samples every caption, lets a support vector machine that was trained on the real digits read the samples, and
compares their spread with the real digits' and each one with the training pictures.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from kernels.typing import Float, Int
from sana_jax.command_line import parse
from sana_jax.compilation import enable_compilation_cache
from sana_jax.devices import choose_device
from sana_jax.errors import UserError, run_command_line
from sana_jax.files import atomic_file
from sana_jax.pipelines.text_to_image import SanaPipeline
from train.data.digits import DigitsData, load_images
from train.run_directory import read_config


@dataclass(frozen=True)
class EvaluateConfig:
    """Samples a digits model and measures what comes out."""

    model: str = "runs/digits"
    """The run's directory."""
    per_caption: int = 20
    """Samples of each caption; at least 2."""
    seed: int = 1
    """Seed of the noise."""
    guidance_scale: float | None = None
    """Guidance scale; None: the run's own."""
    steps: int | None = None
    """Sampling steps; None: the run's own."""
    weights: Literal["auto", "ema", "params"] = "auto"
    """Averaged weights where there are any (auto), or one of the two."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """What to run on."""
    json: str | None = None
    """Also write the figures to this file."""

    def __post_init__(self):
        if self.per_caption < 2:
            raise UserError(f"--per-caption {self.per_caption} is not allowed; a spread needs 2 or more")


@dataclass(frozen=True)
class Figures:
    """What was measured.

    Attributes:
        samples: how many pictures.
        recognised: share that the support vector machine reads as the digit asked for.
        recognised_by_digit: the same for each digit.
        real_held_out: share of held-out real digits that it reads rightly, when trained on the rest.
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
    """Compares samples with real digits; both have values 0 to 16, as scikit-learn's."""
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import SVC

    reader = SVC(gamma=0.001)
    held_out = cross_val_score(reader, real, labels, cv=5).mean()
    right = reader.fit(real, labels).predict(samples) == asked
    digits = np.unique(asked)
    spread = [_mean_distance(samples[asked == d]) / _mean_distance(real[labels == d]) for d in digits]
    to_training = _distances(samples, real).min(1)
    among_real = _distances(real, real) + np.diag(np.full(len(real), np.inf))
    training = {row.tobytes() for row in np.round(real).astype(np.int8)}
    copies = sum(row.tobytes() in training for row in np.round(samples).astype(np.int8))
    return Figures(
        samples=len(samples),
        recognised=float(right.mean()),
        recognised_by_digit={int(d): float(right[asked == d].mean()) for d in digits},
        real_held_out=float(held_out),
        spread=float(np.mean(spread)),
        least_spread=float(np.min(spread)),
        nearest=float(to_training.min() / among_real.min(1).mean()),
        copies=int(copies),
    )


def evaluate(config: EvaluateConfig) -> Figures:
    """Samples the model and measures.

    Raises:
        FileNotFoundError, UserError: it is not a run on the digits, or has no checkpoint.
    """
    dataset = DigitsData(read_config(Path(config.model)).data)
    digits = sorted(set(dataset.config.digits))
    pipeline = SanaPipeline.from_pretrained(config.model, weights=config.weights)
    images = pipeline(
        dataset.captions,
        num_images_per_prompt=config.per_caption,
        seed=config.seed,
        guidance_scale=config.guidance_scale,
        num_inference_steps=config.steps,
        output_type="np",
    ).images
    real, labels = load_images(tuple(digits))
    samples = np.asarray(images, np.float64).reshape(len(images), -1) * 16
    real = (real.astype(np.float64).reshape(len(real), -1) + 1) * 8
    return measure(samples, np.repeat(digits, config.per_caption), real, labels)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    config = parse(EvaluateConfig, sys.argv[1:] if argv is None else argv, prog="python -m train.evaluate_digits")
    choose_device(config.device)
    enable_compilation_cache()
    figures = evaluate(config)
    print(f"samples                            {figures.samples}")
    print(f"recognised as the digit asked for  {figures.recognised:.1%}")
    by_digit = " ".join(f"{digit}:{share:.0%}" for digit, share in figures.recognised_by_digit.items())
    print(f"  by digit                         {by_digit}")
    print(f"real digits recognised (held out)  {figures.real_held_out:.1%}")
    print(f"spread within a caption / real     {figures.spread:.2f} (least: {figures.least_spread:.2f})")
    print(f"nearest training picture / real    {figures.nearest:.2f}")
    print(f"copies of training pictures        {figures.copies}")
    if config.json:
        with atomic_file(config.json) as file:
            file.write((json.dumps(dataclasses.asdict(figures), indent=2) + "\n").encode())


def _distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    squared = (one**2).sum(1)[:, None] + (other**2).sum(1)[None] - 2 * one @ other.T
    return np.sqrt(np.maximum(squared, 0))


def _mean_distance(rows: np.ndarray) -> float:
    return _distances(rows, rows).sum() / (len(rows) * (len(rows) - 1))


if __name__ == "__main__":
    run_command_line(main)
