"""The data of prior preservation: pictures of the class, drawn where they are missing, prepared and opened."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from configs.prior import ClassPicturesConfig
from configs.schema import RunConfig, ValidationConfig
from sana_jax.pipelines.opening import find_model
from sana_jax.pipelines.resolution import nearest_bin
from sana_jax.pipelines.text_to_image import SanaPipeline
from train.base_model import BaseModel
from train.data.buckets import size_table
from train.data.cached import CachedData
from train.data.pinned import CLASS, pinned
from train.data.prior import WithPrior, draw_prior_pictures
from train.distributed import on_first_process
from train.precompute import already_prepared, precompute
from train.preemption import StopRequest

Say = Callable[[str], None]


def open_with_prior(
    config: RunConfig, base: BaseModel, subject: CachedData, say: Say, stop: StopRequest
) -> WithPrior | None:
    """Draws what is missing of the class with the base model, prepares its pictures, and opens them with the subject.

    Args:
        config: with ``prior``.
        base: the model.
        subject: pictures of the subject, whose sizes those of the class get.
        say: prints a line.
        stop: a request to stop.

    Returns:
        Both; None if a request to stop came meanwhile.

    Raises:
        UserError, FileNotFoundError, CheckpointError: as ``precompute`` and ``CachedData``.
    """
    factor = base.parts.autoencoder.spatial_factor
    sizes = {(shape[0] * factor, shape[1] * factor): len(own) for shape, own in subject.buckets.items()}
    of_class, pins = class_configuration(config, base, sizes), pinned(config.run_dir, CLASS)

    def prepare() -> Path | None:
        return already_prepared(of_class, base.parts, pins, say) or _prepare(of_class, base, sizes, say, stop)

    directory = on_first_process(prepare)
    if directory is None:
        return None
    return WithPrior(subject, CachedData(directory, of_class.data, pins=pins), config.prior.weight)


def class_configuration(config: RunConfig, base: BaseModel, sizes: dict[tuple[int, int], int]) -> RunConfig:
    """The run's configuration with the pictures of the class for data.

    Unless ``prior.path`` names one, their folder has a name of its own for every caption, model and number of steps.
    """
    prior, data = config.prior, config.data
    drawn_by = json.dumps([prior.caption, base.weights_id, prior.num_inference_steps])
    name = f"class-{_slug(prior.caption)}-{hashlib.sha256(drawn_by.encode()).hexdigest()[:8]}"
    data = ClassPicturesConfig(
        path=prior.path or os.path.join(os.path.dirname(config.run_dir), name),
        caption=prior.caption,
        resolution=data.resolution,
        aspect_buckets=data.aspect_buckets,
        max_bad_share=data.max_bad_share,
        latent_dtype=data.latent_dtype,
        cache=None if data.cache is None else f"{data.cache}-class",
        sizes=tuple((*size, count) for size, count in sizes.items()),
    )
    preview = dataclasses.replace(config.preview, prompts=())  # which are encoded with the subject's captions
    return dataclasses.replace(config, data=data, preview=preview, validation=ValidationConfig())


def _prepare(
    config: RunConfig, base: BaseModel, sizes: dict[tuple[int, int], int], say: Say, stop: StopRequest
) -> Path | None:
    """Draws what is missing, and makes the cache."""
    prior, model, pipeline = config.prior, base.parts, None
    table = size_table(model.transformer_config.sample_size, model.autoencoder.spatial_factor)

    def draw(caption: str, seed: int, size: tuple[int, int]):
        nonlocal pipeline
        if pipeline is None:
            emulate = config.compute.emulate_fp16_saturation
            pipeline = SanaPipeline.from_pretrained(
                find_model(base.name), variant=base.variant, emulate_fp16_saturation=emulate
            )
        _, height, width = nearest_bin(*size, table)  # the model's own sizes are those that it draws well
        steps = prior.num_inference_steps
        return pipeline(caption, seed=seed, num_inference_steps=steps, height=height, width=width).images[0]

    # Whatever mesh a run has set, other processes do not take part in this.
    with jax.set_mesh(Mesh(np.asarray(jax.local_devices()[:1]), ("encoders",))):
        draw_prior_pictures(
            Path(config.data.path),
            prior.caption,
            max(prior.pictures, len(sizes)),
            draw,
            say,
            sizes=sizes,
            drawn_by={"model": base.weights_id, "num_inference_steps": prior.num_inference_steps},
        )
    del pipeline  # its weights are not needed beside the training's own
    return precompute(config, model, say=say, stop=stop)


def _slug(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "pictures"
