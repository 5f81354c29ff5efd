"""Draws pictures from the command line.

``python -m sana_jax.generate --model runs/digits --prompt "a handwritten seven" --output seven.png``
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax

from sana_jax.command_line import parse
from sana_jax.compilation import enable_compilation_cache
from sana_jax.devices import choose_device
from sana_jax.errors import UserError, run_command_line
from sana_jax.images import automatic_enlargement, check_png_path, enlarge_image, image_grid, save_png

if TYPE_CHECKING:
    from sana_jax.pipelines.text_to_image import SanaPipeline, SanaPipelineOutput

_PROG = "python -m sana_jax.generate"
_ALIASES = {"out": "output", "num-inference-steps": "steps"}


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Draws pictures from texts with a model that is on this machine."""

    model: str
    """Model directory; a training run is one, for example runs/digits."""
    prompt: tuple[str, ...]
    """What to draw, in quotes; several texts draw several pictures."""
    output: str
    """The picture's name, ending in .png; several pictures become one sheet. --out is the same option."""
    negative_prompt: str = ""
    """What the pictures should not be; needs guidance above 1."""
    num_images: int = 1
    """Pictures per prompt."""
    seed: int = 0
    """Picture i starts from noise that depends on this number and i alone."""
    steps: int | None = None
    """Sampling steps; None: the model's own number. --num-inference-steps is the same option."""
    guidance_scale: float | None = None
    """How closely pictures follow the text; 1 is off and costs half; None: the model's own."""
    guidance_interval: tuple[float, float] | None = None
    """Lowest and highest noise level, 0 to 1, at which guidance acts; None: everywhere."""
    height: int | None = None
    """Pixels; None: the model's own."""
    width: int | None = None
    """Pixels; None: the model's own."""
    weights: Literal["auto", "ema", "params"] = "auto"
    """Weights of a training run: averaged (ema), raw (params), or averaged where there are any (auto)."""
    checkpoint_step: int | None = None
    """Checkpoint of a training run by its step; None: the newest."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and computation."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to compute; auto takes a GPU if JAX sees one."""
    enlarge: int = 0
    """Whole number by which every pixel is enlarged; 0: so much that the shorter side reaches 128 pixels."""

    def __post_init__(self) -> None:
        check_png_path(self.output)
        if not self.prompt:
            raise UserError('--prompt has no text; allowed is one or more: write --prompt "a handwritten seven"')
        if self.num_images < 1:
            raise UserError(f"--num-images {self.num_images} is not allowed; choose 1 or more")
        if self.enlarge < 0:
            raise UserError(f"--enlarge {self.enlarge} is not allowed; choose 1 or more, or 0 for automatic")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (by default the program's own) and returns its exit status.

    Raises:
        UserError: a mistake in the options, the model or the values; ``run_command_line`` prints it as one line.
    """
    config = parse(GenerateConfig, sys.argv[1:] if argv is None else argv, prog=_PROG, aliases=_ALIASES)
    device = choose_device(config.device)
    enable_compilation_cache()
    with jax.default_device(device):
        generate(config)
    return 0


def generate(config: GenerateConfig) -> pathlib.Path:
    """Draws what ``config`` asks for, says what it does, and returns where the picture is."""
    from sana_jax.pipelines.text_to_image import SanaPipeline

    pipeline = SanaPipeline.from_pretrained(
        config.model, dtype=config.dtype, weights=config.weights, checkpoint_step=config.checkpoint_step
    )
    settings = _settings(config, pipeline)
    _announce(config, pipeline, settings)
    result = pipeline(
        list(config.prompt),
        negative_prompt=config.negative_prompt,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
        height=config.height,
        width=config.width,
        num_images_per_prompt=config.num_images,
        seed=config.seed,
        guidance_interval=config.guidance_interval,
    )
    memory = "" if result.device_bytes is None else f", {result.device_bytes / 2**20:.0f} MiB on the device"
    print(f"compiled in {result.compile_seconds:.1f} s{memory}; sampled in {result.sampling_seconds:.2f} s")
    return _write(config, result, settings)


def _settings(config: GenerateConfig, pipeline: SanaPipeline) -> dict[str, Any]:
    """What the picture's text chunks say, and the line about sampling with them."""
    defaults = pipeline.defaults
    return {
        "steps": defaults.num_inference_steps if config.steps is None else config.steps,
        "guidance_scale": defaults.guidance_scale if config.guidance_scale is None else config.guidance_scale,
        "guidance_interval": config.guidance_interval,
        "sampler": str(pipeline.sampler),
        "seed": config.seed,
        "model": config.model,
        "weights": pipeline.weights,
        "checkpoint_step": pipeline.checkpoint_step,
        "height": defaults.height if config.height is None else config.height,
        "width": defaults.width if config.width is None else config.width,
        "dtype": config.dtype,
        "license": defaults.license,
    }


def _announce(config: GenerateConfig, pipeline: SanaPipeline, settings: dict[str, Any]) -> None:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(pipeline.params))
    origin = "" if pipeline.weights is None else f", {pipeline.weights} weights of step {pipeline.checkpoint_step}"
    license_note = "" if settings["license"] is None else f", licence {settings['license']}"
    print(f"model: {config.model}, {parameters:,} parameters{origin}{license_note}")
    interval = config.guidance_interval
    acts = "" if interval is None else f" at noise levels {interval[0]:g} to {interval[1]:g}"
    device = next(iter(jax.tree.leaves(pipeline.params)[0].devices()))
    place = device.platform if device.device_kind == device.platform else f"{device.platform} ({device.device_kind})"
    negative = f", but not {config.negative_prompt!r}" if config.negative_prompt else ""
    print(f"prompt: {', '.join(map(repr, config.prompt))}{negative}")
    print(
        f"sampling: {len(config.prompt) * config.num_images} x {settings['height']}x{settings['width']} pixels, "
        f"{settings['steps']} steps of {settings['sampler']}, guidance {settings['guidance_scale']:g}{acts}, "
        f"seed {config.seed}, {config.dtype} on {place}; compiling",
        flush=True,
    )


def _write(config: GenerateConfig, result: SanaPipelineOutput, settings: dict[str, Any]) -> pathlib.Path:
    images = result.images
    width, height = images[0].size
    factor = config.enlarge or automatic_enlargement(height, width)
    picture, sheet = enlarge_image(images[0], factor), ""
    if len(images) > 1:
        labels = [text for text in config.prompt for _ in range(config.num_images)] if len(config.prompt) > 1 else None
        columns = config.num_images if len(config.prompt) > 1 and config.num_images > 1 else None
        picture = image_grid([enlarge_image(image, factor) for image in images], columns, labels)
        sheet = f", a sheet of {len(images)}"
    prompts = config.prompt[0] if len(config.prompt) == 1 else list(config.prompt)
    metadata = {
        "prompt": prompts,
        "negative_prompt": config.negative_prompt or None,
        **settings,
        "software": "sana_jax",
    }
    path = save_png(config.output, picture, metadata=metadata)
    shown = ""
    if factor > 1:
        shown = f", each picture enlarged {factor} times from {height}x{width} to {factor * height}x{factor * width}"
        shown += "" if config.enlarge else " (--enlarge 1 keeps the pixels)"
    print(f"picture: {path}{sheet}{shown}")
    return path


if __name__ == "__main__":
    run_command_line(main)
