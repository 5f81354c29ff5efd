"""Clips of videos that have a camera's path beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Mapping

import numpy as np

from configs.world_data import WorldDataConfig
from kernels.typing import Float
from train.data.decoding import BadPicture
from train.data.records import Problem, Record, Say
from train.data.source import IndexedSource, open_source, refuse_too_many_bad
from train.data.video.containers import open_clip
from train.data.video.source import ClipSource, refuse_no_clips
from train.data.video.windows import Timing
from train.data.world.paths import POSES, CameraPath, check_count, check_path, load_arrays, read_path

_VIDEOS_KEPT = 64  # whose frames' times are remembered: clips are read video after video


class WorldSource(ClipSource):
    """``ClipSource`` of the videos whose path can be used; each record has its path's stamp in the column ``c2w``.

    Args:
        videos: all of them; those without a path, or with one that can't be used, become its problems.
        config: what is read.
    """

    config: WorldDataConfig

    def __init__(self, videos: IndexedSource, config: WorldDataConfig):
        notes: list[str] = []
        unequal, unusual = [], {}
        usable: dict[str, str] = {}  # stamps of paths
        for record in videos.records:
            try:
                arrays = _arrays_beside(videos, record, config)
                path = read_path(arrays, record.key, record.size, config)
                lines = check_path(path, record.key, record.size)
                if not check_count(path, record.key, _frames(record)):
                    unequal.append(record.key)
            except BadPicture as error:
                videos.problems.append(Problem(error.name, error.reason))
                notes.append(f"left out: {error}")
                continue
            if lines:
                unusual[record.key] = lines[0]
            usable[record.key] = _stamp(arrays)
        videos.records = [record for record in videos.records if record.key in usable]
        super().__init__(videos, config)
        self._seconds: dict[str, np.ndarray] = {}  # of videos whose frames' times were asked for
        self._lock = threading.Lock()
        stamps = [{POSES: usable[self.cuts[record.key].video.key]} for record in self.records]
        self.records = [
            dataclasses.replace(record, columns={**record.columns, **stamp})
            for record, stamp in zip(self.records, stamps)
        ]
        if unequal:
            notes.append(
                f"{len(unequal)} videos have one pose more or fewer than frames, such as {unequal[0]}: the first pose "
                "is of the first frame"
            )
        if unusual:
            key, line = next(iter(unusual.items()))
            notes.append(f"{len(unusual)} cameras are unusual, such as that of {key}: {line}")
        self.notes = [*notes, *self.notes]

    def seconds_of(self, record: Record) -> Float[np.ndarray, " N"]:
        """Times of all frames of a clip's whole video, which is read once for all of its clips.

        Frames are counted from the video's first, wherever a clip begins: poses are counted so too.

        Raises:
            BadPicture: its frames do not follow one another evenly, so that poses can't be found for them.
        """
        video = self.cuts[record.key].video
        with self._lock:
            seconds = self._seconds.get(video.key)
        if seconds is None:
            with open_clip(self.videos.blob(video), self.config.source_fps) as clip:
                seconds = np.asarray(clip.all_seconds())
            with self._lock:
                self._seconds[video.key] = seconds
                if len(self._seconds) > _VIDEOS_KEPT:
                    del self._seconds[next(iter(self._seconds))]
        if Timing.of(seconds).variable:
            raise BadPicture(video.key, "has a variable frame rate, so that poses can't be found for its frames")
        return seconds

    def path_of(self, record: Record) -> CameraPath:
        """The path of a clip's whole video.

        Raises:
            BadPicture: it can't be read any more.
        """
        video = self.cuts[record.key].video
        return read_path(_arrays_beside(self.videos, video, self.config), video.key, video.size, self.config)


def open_worlds(config: WorldDataConfig, say: Say = print) -> WorldSource:
    """Finds the videos of ``config.path``, their paths and the clips in them, for training; says what it finds.

    Raises:
        FileNotFoundError, UserError: as ``open_clips``; or too many videos without a path that can be used.
    """
    source = WorldSource(open_source(config, say), config)
    for note in source.notes:
        say(f"data: {note}")
    refuse_too_many_bad(source.problems, source.looked_at, config.max_bad_share)
    refuse_no_clips(source)
    say(f"data: {source.describe()}")
    return source


def _arrays_beside(videos: IndexedSource, record: Record, config: WorldDataConfig) -> Mapping[str, np.ndarray]:
    """The arrays of the file that a column names, or of the one of the video's name."""
    named = record.columns.get(config.pose_column)
    if isinstance(named, str) and named.strip():
        return load_arrays(videos.read(record, config.pose_column), named)
    return videos.features(record)


def _frames(record: Record) -> int:
    """Frames of a video, as far as it says."""
    return round(record.video.seconds * record.video.fps)


def _stamp(arrays: Mapping[str, np.ndarray]) -> str:
    """Changes when the path does."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
