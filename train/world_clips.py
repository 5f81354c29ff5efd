"""Where the trajectories of a world model's teacher begin: the first frames and the camera's paths of clips."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.moving_camera import MovingCameraDataConfig
from configs.world_data import WorldDataConfig
from kernels.typing import Float, Int
from sana_jax.autoencoders.base import latent_frames, pixel_frames
from sana_jax.errors import UserError
from sana_jax.pipelines.model_directory import ModelDirectory
from sana_jax.pipelines.world_network import WorldGiven
from train.batch import CAMERA, PLUCKER
from train.data.cache import IDENTITY_FILE
from train.data.cached import CachedData
from train.data.encoding import autoencoder_identity
from train.data.video.moving_camera import MovingCameraData
from train.data.world.cached import CachedWorlds
from train.data.world.cameras import CameraShape
from train.data.world.paths import POSES
from train.data.world.zip_files import CAMERA_COLUMNS, open_zip_latents
from train.data.world.zip_latents import ZipWorlds
from train.networks import network_conditions
from train.run_directory import CONFIG_NAME, read_config

Say = Callable[[str], None]
_OPTIONS = {  # of a run, and of make_trajectories, which has no caption for all clips
    ", or choose --data.caption, or --data.missing-captions skip or empty": "",
    "--data.path": "--data",
    "--data.field-of-view": "--field-of-view",
    "--data.max-bad-share": "--max-bad-share",
    "--data.filters": "--filters",
}


@dataclass(frozen=True)
class WorldClips:
    """Clips of one size, cut to one number of latent frames.

    Attributes:
        data: of whose samples the first frame, the camera's path and the caption are taken.
        rows: the samples' indices in it.
        frames: latent frames that are taken.
        conditions: names of what the network is told of the camera.
        identity: what all of this is a function of.
    """

    data: MovingCameraData | CachedWorlds | ZipWorlds
    rows: Int[np.ndarray, " n"]
    frames: int
    conditions: tuple[str, ...]
    identity: dict[str, Any]

    @property
    def captions(self) -> list[str]:
        """Of every clip."""
        return [self.data.caption_of(int(row)) for row in self.rows]

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, h, w), the order in which noise is drawn."""
        _, height, width, channels = self._shape
        return channels, self.frames, height, width

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.data.preview_shape

    def given(self, indices: Int[np.ndarray, " B"]) -> WorldGiven:
        """The first latent frames and the cameras of clips, whose numbers begin anew where they are used up."""
        rows = self.rows[np.asarray(indices) % len(self.rows)]
        if isinstance(self.data, ZipWorlds):  # which has no encoded captions
            latents, conditions = self.data.latents_and_conditions(rows)
        else:
            batch = self.data.batch(rows)
            latents, conditions = batch.latents, batch.conditions
        camera = {name: np.asarray(conditions[name][:, : self.frames], np.float32) for name in self.conditions}
        return WorldGiven(np.asarray(latents[:, :1], np.float32), camera[CAMERA], camera.get(PLUCKER))


def camera_arrays(given: WorldGiven) -> dict[str, Float[np.ndarray, "B *X"]]:
    """What a record keeps of the camera, by the names that a batch has it under."""
    arrays = {CAMERA: given.camera_conditions, PLUCKER: given.chunk_plucker}
    return {name: np.asarray(array) for name, array in arrays.items() if array is not None}


def open_world_clips(
    path: str | None,
    frames: int | None,
    num_clips: int | None,
    directory: Path,
    model: ModelDirectory,
    say: Say = print,
    zip_options: Mapping[str, Any] | None = None,
) -> WorldClips:
    """The clips of a cache or of zip files, or those that the teacher was trained on, where these are made in memory.

    Args:
        path: the cache's directory, or zip files of latents; None for the teacher's own.
        frames: of a video, in pixels' time, of which the first are taken; None for the clips' own. Zip files need it,
            whose samples are of any length.
        num_clips: how many, spread evenly; None for all.
        directory: the teacher's.
        model: the same, opened.
        say: prints a line.
        zip_options: see ``zip_data``; for zip files alone.

    Raises:
        FileNotFoundError, CheckpointError: there is no cache, or it is damaged.
        UserError: no clips are named, or they have no camera, another autoencoder, or too few frames; or options
            that would not be used.
    """
    are_zips = path is not None and _are_zip_files(Path(path).expanduser())
    if not are_zips:
        refuse_zip_options(zip_options or {})
    if path is None:
        config = read_config(directory).data if (directory / CONFIG_NAME).is_file() else None
        if not isinstance(config, MovingCameraDataConfig):
            raise UserError(
                f"--data is missing: {directory} is no run on clips that are made in memory; name the cache of clips "
                "with the camera's path, or the zip files of latents, whose first frames and paths the trajectories "
                "have"
            )
        data, identity = MovingCameraData(config), {"clips.made": repr(config)}
    elif are_zips:
        data, identity = _open_zip_files(path, frames, model, zip_options or {}, say)
    else:
        cache = CachedData(Path(path).expanduser(), WorldDataConfig())
        _check_cache(cache, model)
        data = CachedWorlds(cache, CameraShape.of(model.transformer_config, model.autoencoder))
        identity = {"clips.cache": cache.identity.id}
    conditions = network_conditions(model.transformer_config)
    rows = np.asarray(data.buckets[data.preview_shape])
    if len(rows) < len(data):
        shape = "x".join(map(str, data.preview_shape))
        say(f"data: {len(data) - len(rows):,} of {len(data):,} clips are left out, whose latents are not {shape}")
    if num_clips is not None:
        if num_clips > len(rows):
            raise UserError(f"--num-clips {num_clips} is not allowed; there are {len(rows):,}: choose as many or fewer")
        rows = rows[np.linspace(0, len(rows) - 1, num_clips).round().astype(int)]
        identity |= {"clips.count": num_clips}
    own, factor = data.preview_shape[0], model.autoencoder.temporal_factor
    taken = own if frames is None else latent_frames(frames, factor)
    if not 2 <= taken <= own:
        raise UserError(
            f"--frames {frames} is not allowed; the clips have {pixel_frames(own, factor)}: choose {1 + factor} to as "
            "many"
        )
    if taken < own:
        say(f"data: the first {taken} of {own} latent frames of each clip are taken")
    return WorldClips(data, rows, taken, conditions, identity)


