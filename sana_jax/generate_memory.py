"""What ``--memory`` of the command line is to be enough for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from sana_jax.camera import read_array
from sana_jax.camera.actions import parse_action
from sana_jax.pipelines.image_inputs import read_picture
from sana_jax.pipelines.memory_plan import MemoryBudget
from sana_jax.pipelines.model_directory import GROWING_PIPELINES, VIDEO_PIPELINES, WORLD_PIPELINES

if TYPE_CHECKING:
    from sana_jax.generate import GenerateConfig


def memory_budget(config: GenerateConfig, name: str) -> MemoryBudget | None:
    """``--memory`` with what is asked of the pipeline of this name.

    Raises:
        UserError: an image, poses or an action that cannot be read.
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
        return dataclasses.replace(budget, num_cached_blocks=config.num_cached_blocks)
    if name in WORLD_PIPELINES:
        frames = config.frames
        if config.action is not None:
            frames = 1 + len(parse_action(config.action, config.action_scheme or "v1"))
        elif frames is None and config.c2w is not None:
            poses = read_array(config.c2w, "--c2w", "poses (frames, 4, 4)")
            frames = len(np.atleast_1d(poses))  # another shape is refused by the call
        return dataclasses.replace(budget, frames=frames)
    samples = len(config.prompt) * config.num_images
    lengths = {"frames": config.frames, "seconds": config.seconds, "fps": config.fps}
    return dataclasses.replace(budget, prompts=len(config.prompt), samples=samples, **lengths)
