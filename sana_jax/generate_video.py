"""What the command line does for videos only: their options, names of files, and writing."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sana_jax.errors import UserError
from sana_jax.images import automatic_enlargement
from sana_jax.videos import as_bytes, check_fps, check_video_path, video_kind, write_video

if TYPE_CHECKING:
    from sana_jax.generate import GenerateConfig
    from sana_jax.pipelines.base import SamplingPipeline
    from sana_jax.pipelines.video_base import SanaVideoPipelineOutput

# options that are for videos alone, beside those that are arguments of a pipeline
_APG = ("apg_eta", "apg_norm_threshold", "apg_momentum")
VIDEO_OPTIONS = ("seconds", "fps", *_APG)


def check_output_name(name: str) -> None:
    """Raises ``UserError`` for a name that neither a picture nor a video can have."""
    if pathlib.Path(name).suffix.lower() == ".png":
        return
    try:
        video_kind(name)
    except UserError as error:
        stem = pathlib.Path(name).with_suffix("")
        raise UserError(
            f"output {name!r} is not allowed; a picture's name ends in .png, a video's in .mp4, .gif or .npz, or it is "
            f"a folder for frames (out/): try {stem}.png or {stem}.mp4"
        ) from error


def check_video_output(config: GenerateConfig, *, grows: bool = False) -> None:
    """Checks what a video is to be written as, before anything is computed.

    ``grows``: whether it is a long one, which is written block by block.

    Raises:
        UserError: a name that a video cannot have, a place that cannot be written to, or frames per second that are not
            allowed.
    """
    if config.fps is not None:
        check_fps(config.fps)
    if config.sweep is not None:
        return  # which no video model has
    if pathlib.Path(config.output).suffix.lower() == ".png":
        raise UserError(
            f"output {config.output!r} is a picture's name, and {config.model} makes videos; allowed are .mp4, .gif, "
            f".npz, and a folder for frames (out/): try {pathlib.Path(config.output).with_suffix('.mp4')}"
        )
    if grows and config.num_images != 1:
        raise UserError(
            f"--num-videos {config.num_images}: {config.model} makes one long video at a time; allowed is 1: call once "
            "for each, with a --seed and an --output of its own"
        )
    for path in [config.output] if grows else output_paths(config):
        check_video_path(path, progressive=grows, goes_on=grows and config.resume)


def output_paths(config: GenerateConfig) -> list[str]:
    """The name of every video: the given one, or numbered ones, out-0.mp4, out-1.mp4, ..., where there are several."""
    count = len(config.prompt) * config.num_images
    if count == 1:
        return [config.output]
    if video_kind(config.output) == "frames":
        return [os.path.join(config.output, f"{index}") for index in range(count)]
    path = pathlib.Path(config.output)
    return [str(path.with_name(f"{path.stem}-{index}{path.suffix}")) for index in range(count)]


def video_arguments(config: GenerateConfig, pipeline: SamplingPipeline) -> dict[str, Any]:
    """Arguments of a call that are made of several options.

    Raises:
        UserError: options that exclude one another, or values that are not allowed.
    """
    from sana_jax.pipelines.video_base import frames_of_seconds

    arguments: dict[str, Any] = {}
    known = pipeline.argument_names()
    if config.seconds is not None:
        if config.frames is not None:
            raise UserError("--seconds and --frames: only one is allowed; leave one of them out")
        fps = pipeline.fps if config.fps is None else config.fps
        frames = frames_of_seconds(config.seconds, fps, pipeline.autoencoder.temporal_factor)
        arguments["num_frames" if "num_frames" in known else "frames"] = frames
    if config.fps is not None and "fps" in known:
        arguments["fps"] = config.fps
    if (settings := projected_guidance_of(config)) is not None:
        if "projected_guidance" not in known:
            raise UserError(
                f"--apg-eta, --apg-norm-threshold and --apg-momentum would not be used by {type(pipeline).__name__}; "
                "leave them out"
            )
        arguments["projected_guidance"] = settings
    return arguments


def long_video_arguments(
    config: GenerateConfig, settings: Mapping[str, Any], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a call that writes the video itself, while it is made."""
    factor = config.enlarge or automatic_enlargement(settings["height"], settings["width"])
    if factor > 1:
        print(f"every frame enlarged {factor} times" + ("" if config.enlarge else " (--enlarge 1 keeps the pixels)"))
    if config.refiner is not None:
        metadata = {**metadata, "frames": settings["frames"] - 1}  # it leaves the first out, which anchors it
    return {"output_path": config.output, "enlarge": factor, "metadata": metadata}


