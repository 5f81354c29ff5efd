"""Latents of clips in zip files with the camera's path, as the original trainer stores them, read where they are.

::

    shard-0.zip                 x.npz (or x.npy) for sample x: latents z (C, T, H, W), as the network sees them; beside
                                them, there or in the metadata, c2w and intrinsics; x.json: more metadata
    shard-0.json                metadata by sample: captions, c2w, intrinsics, height and width of the video, scores
    shard-0_dover.json          scores, or captions, of that name by sample

A path has a pose for every pixel frame, or one for every latent frame, between which it is filled in.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.world_data import WorldDataConfig
from kernels.typing import Float, Int
from sana_jax.camera import relative_poses
from sana_jax.errors import UserError
from sana_jax.files import read_json
from train.batch import FRAME_VALID, Batch
from train.data.captions import CaptionRule, caption_weights
from train.data.decoding import BadPicture
from train.data.encoding import LATENT_NAMES
from train.data.prompt_records import PromptRecords
from train.data.records import Caption, Problem, Record, Say
from train.data.source import refuse_too_many_bad
from train.data.sources.rows import as_number, sort_out
from train.data.splits import split
from train.data.world.cameras import CameraShape
from train.data.world.paths import (
    INTRINSICS,
    POSES,
    CameraPath,
    check_path,
    load_arrays,
    path_between,
    read_path,
    refuse_bad_path,
    rows_of_intrinsics,
)

Shape = tuple[int, int, int, int]
_NAMES = (*LATENT_NAMES, "latent", "latents")
_ARRAYS = (POSES, "poses", "camera_to_world", INTRINSICS, "K")
_SUFFIXES = (".npz", ".npy")
_MOST_OPEN = 32  # zip files of one thread
_BEGINNING = 4096  # bytes of an .npz that hold the header of its first array


class ZipSample(NamedTuple):
    """A sample of a zip file.

    Attributes:
        key: its shard's name and its own.
        file: the zip file.
        member: of the file.
        shape: (T, H, W, C) of the latents that are stored.
        captions: one or more.
        columns: what the metadata says of it.
    """

    key: str
    file: Path
    member: str
    shape: Shape
    captions: tuple[Caption, ...]
    columns: Mapping[str, Any]


def open_zip_latents(
    data: WorldDataConfig, channels: int, frames: int, spatial_factor: int, say: Say = print
) -> list[ZipSample]:
    """Finds the samples below ``data.path`` that take part; says what is left out and why.

    Args:
        data: how they are chosen.
        channels: C of the latents.
        frames: latent frames of a clip.
        spatial_factor: pixels per side of a latent pixel.
        say: prints a line.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UserError: no zip file, nothing that takes part, or too many samples that can't be used.
    """
    files = _zip_files(data.path)
    kinds, limits, filtered, short = tuple(data.weights()), data.score_limits(), 0, 0
    samples: list[ZipSample] = []
    problems: list[Problem] = []
    looked_at = 0
    for file in files:
        metadata = _metadata(file)
        for member, own in _members(file, problems):
            looked_at += 1
            key = f"{file.stem}/{os.path.splitext(member)[0]}"
            fields = {**metadata.get(os.path.splitext(os.path.basename(member))[0], {}), **own}
            try:
                if not _passes(key, fields, limits):
                    filtered += 1
                    continue
                shape = _stored_shape(file, member, channels)
                if shape[0] < frames and data.short_clips == "skip":
                    short += 1
                    continue
                sample = _described(ZipSample(key, file, member, shape, (), fields), data, kinds)
                _check(sample, data, spatial_factor)
                samples.append(sample)
            except BadPicture as error:
                problems.append(Problem(error.name, error.reason))
    for problem in problems:
        say(f"data: left out: {problem.name} {problem.reason}")
    refuse_too_many_bad(problems, looked_at, data.max_bad_share)
    for count, why in ((filtered, "do not pass --data.filters"), (short, f"have fewer than {frames} latent frames")):
        if count:
            say(f"data: {count:,} of {looked_at:,} samples {why} and are left out")
    if cut := sum(sample.shape[0] > frames for sample in samples):
        say(f"data: {cut:,} samples have more than {frames} latent frames, of which the first {frames} are taken")
    if filled := sum(sample.shape[0] < frames for sample in samples):
        say(f"data: {filled:,} samples are filled up to {frames} latent frames, which are not counted")
    if not samples:
        raise UserError(f"{data.path} has no samples that take part: {looked_at:,} were looked at, see above")
    return samples


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
    """What the files beside a zip file say, by sample."""
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
    """Samples' names and values, of an object or of a list of objects."""
    content = read_json(path) if path.read_bytes().lstrip()[:1] == b"{" else {}
    if content:
        yield from content.items()
        return
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({str(error)[:80]}); mend it") from error
    for row in rows if isinstance(rows, list) else ():
        name = next((row[each] for each in ("key", "name", "id", "file_name") if each in row), None)
        if isinstance(name, str):
            yield name, row


