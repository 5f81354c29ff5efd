"""What ``--memory`` of the command line is to be enough for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sana_jax.camera.actions import parse_action
from sana_jax.pipelines.image_inputs import read_picture
from sana_jax.pipelines.memory_plan import MemoryBudget
from sana_jax.pipelines.model_directory import GROWING_PIPELINES, VIDEO_PIPELINES, WORLD_PIPELINES

if TYPE_CHECKING:
    from sana_jax.generate import GenerateConfig


def memory_budget(config: GenerateConfig, name: str) -> MemoryBudget | None:
    """``--memory`` with what is asked of the pipeline of this name.

    Raises:
        UserError: an image or an action that cannot be read.
    """
    if config.memory is None:
        return None
    height, width = config.height, config.width
    if config.image is not None and name not in VIDEO_PIPELINES and None in (height, width):
        picture = read_picture(config.image, shortest=1)
        height, width = height or picture.height, width or picture.width
    budget = MemoryBudget(
        config.memory,
        height=height,
        width=width,
        binning=config.binning,
        guidance_scale=config.guidance_scale,
        perturbed=bool(config.pag_scale),
        batched=config.guidance_batching == "batched" or config.step_cache is not None,
    )
    if name in GROWING_PIPELINES:  # block after block, whatever the length
        return budget
    if name in WORLD_PIPELINES:
        frames = config.frames
        if config.action is not None:
            frames = 1 + len(parse_action(config.action, config.action_scheme or "v1"))
        return dataclasses.replace(budget, frames=frames)
    samples = len(config.prompt) * config.num_images
    lengths = {"frames": config.frames, "seconds": config.seconds, "fps": config.fps}
    return dataclasses.replace(budget, prompts=len(config.prompt), samples=samples, **lengths)
