"""The part of ``train.precompute`` that is about clips: reading them out of videos, and what is said of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from train.data.decoding import BadPicture
from train.data.records import Problem, Record
from train.data.source import refuse_too_many_bad
from train.data.video.check_strip import draw_check_strip
from train.data.video.source import ClipSource
from train.precompute_pictures import Item, PictureRun

_LISTED = 3  # names in a line


@dataclass
class ClipRun(PictureRun):
    """One pass over videos: every clip is a sample, and what is left out of a video is said once."""

    many: ClassVar[str] = "clips"

    source: ClipSource
    lost: int = 0
    variable: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def file_of(self, record: Record) -> str:
        """The key of a clip's video."""
        return self.source.cuts[record.key].video.key

    def prepare(self, items: Sequence[Item]) -> list[dict[str, np.ndarray] | BadPicture]:
        """Pixels of some clips of one video, each in some variants."""
        records = list({item.record.key: item.record for item in items}.values())
        views = list(dict.fromkeys(item.view for item in items))
        video = self.file_of(records[0])
        try:
            read = self.source.read_clips(records, views, self.model.autoencoder.image_channels)
        except BadPicture as error:
            return [error] * len(items)
        if read.variable:
            with self.lock:
                self.variable.add(video)
        damage = BadPicture(video, f"{read.problem}; the clips before that are used")
        cuts = self.source.cuts
        clips = [read.clips.get((cuts[item.record.key].start, item.view)) for item in items]
        return [damage if clip is None else {"latents": clip} for clip in clips]

    def leave_out(self, key: str, reason: str) -> None:
        """Names a video whose clips can't be used, once, and stops if there are too many of them."""
        self.lost += 1
        video = self.source.cuts[key].video.key
        if any(problem.name == video for problem in self.problems):
            return
        reason = reason.removeprefix(f"{video} ")
        self.problems.append(Problem(video, reason))
        self.say(f"left out: {video} {reason}")
        every = [*self.source.problems, *self.problems]
        refuse_too_many_bad(every, self.source.looked_at, self.config.data.max_bad_share)

    def say_left_out(self) -> None:
        """How many clips can't be used, and which videos have a variable frame rate."""
        if self.problems:
            self.say(f"left out: {self.lost} clips of {len(self.problems)} videos, each named above")
        if self.variable:
            names = sorted(self.variable)
            more = ", ..." if len(names) > _LISTED else ""
            self.say(
                f"{len(names)} videos have a variable frame rate; frames are taken by their times: "
                f"{', '.join(names[:_LISTED])}{more}"
            )

    def draw_check(self, writing: AbstractContextManager) -> None:
        """Draws frames of some clips, and what becomes of them."""
        draw_check_strip(self.cache.directory, self.source, self.encoder, self.say, writing)
