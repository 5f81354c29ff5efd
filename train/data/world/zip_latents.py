"""Latents of clips in zip files with the camera's path, read where they are: see ``zip_files``."""

from __future__ import annotations

import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from configs.world_data import WorldDataConfig
from kernels.typing import Float, Int
from sana_jax.camera import relative_poses
from sana_jax.errors import reason_of
from train.batch import FRAME_VALID, Batch
from train.data.captions import CaptionRule, choose_caption
from train.data.decoding import BadPicture
from train.data.prompt_records import PromptRecords
from train.data.records import Record
from train.data.splits import split
from train.data.world.cameras import CameraShape
from train.data.world.paths import CameraPath, load_arrays, path_between, rows_of_intrinsics
from train.data.world.zip_files import Shape, ZipSample, latents_of, path_of, refuse_other_count, video_size

_MOST_OPEN = 32  # zip files of one thread


class ZipWorlds:
    """Latents of zip files as a data set that training reads; any number of threads may ask for batches at once.

    Args:
        samples: of ``open_zip_latents``.
        data: choice of captions, validation share and short clips are used.
        camera: what the network is told.
        frames: latent frames of a clip.
        prompts: the encoded captions; None where ``latents_and_conditions`` alone are asked for.

    Raises:
        UserError: a split that is not possible.
    """

    def __init__(
        self,
        samples: Sequence[ZipSample],
        data: WorldDataConfig,
        camera: CameraShape,
        frames: int,
        prompts: PromptRecords | None,
        rows: Sequence[int] | None = None,
    ):
        self.samples, self.data, self.camera, self.frames, self.prompts = samples, data, camera, frames, prompts
        self._held_out: Sequence[int] = ()
        if rows is None:
            records = [Record(sample.key, None, group=_group(sample, data)) for sample in samples]
            rows, self._held_out = split(records, data.validation_share)
        self._rows, self._rule = rows, CaptionRule.of(data)
        self._local = threading.local()

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
            UserError: a sample that can't be read any more.
        """
        choices = np.zeros((len(indices), 2)) if choices is None else choices
        latents, conditions = self.latents_and_conditions(indices)
        chosen = [self._sample(index) for index in indices]
        texts = [self._text(sample, place) for sample, place in zip(chosen, np.asarray(choices)[:, 0].tolist())]
        return Batch(latents, *self.prompts.encode(texts), conditions)

    def latents_and_conditions(
        self, indices: Int[np.ndarray, " B"]
    ) -> tuple[Float[np.ndarray, "B T H W C"], dict[str, np.ndarray]]:
        """A batch without captions; raises as ``batch``."""
        chosen = [self._sample(index) for index in indices]
        shape = (self.frames, *chosen[0].shape[1:])
        latents, valid = np.zeros((len(chosen), *shape), np.float32), np.zeros((len(chosen), self.frames), bool)
        paths = []
        for number, sample in enumerate(chosen):
            own, path = self._read(sample)
            count = min(len(own), self.frames)
            latents[number, :count], valid[number, :count] = own[:count], True
            paths.append(path)
        conditions = self.camera.conditions(*map(np.stack, zip(*paths)), shape)
        if self.data.short_clips == "pad":
            conditions[FRAME_VALID] = valid
        return latents, conditions

    def _sample(self, index: int) -> ZipSample:
        return self.samples[self._rows[int(index)]]

    def _read(self, sample: ZipSample) -> tuple[Float[np.ndarray, "T H W C"], CameraPath]:
        """Latents as they are stored, and the path of a clip's pixel frames in pixels of the clip."""
        if not hasattr(self._local, "files"):
            self._local.files = OrderedDict()
        files: OrderedDict[Path, zipfile.ZipFile] = self._local.files
        files[sample.file] = archive = files.pop(sample.file, None) or zipfile.ZipFile(sample.file)
        if len(files) > _MOST_OPEN:
            files.popitem(last=False)[1].close()
        try:
            content = archive.read(sample.member)
        except (zipfile.BadZipFile, zlib.error, OSError) as error:
            raise BadPicture(sample.key, f"can't be read ({reason_of(error, 100)})") from error
        arrays = load_arrays(content, sample.key)
        latents = latents_of(arrays)
        factor, spatial = self.camera.temporal_factor, self.camera.spatial_factor
        path = path_of(sample, arrays, self.data, spatial)
        return latents, _of_pixels(path, sample, video_size(sample, spatial), factor, spatial, self.frames)

    def _text(self, sample: ZipSample, place: float) -> str:
        return choose_caption(sample.captions, self._rule, place).text

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
            f"{len(self):,} clips{held_out} of {files} zip files in {self.samples[0].file.parent}, latents {shapes}; "
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
    refuse_other_count(path, sample, factor)
    if len(path.c2w) == latent and factor > 1:
        path = path_between(path, factor)
    places = np.minimum(np.arange(factor * (frames - 1) + 1), factor * (latent - 1))
    intrinsics = rows_of_intrinsics(path.intrinsics, len(path.c2w))
    height, width = (length * spatial_factor for length in sample.shape[1:3])
    scale = np.array([width / size[1], height / size[0]] * 2)
    return CameraPath(relative_poses(path.c2w[places]), (intrinsics[places] * scale).astype(np.float32))
