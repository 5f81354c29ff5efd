"""Turns pictures or videos and captions into a cache of latents and encoded prompts: ``python -m train.precompute
PRESET ...``.

Takes the options of ``python -m train.main``, which does the same by itself before it trains. An interrupted run goes
on where it stopped; pictures that were added are added, and those that are gone are dropped.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds, so that a signal finds someone listening
    from train.preemption import StopRequest

    STOP = StopRequest()

import jax
import numpy as np
from jax.sharding import Mesh

from configs.data import ImageDataConfig, VideoDataConfig
from configs.schema import RunConfig
from configs.world_data import WorldDataConfig
from sana_jax.devices import computing
from sana_jax.errors import UserError, run_command_line
from sana_jax.pipelines.model_directory import ModelDirectory
from train.data.cache import CacheIdentity, CacheWriter, read_identity
from train.data.cache_plan import cache_directory, cache_identity, is_for_videos, variants
from train.data.conditions import Encoders, make_conditions
from train.data.encoding import ClipEncoder, PictureEncoder
from train.data.pinned import holds
from train.data.prompt_records import free
from train.data.shard_filler import StoppedError
from train.data.source import open_source
from train.data.video.source import open_clips
from train.data.world.source import open_worlds
from train.precompute_clips import ClipRun
from train.precompute_pictures import PictureRun
from train.precompute_worlds import WorldRun, path_conditions
from train.preemption import StopRequest, exit_status

PROG = "python -m train.precompute"
Say = Callable[[str], None]


def main(argv: Sequence[str] | None = None, stop: StopRequest | None = None) -> int:
    """Runs the command; returns its exit status.

    Raises:
        UserError: an option that is not allowed, or a preset without data to prepare; and as ``precompute``.
        FileNotFoundError, CheckpointError: as ``precompute``, and of the model.
    """
    from train.base_model import open_encoders
    from train.main import read_command_line

    config = read_command_line(sys.argv[1:] if argv is None else argv, PROG, _help_text)
    if not isinstance(config.data, ImageDataConfig):
        raise UserError(
            f"the preset {config.preset} has its data in memory, so there is nothing to prepare; choose one that "
            "trains on pictures, such as finetune"
        )
    if config.model is None and config.encoders is None:
        raise UserError("--model is missing: its autoencoder and text encoder make the cache; name a model's directory")
    with ExitStack() as held:
        stop = held.enter_context(nullcontext(stop) if stop is not None else closing(StopRequest()))
        held.enter_context(computing(config.device, config.compute.kernels, "--compute.kernels"))
        parts = open_encoders(config).parts
        for part, option in zip(with_pictures(config), ("cache", "joint-cache")):
            directory = precompute(part, parts, say=_print_line, stop=stop, thorough=True)
            stop.nothing_to_lose = True
            if directory is None:
                return exit_status(stop.signal)
            print(f"the cache is ready: {directory}; training takes it with --data.{option} {directory}", flush=True)
        if config.prior is not None and config.prior.caption is not None:
            return _prepare_class(config, directory, stop)
    return 0


def _help_text() -> str:
    """What ``--help`` says before a preset is chosen."""
    from configs import PRESETS, load_preset
    from train.usage import overview

    does = (
        "Turns the pictures or videos of a preset, and their captions, into a cache of latents and encoded prompts, as "
        "training does before its first step. Takes the options of python -m train.main."
    )
    presets = [name for name in PRESETS if isinstance(load_preset(name).data, ImageDataConfig)]
    return overview(PROG, does, (), presets)


def _prepare_class(config: RunConfig, subject: Path, stop: StopRequest) -> int:
    """Draws and prepares DreamBooth's class as training would; returns the exit status."""
    from train.base_model import open_base_model
    from train.data.cached import CachedData
    from train.prior_data import open_with_prior

    base = open_base_model(config.model, config.model_variant)
    both = open_with_prior(config, base, CachedData(subject, config.data), _print_line, stop)
    if both is None:
        return exit_status(stop.signal)
    print(f"the class is ready: {both.prior.directory}; training with the same options finds it there", flush=True)
    return 0


def with_pictures(config: RunConfig) -> list[RunConfig]:
    """The run, and beside a run on clips the one on the pictures that are mixed in, where there are some."""
    pictures = config.data.pictures() if isinstance(config.data, VideoDataConfig) else None
    return [config] if pictures is None else [config, dataclasses.replace(config, data=pictures)]


