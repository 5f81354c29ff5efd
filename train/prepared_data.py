"""A data set that is prepared where that is not done yet, and opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from configs.schema import RunConfig
from sana_jax.pipelines.model_directory import ModelDirectory
from train.data.cached import CachedData
from train.data.pinned import pinned
from train.distributed import on_first_process
from train.precompute import already_prepared, precompute
from train.preemption import StopRequest


def open_prepared(
    config: RunConfig, model: ModelDirectory, name: str, say: Callable[[str], None], stop: StopRequest
) -> CachedData | None:
    """Prepares what is missing of the cache of ``config.data``, and opens it.

    A run that has a checkpoint goes on with the samples that it began with; where the cache has all of them, the data
    is not looked at again.

    Args:
        config: of the run, with this data.
        model: whose autoencoder and text encoder prepare it.
        name: of the run's list of these samples (``train.data.pinned``).
        say: prints a line.
        stop: a request to stop.

    Returns:
        The data; None if a request to stop came meanwhile.

    Raises:
        UserError, FileNotFoundError, CheckpointError: as ``precompute`` and ``CachedData``.
    """
    pins = pinned(config.run_dir, name)

    def prepare() -> Path | None:
        return already_prepared(config, model, pins, say) or precompute(config, model, say=say, stop=stop)

    directory = on_first_process(prepare)
    return None if directory is None else CachedData(directory, config.data, pins=pins)
