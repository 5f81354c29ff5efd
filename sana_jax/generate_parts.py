"""What the command line puts into an opened pipeline: another sampler, token encoders."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
from typing import TYPE_CHECKING, Any

from sana_jax.condition_tokens_files import has_condition_tokens
from sana_jax.errors import UserError

if TYPE_CHECKING:
    from sana_jax.generate import GenerateConfig
    from sana_jax.pipelines.base import SamplingPipeline


def choose_sampler(config: GenerateConfig, pipeline: SamplingPipeline) -> None:
    """The sampler that is asked for, with the model's flow shift unless another is asked for.

    Raises:
        UserError: the pipeline has a sampler of its own, or none has that name or takes that shift.
    """
    from sana_jax.diffusion.samplers import SAMPLERS, SCM, LongSanaSampler, WorldStreamSampler, make_sampler

    if config.sampler is None and config.flow_shift is None:
        return
    if isinstance(pipeline.sampler, SCM | LongSanaSampler | WorldStreamSampler):
        raise UserError(
            f"--sampler and --flow-shift would not be used by {type(pipeline).__name__}, which has a sampler of its "
            "own; leave them out"
        )
    if config.flow_shift is not None and not (config.flow_shift > 0 and math.isfinite(config.flow_shift)):
        raise UserError(
            f"--flow-shift {config.flow_shift:g} must be a positive number; leave it out for the model's own, "
            f"{pipeline.sampler.flow_shift:g}"
        )
    name = config.sampler or next(name for name, kind in SAMPLERS.items() if isinstance(pipeline.sampler, kind))
    shift = pipeline.sampler.flow_shift if config.flow_shift is None else config.flow_shift
    pipeline.sampler = make_sampler(name, flow_shift=shift)


def steps_taken(config: GenerateConfig, pipeline: SamplingPipeline) -> dict[str, Any]:
    """Steps and sampler as the call takes them: what is made block after block may be given other ones than its own."""
    from sana_jax.diffusion.samplers import LongSanaSampler, WorldStreamSampler

    sampler, steps = pipeline.sampler, config.steps
    given: dict[str, Any] = {}
    if config.num_cached_blocks is not None and isinstance(sampler, LongSanaSampler | WorldStreamSampler):
        given["num_cached_blocks"] = config.num_cached_blocks or None
    if isinstance(sampler, WorldStreamSampler):
        if config.timesteps is not None:
            given["timesteps"] = config.timesteps
        if config.num_cached_blocks == 0:  # all are seen anyway
            given["sink"] = False
    with contextlib.suppress(UserError):  # a value that is not allowed is refused by the call
        sampler = dataclasses.replace(sampler, **given)
    if steps is None:
        steps = sampler.num_inference_steps if "timesteps" in given else pipeline.defaults.num_inference_steps
    return {"steps": steps, "sampler": str(sampler)}


def load_tokens(config: GenerateConfig, pipeline: SamplingPipeline) -> None:
    """Token encoders: those that are named, or those beside a LoRA or in the model's directory.

    Raises:
        UserError: an option that would not be used.
        FileNotFoundError, CheckpointError: encoders that are missing, damaged, or of another model.
    """
    from sana_jax.lora import parse_lora_option

    if not hasattr(pipeline, "load_condition_tokens"):
        given = {"--condition-tokens": config.condition_tokens, "--image-encoder": config.image_encoder}
        if unused := [option for option, value in given.items() if value is not None]:
            them = "it" if len(unused) == 1 else "them"
            raise UserError(f"{', '.join(unused)} would not be used by {type(pipeline).__name__}; leave {them} out")
        return
    places = [parse_lora_option(text)[0] for text in config.lora]
    beside = [path if path.is_dir() else path.parent for path in map(pathlib.Path, places)]
    found = [directory for directory in beside if has_condition_tokens(directory)]
    if config.condition_tokens is not None:
        pipeline.load_condition_tokens(config.condition_tokens, image_encoder=config.image_encoder)
    elif found:
        print(f"token encoders beside the LoRA: {found[0]}")
        pipeline.load_condition_tokens(found[0], image_encoder=config.image_encoder)
    elif config.image_encoder is not None:
        if pipeline.condition_tokens is None:
            raise UserError("--image-encoder would not be used, since the model has no token encoders; leave it out")
        pipeline.image_encoder = config.image_encoder
