"""Whether a model trained on the digits really writes them: ``python -m train.evaluate_digits --model runs/digits``.

Samples every caption, lets a support vector machine that was trained on the real digits read the samples, and
compares their spread with the real digits' and each one with the training pictures. The same as one record beside other
metrics: ``python -m train.evaluate digits --model runs/digits``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.schema import DigitsDataConfig
from sana_jax.command_line import parse
from sana_jax.errors import UserError, run_command_line
from sana_jax.pipelines.text_to_image import SanaPipeline
from train.data.digits import DigitsData, load_images
from train.evaluation.digits import Figures, describe, measure
from train.evaluation.sampled_run import SampledRunConfig, report
from train.run_directory import read_config


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SampledRunConfig):
    """Samples a digits model and measures what comes out."""

    model: str = "runs/digits"
    """The run's directory."""
    per_caption: int = 20
    """Samples of each caption; at least 2."""

    def __post_init__(self):
        if self.per_caption < 2:
            raise UserError(f"--per-caption {self.per_caption} is not allowed; a spread needs 2 or more")


def evaluate(config: EvaluateConfig) -> Figures:
    """Samples the model and measures.

    Raises:
        FileNotFoundError, UserError: it is not a run on the digits, or has no checkpoint.
    """
    trained_on = read_config(Path(config.model)).data
    if not isinstance(trained_on, DigitsDataConfig):
        raise UserError(f"--model {config.model} was not trained on the digits; name a run that was")
    dataset = DigitsData(trained_on)
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
    report(config, evaluate, describe)


if __name__ == "__main__":
    run_command_line(main)
