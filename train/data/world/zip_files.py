"""Latents of clips in zip files with the camera's path, as the original trainer stores them, read where they are.

::

    shard-0.zip                 x.npz (or x.npy) for sample x: latents z (C, T, H, W), as the network sees them; beside
                                them, there or in the metadata, c2w and intrinsics; x.json: more metadata
    shard-0.json                metadata by sample: captions, c2w, intrinsics, height and width of the video, scores
    shard-0_dover.json          scores, or captions, of that name by sample

A path has a pose for every pixel frame, or one for every latent frame, between which it is filled in. Where the
metadata has poses and intrinsics these are used, else the arrays beside the latents. Every path is looked at before
training; of the latents the headers are.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from configs.world_data import WorldDataConfig
from sana_jax.errors import UserError, reason_of
from sana_jax.files import read_json
from train.data.captions import check_scores, fill_caption
from train.data.decoding import BadPicture
from train.data.encoding import LATENT_NAMES
from train.data.records import Caption, Problem, Say
from train.data.score_limits import passes
from train.data.source import refuse_too_many_bad
from train.data.sources.rows import as_number, sort_out
from train.data.world.cameras import CameraShape
from train.data.world.paths import CAMERA_NAMES, CameraPath, camera_of, check_path, read_path

Shape = tuple[int, int, int, int]
_NAMES = (*LATENT_NAMES, "latent", "latents")
_CAMERA_NAMES = tuple(name for names in CAMERA_NAMES.values() for name in names)
# What of the metadata a path is a function of.
CAMERA_COLUMNS = (*_CAMERA_NAMES, "height", "width")
_SUFFIXES = (".npz", ".npy")
_KEYS = ("key", "name", "id", "file_name")  # of a sample in a list
_BEGINNING = 4096  # bytes of an .npz that hold the header of its first array
_THREADS = 8  # that open zip files: they wait for the disk, or for a network's


class ZipSample(NamedTuple):
    """A sample of a zip file.

    Attributes:
        key: its shard's name and its own.
        file: the zip file.
        member: of the file.
        checksum: CRC-32 of the member.
        shape: (T, H, W, C) of the latents that are stored.
        captions: one or more.
        columns: what the metadata says of it.
    """

    key: str
    file: Path
    member: str
    checksum: int
    shape: Shape
    captions: tuple[Caption, ...]
    columns: Mapping[str, Any]


@dataclass
class ZipFindings:
    """What zip files hold, of which ``samples`` take part.

    Attributes:
        files: that were looked at.
        looked_at: samples, the unusable ones included.
        samples: those that can be used, in a fixed order.
        problems: samples, and files, that can't be used.
        filtered: samples whose scores are not within the limits.
        short: samples that have too few latent frames.
        without_caption: samples that have none, where these are left out or get an empty one.
        unusual: lines about cameras that can be used.
    """

    files: int = 0
    looked_at: int = 0
    samples: list[ZipSample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    filtered: int = 0
    short: int = 0
    without_caption: int = 0
    unusual: list[str] = field(default_factory=list)

    def add(self, other: ZipFindings) -> None:
        """Takes over what was found in further files."""
        for name in ("files", "looked_at", "samples", "problems", "filtered", "short", "without_caption", "unusual"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def open_zip_latents(
    data: WorldDataConfig, channels: int, frames: int, camera: CameraShape, say: Say = print
) -> list[ZipSample]:
    """Finds the samples below ``data.path`` that take part; says what is left out and why.

    Args:
        data: how they are chosen.
        channels: C of the latents.
        frames: latent frames of a clip.
        camera: pixels and frames per latent are used.
        say: prints a line.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UserError: no zip file, nothing that takes part, or too many samples that can't be used.
    """
    found = find_zip_samples(data, channels, frames, camera)
    for problem in found.problems:
        say(f"data: left out: {problem.name} {problem.reason}")
    refuse_too_many_bad(found.problems, found.looked_at, data.max_bad_share)
    left_out = (found.filtered, "do not pass --data.filters"), (found.short, f"have fewer than {frames} latent frames")
    for count, why in left_out:
        if count:
            say(f"data: {count:,} of {found.looked_at:,} samples {why} and are left out")
    if found.without_caption:
        say(f"data: {found.without_caption:,} of {found.looked_at:,} samples {what_of_no_caption(data)}")
    samples = found.samples
    if note := check_scores((sample.captions for sample in samples), data):
        say(f"data: {note}")
    if cut := sum(sample.shape[0] > frames for sample in samples):
        say(f"data: {cut:,} samples have more than {frames} latent frames, of which the first {frames} are taken")
    if filled := sum(sample.shape[0] < frames for sample in samples):
        say(f"data: {filled:,} samples are filled up to {frames} latent frames, which are not counted")
    if found.unusual:
        say(f"data: {len(found.unusual):,} cameras are unusual, such as: {found.unusual[0]}")
    if not samples:
        raise UserError(f"{data.path} has no samples that take part: {found.looked_at:,} were looked at, see above")
    return samples


def what_of_no_caption(data: WorldDataConfig) -> str:
    """What becomes of samples without a caption, for a line that counts them."""
    done = "are left out" if data.missing_captions == "skip" else "get an empty one"
    return f"have no caption and {done}"


def find_zip_samples(
    data: WorldDataConfig, channels: int | None, frames: int | None, camera: CameraShape
) -> ZipFindings:
    """Looks at every sample below ``data.path``: scores, the shape of its latents, captions and the camera's path.

    Args:
        data: how samples are chosen.
        channels: C of the latents; None for any.
        frames: latent frames of a clip; None for any.
        camera: pixels and frames per latent are used.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UserError: no zip file.
    """
    from tqdm import tqdm

    files, found = _zip_files(data.path), ZipFindings()
    look = functools.partial(_look_into, data=data, channels=channels, frames=frames, camera=camera)
    with ThreadPoolExecutor(_THREADS) as pool:
        for of_file in tqdm(pool.map(look, files), "zip files", total=len(files), disable=None, leave=False):
            found.add(of_file)
    return found


def _look_into(
    file: Path, data: WorldDataConfig, channels: int | None, frames: int | None, camera: CameraShape
) -> ZipFindings:
    """What one zip file holds."""
    found = ZipFindings(files=1)
    kinds, limits = tuple(data.weights()), data.score_limits()
    try:
        metadata = _metadata(file)
        with zipfile.ZipFile(file) as archive:
            there = set(archive.namelist())
            for info in archive.infolist():
                stem, suffix = os.path.splitext(info.filename)
                if suffix not in _SUFFIXES:
                    continue
                found.looked_at += 1
                key = f"{file.stem}/{stem}"
                try:
                    own = _own_metadata(archive, f"{stem}.json", key) if f"{stem}.json" in there else {}
                    fields = {**metadata.get(os.path.basename(stem), {}), **own}
                    if not passes(key, fields, limits):
                        found.filtered += 1
                        continue
                    shape = _stored_shape(archive, info.filename, key, channels)
                    if frames is not None and shape[0] < frames and data.short_clips == "skip":
                        found.short += 1
                        continue
                    sample = ZipSample(key, file, info.filename, info.CRC, shape, (), fields)
                    sample = _described(sample, data, kinds)
                    found.without_caption += not any(caption.text for caption in sample.captions)
                    if not sample.captions:
                        continue
                    found.unusual += _check_path(archive, sample, data, camera)
                    found.samples.append(sample)
                except BadPicture as error:
                    found.problems.append(Problem(error.name, error.reason))
    except BadPicture as error:  # of a file beside it
        found.looked_at += 1
        found.problems.append(Problem(error.name, error.reason))
    except (zipfile.BadZipFile, OSError) as error:
        found.looked_at += 1
        found.problems.append(Problem(str(file), f"can't be read ({reason_of(error, 100)})"))
    return found


def _zip_files(path: str | None) -> list[Path]:
    if path is None:
        raise UserError("--data.path is missing: name a folder of zip files with latents, or one zip file")
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"--data.path {root} does not exist; name a folder of zip files with latents")
    files = sorted(root.rglob("*.zip")) if root.is_dir() else [root]
    if not files or files[0].suffix != ".zip":
        raise UserError(f"--data.path {root} has no .zip file; --data.format zip_latents reads zip files of latents")
    return files


def _metadata(file: Path) -> dict[str, dict[str, Any]]:
    """What the files beside a zip file say, by sample.

    Raises:
        BadPicture: one of them is damaged.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in (file.with_suffix(".json"), *sorted(file.parent.glob(f"{file.stem}_*.json"))):
        if not path.is_file():
            continue
        name = path.stem.removeprefix(file.stem).removeprefix("_")
        for key, value in _rows(path):
            if not isinstance(value, Mapping):
                value = {name or "prompt": value}
            elif name:  # an object of one score or caption, whatever it calls it
                value = {name: next(iter(value.values()))} if len(value) == 1 else dict(value)
            found.setdefault(os.path.splitext(os.path.basename(key))[0], {}).update(value)
    return found


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Samples' names and values, of an object or of a list of objects.

    Raises:
        BadPicture: it holds neither.
    """
    try:
        content = read_json(path) if path.read_bytes().lstrip()[:1] == b"{" else json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadPicture(str(path), f"can't be read ({reason_of(error, 100)})") from error
    if isinstance(content, dict):
        yield from content.items()
        return
    if not isinstance(content, list):
        raise BadPicture(str(path), f"holds a {type(content).__name__}; samples are an object or a list of objects")
    for place, row in enumerate(content):
        values = [row.get(each) for each in _KEYS] if isinstance(row, dict) else []
        name = next((value for value in values if isinstance(value, str)), None)
        if name is None:
            raise BadPicture(str(path), f"holds a list whose entry {place} names no sample by {', '.join(_KEYS)}")
        yield name, row


def _own_metadata(archive: zipfile.ZipFile, member: str, key: str) -> dict[str, Any]:
    """What the .json beside a sample's latents says.

    Raises:
        BadPicture: it is damaged, or no object.
    """
    try:
        content = json.loads(archive.read(member))
    except Exception as error:  # damaged files make zipfile raise anything
        raise BadPicture(key, f"has a {member} that can't be read ({reason_of(error, 100)})") from error
    if not isinstance(content, dict):
        raise BadPicture(key, f"has a {member} that holds a {type(content).__name__}; metadata is an object")
    return content


def _stored_shape(archive: zipfile.ZipFile, member: str, key: str, channels: int | None) -> Shape:
    """(T, H, W, C) of a member's latents, of which only the header is read."""
    try:
        with archive.open(member) as outer:
            if member.endswith(".npy"):
                return _channels_last(_header(outer), key, channels)
            if (shape := _first_shape(outer.read(_BEGINNING))) is not None:
                return _channels_last(shape, key, channels)
        with _inner(archive, member) as inner:
            there = _array_names(inner)
            name = next((name for name in _NAMES if name in there), None)
            if name is None:
                raise BadPicture(key, f"has the arrays {', '.join(sorted(there))}; latents are called z")
            with inner.open(f"{name}.npy") as array:
                return _channels_last(_header(array), key, channels)
    except BadPicture:
        raise
    except Exception as error:  # damaged files make zipfile and numpy raise anything
        raise BadPicture(key, f"can't be read ({reason_of(error, 100)})") from error