def precompute(
    config: RunConfig,
    model: ModelDirectory,
    *,
    say: Say = print,
    stop: StopRequest | None = None,
    thorough: bool = False,
) -> Path | None:
    """Makes the cache of ``config.data`` with a model's autoencoder and text encoder, or completes one.

    When it returns, neither of the two has its weights in memory. One device of this process computes.

    Args:
        config: its ``data``, ``batch_size``, ``run_dir`` and ``preview.prompts`` are used.
        model: the model.
        say: prints a line.
        stop: a request to stop ends the shard under way and leaves.
        thorough: look for damage inside of the files of a cache that is there, which reads all of it.

    Returns:
        The cache's directory; None if it was asked to stop before the end.

    Raises:
        FileNotFoundError: there is no data.
        CheckpointError: the directory holds a cache of another identity.
        UserError: what is wrong with data, settings or disk.
    """
    # Whatever mesh a run has set, other processes do not take part in this.
    with jax.set_mesh(Mesh(np.asarray(jax.local_devices()[:1]), ("encoders",))):
        return _precompute(config, model, say, stop, thorough)


def already_prepared(config: RunConfig, model: ModelDirectory, pins: Path | None, say: Say = print) -> Path | None:
    """The cache that has all samples that a run began with, and its preview prompts; the data is not looked at.

    Args:
        config: of the run.
        model: as for ``precompute``.
        pins: the run's list of samples; None for a run that begins.
        say: prints a line.

    Returns:
        The cache's directory; None where something is missing, which ``precompute`` makes.

    Raises:
        CheckpointError: the list is damaged.
        UserError: settings of the data that are not allowed.
    """
    if pins is None:
        return None
    _, _, encoder = _kind_of_run(config.data, model)
    identity = cache_identity(config.data, model, _conditions(config.data, model, encoder, say))
    directory = cache_directory(config, identity)
    if not holds(directory, identity, pins, config.preview.prompts, variants(config.data)):
        if not directory.exists():
            say(
                f"data: the run began with a cache, and there is none at {directory}: it is made anew (where the run "
                "has moved, what lay beside it may be moved there too)"
            )
        return None
    say(f"data: the run goes on with the samples that it began with ({pins}), all of them in the cache {directory}")
    return directory


def _conditions(data: ImageDataConfig, model: ModelDirectory, encoder: PictureEncoder, say: Say) -> tuple:
    """What a record has beside its latents."""
    conditions = make_conditions(data.conditions, Encoders(encoder, model.autoencoder.image_channels, say))
    return (*conditions, *path_conditions(data)) if isinstance(data, WorldDataConfig) else conditions


def _precompute(
    config: RunConfig, model: ModelDirectory, say: Say, stop: StopRequest | None, thorough: bool
) -> Path | None:
    data = config.data
    runs, opens, encoder = _kind_of_run(data, model)
    conditions = _conditions(data, model, encoder, say)
    identity = cache_identity(data, model, conditions)
    directory = cache_directory(config, identity)
    if data.path is None:
        return _finished_cache(directory, identity, say)
    source = opens(data, say)
    with CacheWriter(directory, identity, thorough=thorough, say=say) as cache:
        run = runs(config, model, source, encoder, conditions, cache, say, stop)
        try:
            run.plan()
            run.prompts()
            run.pictures()
            run.copy_features()
        except StoppedError:
            say(
                f"stopped by {stop.signal.name}; what was finished is kept in {directory}, the same command continues"
                + (f": {_command_line()}" if sys.argv[0].endswith("precompute.py") else "")
            )
            return None
        finally:
            free(model.text_encoder)
            encoder.free()
            for condition in conditions:
                condition.free()
        run.finish()
    encoder.free()
    return directory


def _kind_of_run(data: ImageDataConfig, model: ModelDirectory) -> tuple[type[PictureRun], Callable, PictureEncoder]:
    """What prepares the data, what finds it, and what encodes it."""
    if not isinstance(data, VideoDataConfig):
        pictures = ClipEncoder(model.autoencoder, 1) if is_for_videos(model) else PictureEncoder(model.autoencoder)
        return PictureRun, open_source, pictures
    if not is_for_videos(model):
        raise UserError(
            f"the model {model.path} is for pictures, and the data is videos; choose a video model, or a preset that "
            "trains on pictures"
        )
    encoder = ClipEncoder(model.autoencoder, data.clip_frames)
    if not isinstance(data, WorldDataConfig):
        return ClipRun, open_clips, encoder
    if data.format == "zip_latents":
        raise UserError(
            "--data.format zip_latents holds latents that training reads where they are, so there is nothing to "
            "prepare: start train.main"
        )
    return WorldRun, open_worlds, encoder


def _finished_cache(directory: Path, identity: CacheIdentity, say: Say) -> Path:
    read_identity(directory).require(identity, directory)
    say(f"data: the cache {directory} as it is, since no --data.path is named")
    return directory


def _command_line() -> str:
    return f"{PROG} {' '.join(map(shlex.quote, sys.argv[1:]))}"


def _print_line(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_command_line(lambda: main(stop=STOP))
