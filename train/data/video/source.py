"""The clips of a data set: which parts of its videos they are, and how they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from configs.data import VideoDataConfig
from sana_jax.errors import UserError
from train.data.conditions import View
from train.data.records import Record, Say
from train.data.source import IndexedSource, open_source, refuse_no_pictures
from train.data.video.clips import ClipsRead, read_clips
from train.data.video.windows import resampled_count, window_key, window_starts

_LISTED = 3  # names in a line


class Cut(NamedTuple):
    """Where a clip lies.

    Attributes:
        video: the record of its video.
        start: its first frame at ``clip_fps``.
    """

    video: Record
    start: int


class ClipSource:
    """Clips as records, each with the captions and the columns of its video.

    A record's key is the video's with the clip's first frame, as in ``a/b@000081``. Clips of one video are of one
    group, so that they never fall on both sides of a split.

    Attributes:
        videos: the source of the videos.
        records: of the clips.
        cuts: by a clip's key, where it lies.
        short: keys of the videos that are shorter than a clip.
        notes: lines about what is left out, and what is done to the videos.
    """

    def __init__(self, videos: IndexedSource, config: VideoDataConfig):
        self.videos, self.config = videos, config
        self.records: list[Record] = []
        self.cuts: dict[str, Cut] = {}
        self.short: list[str] = []
        self.notes: list[str] = []
        self._frames = self._covered = 0  # of the videos that are long enough, at clip_fps
        for video in videos.records:
            count = resampled_count(video.video.seconds, config.clip_fps)
            starts = window_starts(count, config.clip_frames, config.clip_stride, config.clips_per_video)
            if not starts:
                self.short.append(video.key)
                self.notes.append(
                    f"left out: {video.key} is shorter than a clip: {count} frames at {config.clip_fps:g} per second "
                    f"({video.video.seconds:.2f} s), {config.clip_frames} are needed"
                )
            if starts:
                self._frames += count
                ends = (*starts[1:], count)
                self._covered += sum(min(config.clip_frames, end - start) for start, end in zip(starts, ends))
            for start in starts:
                group = f"video {video.key}" if video.group is None else video.group
                record = dataclasses.replace(video, key=window_key(video.key, start), group=group)
                self.records.append(record)
                self.cuts[record.key] = Cut(video, start)
        if self.short:
            self.notes.append(f"{len(self.short)} of {len(videos)} videos are shorter than a clip and left out")
        self.notes += self._rates()

    def _rates(self) -> list[str]:
        """What becomes of videos of other rates."""
        short, fps = set(self.short), self.config.clip_fps
        rates = {video.key: video.video.fps for video in self.videos.records if video.key not in short}
        faster = [rate for rate in rates.values() if rate > fps * 1.001]
        slower = {key: rate for key, rate in rates.items() if rate < fps * 0.999}
        lines = []
        if faster:
            lines.append(
                f"{len(faster)} videos have up to {max(faster):.4g} frames per second, of which {fps:g} are taken"
            )
        if slower:
            names = ", ".join(list(slower)[:_LISTED]) + (", ..." if len(slower) > _LISTED else "")
            lines.append(
                f"{len(slower)} videos have as few as {min(slower.values()):.4g} frames per second, fewer than "
                f"--data.clip-fps {fps:g}: their frames are repeated: {names}"
            )
        return lines

    def __len__(self) -> int:
        """Clips."""
        return len(self.records)

    @property
    def name(self) -> str:
        """The path, as it was given."""
        return self.videos.name

    @property
    def problems(self) -> list:
        """Videos that can't be used."""
        return self.videos.problems

    @property
    def looked_at(self) -> int:
        """Files that could be videos, the unusable ones included."""
        return self.videos.looked_at

    def read_clips(self, records: Sequence[Record], views: Sequence[View], channels: int = 3) -> ClipsRead:
        """Decodes clips of one video.

        Args:
            records: clips of one video.
            views: each clip is given in each of them.
            channels: 1 for gray, 3 for RGB.

        Returns:
            With clips by (first frame, view).

        Raises:
            BadPicture: the video can't be used.
        """
        config, cuts = self.config, [self.cuts[record.key] for record in records]
        if len({cut.video.key for cut in cuts}) != 1:
            raise ValueError("read_clips takes clips of one video")
        return read_clips(
            self.videos.blob(cuts[0].video),
            [cut.start for cut in cuts],
            views,
            frames=config.clip_frames,
            fps=config.clip_fps,
            source_fps=config.source_fps,
            channels=channels,
        )

    @property
    def coverage(self) -> str:
        """How much of the videos is in a clip, in words; the rest is never trained on."""
        minutes = self._frames / self.config.clip_fps / 60
        return f"which hold {self._covered / max(self._frames, 1):.0%} of their {minutes:.1f} minutes"

    def describe(self) -> str:
        """One line for the start of a run."""
        config, used = self.config, len(self.videos) - len(self.short)
        return (
            f"{len(self):,} clips of {config.clip_frames} frames at {config.clip_fps:g} per second "
            f"({config.clip_frames / config.clip_fps:.2f} s) in {used:,} videos, {self.coverage}"
        )


def open_clips(config: VideoDataConfig, say: Say = print) -> ClipSource:
    """Finds the videos of ``config.path`` and the clips in them, for training; says what it finds.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UserError: no videos, missing captions where they are needed, too many unusable files, or no clip at all.
    """
    source = ClipSource(open_source(config, say), config)
    for note in source.notes:
        say(f"data: {note}")
    refuse_no_clips(source)
    say(f"data: {source.describe()}")
    return source


def refuse_no_clips(source: ClipSource) -> None:
    """Stops where there is no video, or every one is shorter than a clip.

    Raises:
        UserError: no clip.
    """
    if source.records:
        return
    refuse_no_pictures(source.videos)
    config, videos = source.config, source.videos.records
    longest = max(resampled_count(video.video.seconds, config.clip_fps) for video in videos)
    fitting = (longest - 1) // 4 * 4 + 1
    raise UserError(
        f"--data.clip-frames {config.clip_frames} at --data.clip-fps {config.clip_fps:g}: all {len(videos)} videos of "
        f"{source.name} are shorter; the longest has {longest} frames at that rate: choose {fitting} frames or fewer "
        "(4k + 1), or fewer per second"
    )