@contextlib.contextmanager
def _inner(archive: zipfile.ZipFile, member: str) -> Iterator[zipfile.ZipFile]:
    """An .npz in a zip file; where that is compressed all of it is read, else what is asked for."""
    with contextlib.ExitStack() as held:
        file: IO[bytes] = held.enter_context(archive.open(member))
        if archive.getinfo(member).compress_type != zipfile.ZIP_STORED:
            file = io.BytesIO(file.read())
        yield held.enter_context(zipfile.ZipFile(file))


def _array_names(inner: zipfile.ZipFile) -> set[str]:
    return {os.path.splitext(name)[0] for name in inner.namelist()}


def _first_shape(beginning: bytes) -> tuple[int, ...] | None:
    """The shape of the first array of an .npz by its first bytes; None where that is not called as latents are.

    Latents are most of the file, and its directory is at the end.
    """
    signature, method, name_length, extra_length = struct.unpack("<4s4xH16xHH", beginning[:30])
    name = beginning[30 : 30 + name_length].decode(errors="replace")
    if signature != b"PK\x03\x04" or name.removesuffix(".npy") not in _NAMES or method not in (0, 8):
        return None
    content = beginning[30 + name_length + extra_length :]
    return _header(io.BytesIO(zlib.decompressobj(-15).decompress(content) if method else content))


