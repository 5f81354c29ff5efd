"""The data of a run on videos, prepared and opened."""

from __future__ import annotations

from collections.abc import Callable

from configs.schema import RunConfig
from sana_jax.pipelines.model_directory import ModelDirectory
from train.data.cached import CachedData
from train.data.pinned import DATA, PICTURES
from train.data.video.joint import JointData
from train.precompute import with_pictures
from train.preemption import StopRequest
from train.prepared_data import open_prepared


def open_video_data(
    config: RunConfig, model: ModelDirectory, say: Callable[[str], None], stop: StopRequest
) -> CachedData | JointData | None:
    """Prepares what is missing of the caches of clips, and of the pictures beside them, and opens both.

    Args:
        config: its ``data`` is a ``VideoDataConfig``.
        model: whose autoencoder and text encoder prepare them.
        say: prints a line.
        stop: a request to stop.

    Returns:
        The data; None if a request to stop came meanwhile.

    Raises:
        UserError, FileNotFoundError, CheckpointError: as ``precompute`` and ``CachedData``.
    """
    opened = []
    for part, name in zip(with_pictures(config), (DATA, PICTURES)):
        dataset = open_prepared(part, model, name, say, stop)
        if dataset is None:
            return None
        opened.append(dataset)
    if len(opened) == 1:
        return opened[0]
    clips, pictures = opened
    return JointData(clips, pictures, config.data.joint_interval, config.data.joint_batch_size)
