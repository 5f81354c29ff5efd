"""Whether a video model really moves the digits: ``python -m train.evaluate_moving_digits --model runs/moving_digits``.

Samples every caption, reads the digit in each frame and the direction of each clip, and compares them with what the
caption asks for. ``--from-images`` begins each clip with a picture of a held-out digit, and measures how well the clip
keeps it; ``--frames`` samples longer clips than the model was trained on.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.data import MovingDigitsDataConfig
from kernels.typing import Float
from sana_jax.command_line import parse
from sana_jax.errors import UserError, run_command_line
from sana_jax.images import to_pil
from sana_jax.pipelines.image_to_video import SanaImageToVideoPipeline
from sana_jax.pipelines.long_video import LongSanaVideoPipeline
from sana_jax.pipelines.model_directory import pipeline_of
from sana_jax.pipelines.text_to_video import SanaVideoPipeline
from train.data.video.moving_digits import MovingDigitsData
from train.evaluation.moving_digits import ClipFigures, describe, measure
from train.evaluation.sampled_run import SampledRunConfig, report
from train.run_directory import CONFIG_NAME, read_config


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SampledRunConfig):
    """Samples a model of moving digits and measures what comes out."""

    model: str = "runs/moving_digits"
    """The run's directory."""
    per_caption: int = 4
    """Clips of each caption."""
    from_images: bool = False
    """Begin each clip with a picture of a digit that no training clip has."""
    frames: int | None = None
    """Frames of each clip; None: as it was trained."""

    def __post_init__(self):
        if self.per_caption < 1:
            raise UserError(f"--per-caption {self.per_caption} is not allowed; choose 1 or more")


@dataclass(frozen=True)
class Figures(ClipFigures):
    """What was measured.

    Attributes:
        first_frame: the greatest difference of a pixel of a clip's first frame from the picture that it was given, of
            0 (black) to 1 (white); None where none was given.
    """

    first_frame: float | None = None


def evaluate(config: EvaluateConfig) -> Figures:
    """Samples the model and measures.

    Raises:
        FileNotFoundError, UserError: it is not a run on moving digits, or has no checkpoint.
    """
    dataset = MovingDigitsData(_data_of(config.model))
    captions = [caption for caption in dataset.captions for _ in range(config.per_caption)]
    options = {
        "seed": config.seed,
        "guidance_scale": config.guidance_scale,
        "num_inference_steps": config.steps,
        "frames": config.frames,
        "output_type": "np",
    }
    first = None
    if config.from_images:
        images = first_frames(dataset, captions)
        pipeline = SanaImageToVideoPipeline.from_pretrained(config.model, weights=config.weights)
        clips = pipeline([to_pil(image).convert("RGB") for image in images], captions, **options).frames
        first = float(np.abs(clips[:, 0] - images).max())
    elif pipeline_of(config.model) == "LongSanaVideoPipeline":
        pipeline = LongSanaVideoPipeline.from_pretrained(config.model, weights=config.weights)
        clips = np.concatenate([_block_after_block(pipeline, text, options, row) for row, text in enumerate(captions)])
    else:
        clips = SanaVideoPipeline.from_pretrained(config.model, weights=config.weights)(captions, **options).frames
    digits, directions = zip(*map(dataset.meaning_of, captions))
    measured = measure(2 * np.asarray(clips) - 1, np.asarray(digits), directions, dataset.directions)
    return Figures(**dataclasses.asdict(measured), first_frame=first)


def _data_of(model: str) -> MovingDigitsDataConfig:
    """The clips that a run, or the model that it started from, was trained on."""
    run = read_config(Path(model))
    if isinstance(run.data, MovingDigitsDataConfig):
        return run.data
    if run.model is None or not (Path(run.model) / CONFIG_NAME).is_file():
        raise UserError(f"--model {model} was not trained on moving digits; name a run that was")
    return _data_of(run.model)


def _block_after_block(pipeline: LongSanaVideoPipeline, caption: str, options: dict, row: int) -> np.ndarray:
    """One clip (1, F, H, W, 1) of a model that makes one at a time; each has noise of its own."""
    own = {**options, "seed": options["seed"] + row, "say": lambda line: None}
    if own["frames"] is None:
        own["frames"] = pipeline.defaults.frames
    return np.asarray(pipeline(caption, **own).frames)


def first_frames(dataset: MovingDigitsData, captions: Sequence[str]) -> Float[np.ndarray, "N H W 1"]:
    """For every caption the first frame of another clip of it, in [0, 1], of held-out digits where there are any.

    Raises:
        UserError: so few are held out that a caption has none.
    """
    source = dataset.validation or dataset
    by_caption: dict[str, list[int]] = {}
    for index in range(len(source)):
        by_caption.setdefault(source.caption_of(index), []).append(index)
    if missing := [caption for caption in captions if caption not in by_caption]:
        raise UserError(
            f"--from-images needs a picture for {missing[0]!r}, and of the {dataset.config.held_out:.1%} that the run "
            "keeps from training none is of that digit; leave it out, or train with a larger --data.held-out"
        )
    chosen, used = [], dict.fromkeys(by_caption, 0)
    for caption in captions:
        own = by_caption[caption]
        chosen.append(own[used[caption] % len(own)])
        used[caption] += 1
    return source.videos(chosen)[:, 0] / 2 + 0.5


def _described(figures: Figures) -> Iterator[str]:
    yield from describe(figures)
    if figures.first_frame is not None:
        yield f"first frame, greatest difference   {figures.first_frame:.4f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    words = sys.argv[1:] if argv is None else argv
    config = parse(EvaluateConfig, words, prog="python -m train.evaluate_moving_digits")
    report(config, evaluate, _described)


if __name__ == "__main__":
    run_command_line(main)