def _header(file: Any) -> tuple[int, ...]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)[0]


def _channels_last(shape: tuple[int, ...], name: str, channels: int | None) -> Shape:
    shape = shape[1:] if len(shape) == 5 and shape[0] == 1 else shape
    if len(shape) != 4 or 0 in shape or channels not in (None, shape[0]):
        wanted = "(C, T, H, W)" if channels is None else f"({channels}, T, H, W) for this model"
        raise BadPicture(name, f"has latents of shape {shape}; they are {wanted}")
    return (*shape[1:], shape[0])


def _described(sample: ZipSample, data: WorldDataConfig, kinds: Sequence[str]) -> ZipSample:
    """With its captions; without any where it is to be left out for that.

    Raises:
        BadPicture: it has none, and that is an error.
        UserError: the data's caption names a column that there is not.
    """
    row = sort_out(dict(sample.columns), None, kinds)
    captions, template = tuple(row.captions), data.caption
    if template is not None and "{caption}" in template:
        captions = tuple(own._replace(text=fill_caption(template, row.columns, own.text)) for own in captions)
    elif template is not None:
        captions = (Caption(fill_caption(template, row.columns)),)
    if not captions and data.missing_captions == "error":
        advice = "write one into the metadata, or choose --data.caption, or --data.missing-captions skip or empty"
        raise BadPicture(sample.key, f"has no caption; {advice}")
    if not captions and data.missing_captions == "empty":
        captions = (Caption(""),)
    sides = {} if row.size is None else dict(zip(("height", "width"), row.size))
    return sample._replace(captions=captions, columns={**row.columns, **sides})


