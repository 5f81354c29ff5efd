"""The data of LongSANA's training, prepared and opened: a teacher's trajectories, and prompts without videos."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from configs.schema import RunConfig
from sana_jax.errors import UserError
from sana_jax.pipelines.model_directory import ModelDirectory
from train.batch import CAMERA, PLUCKER
from train.data.cache import FORMAT, PROMPTS, CacheIdentity, CacheWriter
from train.data.encoding import prompt_dtype
from train.data.pinned import DATA, PROMPT_LIST, pinned, pinned_prompts
from train.data.prompt_lists import read_prompts
from train.data.prompt_records import add_prompts, free
from train.data.prompts import PromptsData, latent_shape, texts_of
from train.data.shard_filler import StoppedError
from train.data.trajectories import MAKING, TrajectoriesData, encoders_identity
from train.distributed import on_first_process
from train.networks import network_conditions
from train.preemption import StopRequest

Say = Callable[[str], None]


def open_trajectories(config: RunConfig, model: ModelDirectory, say: Say = print) -> TrajectoriesData:
    """The data of an ODE initialisation. A run that has a checkpoint goes on with the trajectories that it began with.

    Preview prompts that are no captions of the trajectories are encoded with the model's text encoder, whose weights
    are not in memory when it returns.

    Args:
        config: its ``data``, a ``TrajectoriesDataConfig``, ``run_dir``, ``ode.timesteps`` and ``preview.prompts`` are
            used.
        model: the model that is trained.
        say: prints a line.

    Raises:
        UserError, FileNotFoundError, CheckpointError: as ``TrajectoriesData``; another autoencoder or text encoder than
            the teacher's; or a prompt that the encoder refuses.
    """
    if config.data.path is None:
        raise UserError(f"--data.path is missing: name the directory that {MAKING} --model TEACHER has written")
    timesteps = None if config.ode is None else config.ode.timesteps
    data = TrajectoriesData(config.data.path, timesteps=timesteps, pins=pinned(config.run_dir, DATA))
    data.check_model(model, say)
    _check_camera(data, network_conditions(model.transformer_config))
    with _one_device():
        try:
            data.add_prompts(config.preview.prompts, model.text_encoder, say)
        finally:
            free(model.text_encoder)
    return data


def _check_camera(data: TrajectoriesData, wanted: Sequence[str]) -> None:
    """Raises ``UserError`` unless the trajectories have a camera's path just where the network is told of one."""
    there = [name for name in (CAMERA, PLUCKER) if name in data.condition_shapes(data.preview_shape)]
    if sorted(there) != sorted(wanted):
        raise UserError(
            f"the trajectories {data.directory} have {', '.join(there) or 'no camera'}, and the model is told "
            f"{', '.join(wanted) or 'of none'}; make them again with {MAKING} and a teacher of the model's kind"
        )


def open_prompts_data(
    config: RunConfig, model: ModelDirectory, say: Say = print, stop: StopRequest | None = None
) -> PromptsData | None:
    """The data of self-forcing: encodes what is missing of the prompts, and opens them.

    A run that has a checkpoint goes on with the prompts that it began with.

    The text encoder's weights are not in memory when it returns.

    Args:
        config: its ``data``, a ``PromptsDataConfig``, ``run_dir`` and ``preview.prompts`` are used.
        model: whose text encoder reads the prompts, and whose autoencoder says what shape latents have.
        say: prints a line.
        stop: a request to stop.

    Returns:
        The data; None if a request to stop came meanwhile.

    Raises:
        UserError, FileNotFoundError, CheckpointError: one line about what does not fit.
    """
    data = config.data
    shape = latent_shape(data, model)
    if data.path is None:
        raise UserError("--data.path is missing: name a text file with one prompt per line, or one with captions")
    prompts = pinned_prompts(config.run_dir)
    if prompts is None:
        prompts = read_prompts(data.path, "--data.path", say)
    else:
        say(f"data: the {len(prompts):,} prompts that the run began with ({Path(config.run_dir) / PROMPT_LIST})")
    directory = on_first_process(lambda: _prepare(config, model, prompts, say, stop))
    return None if directory is None else PromptsData(directory, prompts, data, shape)


def _prepare(
    config: RunConfig, model: ModelDirectory, prompts: Sequence[str], say: Say, stop: StopRequest | None
) -> Path | None:
    """Completes the cache of the encoded prompts, with motion scores, and of the negative prompt.

    Returns:
        Its directory; None if asked to stop.
    """
    data = config.data
    wanted = texts_of(prompts, data.motion_score)
    if data.real_motion_score is not None:
        wanted += texts_of(prompts, data.real_motion_score)
    return prepare_prompts(config, model, wanted, say, stop, data.negative_prompt)


def prepare_prompts(
    config: RunConfig,
    model: ModelDirectory,
    texts: Sequence[str],
    say: Say,
    stop: StopRequest | None,
    negative_prompt: str = "",
) -> Path | None:
    """Completes a cache of encoded prompts alone: of these texts and of the previews' prompts.

    Args:
        config: where the cache is: ``data.cache``, or beside the run, by ``data.path``.
        model: whose text encoder reads them; its weights are not in memory afterwards.
        texts: what is wanted.
        say: prints a line.
        stop: a request to stop.
        negative_prompt: which is encoded as what videos should not be; empty for none.

    Returns:
        The cache's directory; None if a request to stop came meanwhile.
    """
    encoder = model.text_encoder
    encoding = {name: value for name, value in encoders_identity(model).items() if name.startswith("text_encoder.")}
    identity = CacheIdentity({"format": FORMAT, **encoding, "prompts.dtype": prompt_dtype(encoder)})
    directory = _directory(config, identity)
    wanted = [text for text in dict.fromkeys([*texts, *config.preview.prompts]) if text.strip()]
    with _one_device(), CacheWriter(directory, identity, say=say) as cache:
        there = cache.present(PROMPTS)
        missing = [text for text in wanted if ("text", text) not in there]
        count = len(wanted) - len(missing)
        say(f"cache: {directory}: {len(wanted):,} distinct prompts, {count:,} of them there")
        try:
            add_prompts(cache, encoder, missing, say, stop, negative_prompt)
        except StoppedError:
            say(f"stopped by {stop.signal.name}; what was finished is kept in {directory}, the same command continues")
            return None
        finally:
            free(encoder)
        cache.write_samples({"prompt": text} for text in wanted)
    return directory


def _directory(config: RunConfig, identity: CacheIdentity) -> Path:
    """``--data.cache``, or one beside the run that runs on the same prompts share."""
    if config.data.cache is not None:
        return Path(config.data.cache).expanduser()
    path = Path(config.data.path).absolute()
    digest = hashlib.sha256(f"{path} {identity.id}".encode()).hexdigest()[:8]
    return Path(config.run_dir).parent / "cache" / f"{path.stem or 'prompts'}-{digest}"


def _one_device() -> AbstractContextManager:
    """Whatever mesh a run has set, each process encodes prompts for itself."""
    return jax.set_mesh(Mesh(np.asarray(jax.local_devices()[:1]), ("encoders",)))