def _are_zip_files(path: Path) -> bool:
    """Whether a path is a zip file, or a folder that has some and is no cache."""
    if not path.is_dir():
        return path.suffix == ".zip"
    return not (path / IDENTITY_FILE).is_file() and next(path.rglob("*.zip"), None) is not None


def zip_data(path: str | None, options: Mapping[str, Any]) -> WorldDataConfig:
    """How zip files of latents are read: ``options`` are ``axes``, ``field_of_view``, ``max_bad_share``, ``filters``.

    Raises:
        UserError: a value that is not allowed.
    """
    with _own_options():
        return WorldDataConfig(path=path, format="zip_latents", **options)


@contextlib.contextmanager
def _own_options() -> Iterator[None]:
    """Messages about data name the options of a run; here they name those of ``train.make_trajectories``."""
    try:
        yield
    except (UserError, FileNotFoundError) as error:
        raise (UserError if isinstance(error, UserError) else FileNotFoundError)(_own_words(str(error))) from error


def _own_words(line: str) -> str:
    for theirs, own in _OPTIONS.items():
        line = line.replace(theirs, own)
    return line


def refuse_zip_options(options: Mapping[str, Any]) -> None:
    """Raises ``UserError`` if there are any: the trajectories' clips are not of zip files."""
    for name, value in options.items():
        shown = " ".join(value) if isinstance(value, tuple) else value
        raise UserError(
            f"--{name.replace('_', '-')} {shown} would not be used; it is for zip files of latents, of which a world "
            "model's clips may be: leave it out"
        )


def _open_zip_files(
    path: str, frames: int | None, model: ModelDirectory, options: Mapping[str, Any], say: Say
) -> tuple[ZipWorlds, dict[str, Any]]:
    """Latents of zip files that are long enough, and what identifies them."""
    camera = CameraShape.of(model.transformer_config, model.autoencoder)
    if frames is None:
        raise UserError(
            f"--frames is missing: the samples of the zip files {path} are of any length; say how many frames of each "
            "are taken (a preset for published models takes --frames 337)"
        )
    wanted = latent_frames(frames, camera.temporal_factor)
    config = zip_data(path, options)
    with _own_options():
        channels = model.autoencoder.latent_channels
        samples = open_zip_latents(config, channels, wanted, camera, lambda line: say(_own_words(line)))
    data = ZipWorlds(samples, config, camera, wanted, None)
    say(f"data: {data.describe()}")
    digest = hashlib.sha256()
    for sample in samples:
        captions = [caption.text for caption in sample.captions]
        path_there = {name: sample.columns[name] for name in CAMERA_COLUMNS if name in sample.columns}
        digest.update(json.dumps([sample.key, sample.checksum, captions, path_there], default=str).encode())
    # the digest says which samples take part; these say what their cameras are read as
    read_as = {f"clips.{name}": options[name] for name in ("axes", "field_of_view") if name in options}
    return data, {"clips.zips": digest.hexdigest()[:16], "clips.frames": wanted, **read_as}


def _check_cache(data: CachedData, model: ModelDirectory) -> None:
    """Raises ``UserError`` unless the clips have a camera, and latents of the teacher's autoencoder."""
    if POSES not in data.condition_shapes(data.preview_shape):
        raise UserError(
            f"--data {data.directory} has no camera's paths; name a cache that python -m train.precompute, or a run on "
            "clips with poses, has made"
        )
    fields, wanted = data.identity.fields, autoencoder_identity(model)
    configured = {f"autoencoder.{name}" for name in ("class", *model.autoencoder.to_config())}
    differing = sorted(name for name in configured if name in fields and fields[name] != wanted.get(name))
    if differing:
        name = differing[0]
        raise UserError(
            f"--data {data.directory} has latents of another autoencoder: {name} is {fields[name]!r} there, "
            f"{wanted.get(name)!r} here; name clips that the teacher's has encoded"
        )
