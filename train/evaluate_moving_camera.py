"""Whether a world model really follows the camera: ``python -m train.evaluate_moving_camera --model RUN_DIR``.

Samples clips of action strings that no training clip has, and of the opposite keys, from given first frames; recovers
the camera's motion from their pixels; and compares it with what was asked for, with what was asked for in other clips,
and with what the measurement finds in the true videos.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs.moving_camera import MovingCameraDataConfig
from kernels.typing import Float
from sana_jax.command_line import parse
from sana_jax.errors import UserError, run_command_line
from sana_jax.pipelines.world_model import SanaWMPipeline
from train.data.video.moving_camera import MovingCameraData, View
from train.evaluation.moving_camera import CameraFigures, describe, measure
from train.evaluation.sampled_run import SampledRunConfig, report
from train.run_directory import read_config

_SHOWN = 8  # clips of the picture
_GAP = 2  # pixels between them
_ENLARGED = 6


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SampledRunConfig):
    """Samples a model that was trained on moving_camera and measures what comes out."""

    model: str = "runs/moving_camera"
    """The run's directory."""
    pairs: int = 24
    """Held-out action strings; each is sampled as it is and with opposite keys."""
    seed: int = 1
    """Seed of the noise, and of what is chosen."""
    picture: str | None = None
    """Also draw some of the clips, the true one above each, to this .png."""

    def __post_init__(self):
        if self.pairs < 2:
            raise UserError(f"--pairs {self.pairs} is not allowed; choose 2 or more, so that clips can be exchanged")
        if self.picture is not None and not self.picture.lower().endswith(".png"):
            raise UserError(f"--picture {self.picture} is not allowed; its name ends in .png")


class Asked(NamedTuple):
    """What clips are made of; 2k and 2k + 1 have the same view and opposite keys.

    Attributes:
        actions: action strings.
        views: what the first camera sees.
        poses: camera-to-world matrices.
        videos: the true clips, in [-1, 1].
    """

    actions: tuple[str, ...]
    views: tuple[View, ...]
    poses: Float[np.ndarray, "N F 4 4"]
    videos: Float[np.ndarray, "N F H W 3"]


def evaluate(config: EvaluateConfig) -> CameraFigures:
    """Samples the model and measures.

    Raises:
        FileNotFoundError, UserError: it is not a run on moving_camera, has no checkpoint, or has fewer held-out paths.
    """
    data = held_out(config.model)
    asked = choose(data, config.pairs, config.seed)
    pipeline = SanaWMPipeline.from_pretrained(config.model, weights=config.weights)
    clips = np.stack([_sample(pipeline, data, asked, number, config) for number in range(len(asked.actions))])
    if config.picture is not None:
        _draw(config.picture, asked.videos, clips)
    speeds = (np.deg2rad(data.config.rotation_speed), data.config.translation_speed)
    return measure(clips, asked.videos, asked.poses, data.intrinsics, speeds)


def held_out(model: str) -> MovingCameraData:
    """The clips that a run was not trained on.

    Raises:
        FileNotFoundError, UserError: it is not a run on moving_camera.
    """
    run = read_config(Path(model))
    if not isinstance(run.data, MovingCameraDataConfig):
        raise UserError(f"--model {model} was not trained on moving_camera; name a run that was")
    return MovingCameraData(run.data, "held_out")


def choose(data: MovingCameraData, pairs: int, seed: int) -> Asked:
    """Held-out action strings, each followed by that of the opposite keys, and what their cameras see.

    Raises:
        UserError: there are fewer.
    """
    known = len(data) // 2
    if pairs > known:
        raise UserError(f"--pairs {pairs} is not allowed; the run keeps {known} pairs of action strings from training")
    draw = np.random.default_rng((seed, data.config.seed))
    chosen = [2 * pair + opposite for pair in draw.permutation(known)[:pairs] for opposite in (0, 1)]
    views = [data.view(index - index % 2, place) for index, place in zip(chosen, np.repeat(draw.random(pairs), 2))]
    actions = tuple(data.actions[index] for index in chosen)
    poses = [data.poses(action) for action in actions]
    videos = np.stack([data.render(view, path) for view, path in zip(views, poses)])
    return Asked(actions, tuple(views), np.stack(poses).astype(np.float64), videos)


def _sample(
    pipeline: SanaWMPipeline, data: MovingCameraData, asked: Asked, number: int, config: EvaluateConfig
) -> Float[np.ndarray, "F H W 3"]:
    """One clip in [-1, 1]; two of opposite keys have the same noise."""
    first = np.clip(asked.videos[number, 0] / 2 + 0.5, 0, 1)
    made = pipeline(
        first,
        data.config.caption,
        action=asked.actions[number],
        action_scheme=data.scheme,
        intrinsics=data.intrinsics,
        height=data.config.canvas,
        width=data.config.canvas,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
        seed=config.seed + number // 2,
        output_type="np",
    )
    return 2 * np.asarray(made.frames)[0] - 1


def _draw(path: str, true: Float[np.ndarray, "N F H W 3"], clips: Float[np.ndarray, "N F H W 3"]) -> None:
    """Frames side by side; each clip under the true one."""
    from sana_jax.images import save_png

    rows = []
    for pair in zip(true[:_SHOWN], clips[:_SHOWN]):
        lines = [np.concatenate([np.pad(f, ((0, 1), (0, 1), (0, 0))) for f in clip / 2 + 0.5], 1) for clip in pair]
        rows.append(np.pad(np.concatenate(lines), ((0, _GAP), (0, 0), (0, 0)), constant_values=1.0))
    picture = np.clip(np.concatenate(rows), 0, 1)
    save_png(path, picture, enlarge=_ENLARGED)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    words = sys.argv[1:] if argv is None else argv
    config = parse(EvaluateConfig, words, prog="python -m train.evaluate_moving_camera")
    report(config, evaluate, describe)


if __name__ == "__main__":
    run_command_line(main)
