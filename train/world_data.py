"""The data of a run on clips with a camera, prepared and opened."""

from __future__ import annotations

from collections.abc import Callable

from configs.schema import RunConfig
from sana_jax.autoencoders.base import latent_frames
from sana_jax.pipelines.model_directory import ModelDirectory
from train.data.cache import CacheReader
from train.data.pinned import DATA
from train.data.prompt_records import PromptRecords
from train.data.world.cached import CachedWorlds
from train.data.world.cameras import CameraShape
from train.data.world.zip_files import open_zip_latents
from train.data.world.zip_latents import ZipWorlds
from train.distributed import on_first_process
from train.longsana_data import prepare_prompts
from train.preemption import StopRequest
from train.prepared_data import open_prepared


def open_world_data(
    config: RunConfig, model: ModelDirectory, say: Callable[[str], None], stop: StopRequest
) -> CachedWorlds | ZipWorlds | None:
    """Prepares what is missing of the cache of clips, or of the prompts beside latents of zip files, and opens it.

    Args:
        config: its ``data`` is a ``WorldDataConfig``.
        model: whose autoencoder and text encoder prepare them.
        say: prints a line.
        stop: a request to stop.

    Returns:
        The data; None if a request to stop came meanwhile.

    Raises:
        UserError, FileNotFoundError, CheckpointError: as ``precompute``, ``CachedData`` and ``open_zip_latents``.
    """
    data, camera = config.data, CameraShape.of(model.transformer_config, model.autoencoder)
    if data.format != "zip_latents":
        clips = open_prepared(config, model, DATA, say, stop)
        return None if clips is None else CachedWorlds(clips, camera)
    frames = latent_frames(data.clip_frames, camera.temporal_factor)
    samples = open_zip_latents(data, model.autoencoder.latent_channels, frames, camera, say)
    texts = [caption.text for sample in samples for caption in sample.captions]
    directory = on_first_process(lambda: prepare_prompts(config, model, texts, say, stop))
    if directory is None:
        return None
    return ZipWorlds(samples, data, camera, frames, PromptRecords(CacheReader(directory)))