@contextlib.contextmanager
def next_step_when_interrupted(config: GenerateConfig, *, grows: bool) -> Iterator[None]:
    """Ctrl-C is followed by what to do next, where an interrupted video can be gone on with."""
    try:
        yield
    except KeyboardInterrupt:
        if grows and os.path.isdir(f"{config.output.rstrip(os.sep)}.resume"):
            resume = "" if config.resume else ", and --resume"
            raise KeyboardInterrupt(f"go on behind the last whole block with the same command{resume}") from None
        if config.refiner_checkpoint is not None:
            raise KeyboardInterrupt("the same command goes on behind the refiner's last whole block") from None
        raise


def projected_guidance_of(config: GenerateConfig) -> Any:
    """The settings of adaptive projected guidance that the options give; None without any."""
    from sana_jax.diffusion.guidance import ProjectedGuidance

    given = {name.removeprefix("apg_"): getattr(config, name) for name in _APG if getattr(config, name) is not None}
    return ProjectedGuidance(**given) if given else None


def video_settings(config: GenerateConfig, pipeline: SamplingPipeline, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a video's notes say beside what a picture's do.

    Raises:
        UserError: a number of frames that the model does not make.
    """
    from sana_jax.autoencoders.base import latent_frames
    from sana_jax.pipelines.video_base import DEFAULT_FRAMES

    if (frames := arguments.get("frames")) is None:
        frames = DEFAULT_FRAMES if pipeline.defaults.frames is None else pipeline.defaults.frames
    latent_frames(frames, pipeline.autoencoder.temporal_factor)
    return {
        "frames": frames,
        "fps": pipeline.fps if config.fps is None else config.fps,
        "motion_score": config.motion_score,
        "projected_guidance": arguments.get("projected_guidance"),
    }


def write_videos(config: GenerateConfig, result: SanaVideoPipelineOutput, metadata: Mapping[str, Any]) -> pathlib.Path:
    """Writes every video and says where; returns where the first one is."""
    paths = output_paths(config)
    fps = result.fps if config.fps is None else config.fps
    for index, (path, video) in enumerate(zip(paths, result.frames, strict=True)):
        frames = as_bytes(video)
        height, width = frames.shape[1:3]
        # an array is for computing, not for looking at
        factor = config.enlarge or (1 if video_kind(path) == "npz" else automatic_enlargement(height, width))
        enlarged = np.repeat(np.repeat(frames, factor, axis=1), factor, axis=2) if factor > 1 else frames
        prompt = config.prompt[index // config.num_images]
        number = index if len(paths) > 1 else None  # which its noise depends on, beside the seed
        write_video(path, enlarged, fps, metadata={**metadata, "prompt": prompt, "number": number})
        shown = ""
        if factor > 1:
            shown = f", every frame enlarged {factor} times from {height}x{width} to {factor * height}x{factor * width}"
            shown += "" if config.enlarge else " (--enlarge 1 keeps the pixels)"
        label = f" of {prompt!r}" if len(config.prompt) > 1 else ""
        print(f"video: {path}{label}, {len(frames)} frames, {len(frames) / fps:.2f} seconds{shown}")
    return pathlib.Path(paths[0])