def _members(file: Path, problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The members that hold latents, with what a .json of the same name says."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            there = set(names)
            for name in names:
                stem, suffix = os.path.splitext(name)
                if suffix not in _SUFFIXES:
                    continue
                own: dict[str, Any] = {}
                if f"{stem}.json" in there:
                    with contextlib.suppress(ValueError):
                        content = json.loads(archive.read(f"{stem}.json"))
                        own = content if isinstance(content, dict) else {}
                yield name, own
    except (zipfile.BadZipFile, OSError) as error:
        problems.append(Problem(str(file), f"can't be read ({' '.join(str(error).split())[:100]})"))


def _passes(key: str, fields: Mapping[str, Any], limits: Mapping[str, tuple[float, float]]) -> bool:
    """Whether all scores lie within their limits.

    Raises:
        BadPicture: it has no such score.
    """
    for name, (low, high) in limits.items():
        score = as_number(fields.get(name, fields.get(f"_{name}")))
        if score is None:
            raise BadPicture(key, f"has no score {name}, which --data.filters asks for")
        if not low <= score <= high:
            return False
    return True


def _stored_shape(file: Path, member: str, channels: int) -> Shape:
    """(T, H, W, C) of a member's latents, of which only the header is read."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(member) as outer:
            if member.endswith(".npy"):
                return _channels_last(_header(outer), member, channels)
            beginning = outer.read(_BEGINNING)
            if (shape := _first_shape(beginning)) is not None:
                return _channels_last(shape, member, channels)
            with zipfile.ZipFile(io.BytesIO(beginning + outer.read())) as inner:
                there = {os.path.splitext(name)[0] for name in inner.namelist()}
                name = next((name for name in _NAMES if name in there), None)
                if name is None:
                    raise BadPicture(member, f"has the arrays {', '.join(sorted(there))}; latents are called z")
                with inner.open(f"{name}.npy") as array:
                    return _channels_last(_header(array), member, channels)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise BadPicture(f"{file.name}/{member}", f"can't be read ({' '.join(str(error).split())[:100]})") from error


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


def _channels_last(shape: tuple[int, ...], name: str, channels: int) -> Shape:
    shape = shape[1:] if len(shape) == 5 and shape[0] == 1 else shape
    if len(shape) != 4 or shape[0] != channels:
        raise BadPicture(name, f"has latents of shape {shape}; they are ({channels}, T, H, W) for this model")
    return (*shape[1:], channels)


def _described(sample: ZipSample, data: WorldDataConfig, kinds: Sequence[str]) -> ZipSample:
    """With its captions.

    Raises:
        BadPicture: it has none.
    """
    if data.caption is not None:
        return sample._replace(captions=(Caption(data.caption),))
    row = sort_out(dict(sample.columns), None, kinds)
    if not row.captions and data.missing_captions == "empty":
        return sample._replace(captions=(Caption(""),))
    if not row.captions:
        raise BadPicture(sample.key, "has no caption; write one into the metadata, or choose --data.caption")
    sides = {} if row.size is None else dict(zip(("height", "width"), row.size))
    return sample._replace(captions=tuple(row.captions), columns={**row.columns, **sides})


def _check(sample: ZipSample, data: WorldDataConfig, spatial_factor: int) -> None:
    """Looks at a sample's path where the metadata holds it; paths beside latents are looked at when they are read.

    Raises:
        BadPicture: it can't be used.
    """
    if any(name in sample.columns for name in _ARRAYS[:3]):
        size = _video_size(sample, spatial_factor)
        check_path(read_path(_arrays(sample.columns), sample.key, size, data), sample.key, size)


def _arrays(columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(columns[name], np.float64) for name in _ARRAYS if name in columns}


def _video_size(sample: ZipSample, spatial_factor: int) -> tuple[int, int]:
    """Height and width that intrinsics are in pixels of: as the metadata says, else the latents'."""
    sides = (as_number(sample.columns.get(name)) for name in ("height", "width"))
    return tuple(int(side or length * spatial_factor) for side, length in zip(sides, sample.shape[1:3]))


class ZipWorlds:
    """Latents of zip files as a data set that training reads; any number of threads may ask for batches at once.

    Args:
        samples: of ``open_zip_latents``.
        data: choice of captions, validation share and short clips are used.
        camera: what the network is told.
        frames: latent frames of a clip.
        prompts: the encoded captions.

    Raises:
        UserError: a split that is not possible.
    """

    def __init__(
        self,
        samples: Sequence[ZipSample],
        data: WorldDataConfig,
        camera: CameraShape,
        frames: int,
        prompts: PromptRecords,
        rows: Sequence[int] | None = None,
    ):
        self.samples, self.data, self.camera, self.frames, self.prompts = samples, data, camera, frames, prompts
        self._held_out: Sequence[int] = ()
        if rows is None:
            records = [Record(sample.key, None, group=_group(sample, data)) for sample in samples]
            rows, self._held_out = split(records, data.validation_share)
        self._rows, self._rule = rows, CaptionRule.of(data)
        self._local, self._looked_at = threading.local(), set()

    @cached_property
    def validation(self) -> ZipWorlds | None:
        """The samples that are kept from training; None where there are none."""
        if not self._held_out:
            return None
        return ZipWorlds(self.samples, self.data, self.camera, self.frames, self.prompts, self._held_out)

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def buckets(self) -> dict[Shape, Int[np.ndarray, " n"]]:
        """The samples' indices by the shape (T, H, W, C) of their latents, cut or filled to one length."""
        found: dict[Shape, list[int]] = {}
        for index, row in enumerate(self._rows):
            found.setdefault((self.frames, *self.samples[row].shape[1:]), []).append(index)
        return {shape: np.asarray(found[shape]) for shape in sorted(found)}

    @property
    def preview_shape(self) -> Shape:
        """The commonest of these shapes."""
        return max(self.buckets, key=lambda shape: (len(self.buckets[shape]), shape))

    def condition_shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """The shapes of further inputs, without the batch axis, of samples with latents of this shape."""
        padding = {FRAME_VALID: (self.frames,)} if self.data.short_clips == "pad" else {}
        return {**self.camera.condition_shapes(shape), **padding}

    def batch(self, indices: Int[np.ndarray, " B"], choices: Float[np.ndarray, "B 2"] | None = None) -> Batch:
        """The samples of these indices, of one bucket, as arrays; the first of their ``choices`` picks a caption.

        Raises:
            UserError: a sample that can't be read, or whose path can't be used.
        """
        chosen = [self.samples[self._rows[int(index)]] for index in indices]
        choices = np.zeros((len(chosen), 2)) if choices is None else choices
        shape = (self.frames, *chosen[0].shape[1:])
        latents, valid = np.zeros((len(chosen), *shape), np.float32), np.zeros((len(chosen), self.frames), bool)
        paths = []
        for number, sample in enumerate(chosen):
            own, path = self._read(sample)
            count = min(len(own), self.frames)
            latents[number, :count], valid[number, :count] = own[:count], True
            paths.append(path)
        texts = [self._text(sample, place) for sample, place in zip(chosen, np.asarray(choices)[:, 0].tolist())]
        conditions = self.camera.conditions(*map(np.stack, zip(*paths)), shape)
        if self.data.short_clips == "pad":
            conditions[FRAME_VALID] = valid
        return Batch(latents, *self.prompts.encode(texts), conditions)

    def _read(self, sample: ZipSample) -> tuple[Float[np.ndarray, "T H W C"], CameraPath]:
        """Latents as they are stored, and the path of a clip's pixel frames in pixels of the clip."""
        if not hasattr(self._local, "files"):
            self._local.files = OrderedDict()
        files: OrderedDict[Path, zipfile.ZipFile] = self._local.files
        files[sample.file] = archive = files.pop(sample.file, None) or zipfile.ZipFile(sample.file)
        if len(files) > _MOST_OPEN:
            files.popitem(last=False)[1].close()
        arrays = load_arrays(archive.read(sample.member), sample.key)
        latents = arrays.pop(next(name for name in _NAMES if name in arrays))
        latents = np.moveaxis(latents.reshape(latents.shape[-4:]), 0, -1).astype(np.float32)
        factor, spatial = self.camera.temporal_factor, self.camera.spatial_factor
        size = _video_size(sample, spatial)
        path = read_path({**_arrays(sample.columns), **arrays}, sample.key, size, self.data)
        if not any(name in sample.columns for name in _ARRAYS[:3]) and sample.key not in self._looked_at:
            refuse_bad_path(path, sample.key, size)
            self._looked_at.add(sample.key)
        return latents, _of_pixels(path, sample, size, factor, spatial, self.frames)

    def _text(self, sample: ZipSample, place: float) -> str:
        weights = np.cumsum(caption_weights(sample.captions, self._rule))
        return sample.captions[int(np.searchsorted(weights / weights[-1], place, side="right"))].text

    @property
    def captions(self) -> list[str]:
        """The distinct captions."""
        found = dict.fromkeys(caption.text for row in self._rows for caption in self.samples[row].captions)
        return [text for text in found if text.strip()]

    def caption_of(self, index: int) -> str:
        """A sample's first caption."""
        return self.samples[self._rows[index]].captions[0].text

    def encode(self, captions: Sequence[str]) -> tuple[Float[np.ndarray, "B L C"], Int[np.ndarray, "B L"]]:
        """Embeddings and masks of captions, or of the run's preview prompts."""
        return self.prompts.encode(captions)

    def null_encoding(self) -> tuple[Float[np.ndarray, "1 L C"], Int[np.ndarray, "1 L"]]:
        """The encoding of no text."""
        return self.prompts.null_encoding()

    def describe(self) -> str:
        """One line for the start of a run."""
        files = len({sample.file for sample in self.samples})
        shapes = ", ".join(f"{'x'.join(map(str, shape))}: {len(own)}" for shape, own in self.buckets.items())
        held_out = f" and {len(self.validation)} for validation" if self.validation else ""
        return (
            f"{len(self):,} clips{held_out} of {files} zip files in {self.data.path}, latents {shapes}; "
            f"{len(self.captions):,} captions; nothing says whether this model's autoencoder has made the latents"
        )


def _group(sample: ZipSample, data: WorldDataConfig) -> str | None:
    value = sample.columns.get("group" if data.group_column is None else data.group_column)
    return None if value is None else str(value)


def _of_pixels(
    path: CameraPath, sample: ZipSample, size: tuple[int, int], factor: int, spatial_factor: int, frames: int
) -> CameraPath:
    """A path of one or the other kind as one of 1 + factor·(frames - 1) pixel frames; the last pose is repeated.

    Raises:
        BadPicture: as many poses as neither latent nor pixel frames.
    """
    latent = sample.shape[0]
    if len(path.c2w) == latent and factor > 1:
        path = path_between(path, factor)
    elif len(path.c2w) < factor * (latent - 1) + 1:
        raise BadPicture(
            sample.key,
            f"has {len(path.c2w)} poses for {latent} latent frames; allowed are as many, or "
            f"{factor * (latent - 1) + 1}, one for each pixel frame",
        )
    places = np.minimum(np.arange(factor * (frames - 1) + 1), factor * (latent - 1))
    intrinsics = rows_of_intrinsics(path.intrinsics, len(path.c2w))
    height, width = (length * spatial_factor for length in sample.shape[1:3])
    scale = np.array([width / size[1], height / size[0]] * 2)
    return CameraPath(relative_poses(path.c2w[places]), (intrinsics[places] * scale).astype(np.float32))