def _check_path(
    archive: zipfile.ZipFile, sample: ZipSample, data: WorldDataConfig, camera: CameraShape
) -> tuple[str, ...]:
    """Looks at a sample's path, the same that training reads; returns lines about what is unusual.

    Raises:
        BadPicture: it can't be used.
    """
    beside = {}
    if len(camera_of(sample.columns)) < len(CAMERA_NAMES) and sample.member.endswith(".npz"):
        try:
            with _inner(archive, sample.member) as inner:
                for name in _array_names(inner).intersection(_CAMERA_NAMES):
                    with inner.open(f"{name}.npy") as array:
                        beside[name] = np.lib.format.read_array(array, allow_pickle=False)
        except Exception as error:  # as above
            raise BadPicture(sample.key, f"can't be read ({reason_of(error, 100)})") from error
    path = path_of(sample, beside, data, camera.spatial_factor)
    lines = check_path(path, sample.key, video_size(sample, camera.spatial_factor))
    refuse_other_count(path, sample, camera.temporal_factor)
    return lines


def path_of(
    sample: ZipSample, beside: Mapping[str, np.ndarray], data: WorldDataConfig, spatial_factor: int
) -> CameraPath:
    """A sample's path: poses, and intrinsics, as the metadata has them, else as they are in arrays beside the latents.

    Raises:
        BadPicture: there is none, or there are no intrinsics.
    """
    try:
        columns = {kind: np.asarray(value, np.float64) for kind, value in camera_of(sample.columns).items()}
    except (TypeError, ValueError) as error:
        raise BadPicture(sample.key, "has a camera in its metadata that is no array of numbers") from error
    return read_path({**camera_of(beside), **columns}, sample.key, video_size(sample, spatial_factor), data)


def refuse_other_count(path: CameraPath, sample: ZipSample, temporal_factor: int) -> None:
    """Raises ``BadPicture`` unless there is a pose for each latent frame, or for each pixel frame."""
    latent = sample.shape[0]
    pixel = temporal_factor * (latent - 1) + 1
    if len(path.c2w) != latent and len(path.c2w) < pixel:
        raise BadPicture(
            sample.key,
            f"has {len(path.c2w)} poses for {latent} latent frames; allowed are as many, or {pixel}, one for each "
            "pixel frame",
        )


def latents_of(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Takes the latents out of a sample's arrays: (T, H, W, C) in float32."""
    latents = arrays.pop(next(name for name in _NAMES if name in arrays))
    return np.moveaxis(latents.reshape(latents.shape[-4:]), 0, -1).astype(np.float32)


def video_size(sample: ZipSample, spatial_factor: int) -> tuple[int, int]:
    """Height and width that intrinsics are in pixels of: as the metadata says, else the latents'."""
    sides = (as_number(sample.columns.get(name)) for name in ("height", "width"))
    return tuple(int(side or length * spatial_factor) for side, length in zip(sides, sample.shape[1:3]))
