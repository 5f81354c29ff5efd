"""Which parts of a video are clips, and which of its frames a moment shows: functions of numbers alone.

Time is counted from the first frame. At ``fps`` frames per second, frame i of a resampled video shows the moment i/fps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Of a frame's own duration: how much later than a moment a frame may begin and still be the one that shows it. Just
# below a half, which is the nearest frame where frames come regularly, whatever their times were rounded to.
_LATE = 0.45
# Part of a cache's identity: changes when other frames are taken.
SAMPLING = f"the frame that is shown, or begins {_LATE} of a frame later"
# Gaps between frames that differ by more than this share of the usual one are no rounding.
_REGULAR = 0.1


class Timing(NamedTuple):
    """How a video's frames lie in time.

    Attributes:
        frames: how many.
        shortest: seconds between two frames.
        longest: likewise.
        usual: the median.
    """

    frames: int
    shortest: float
    longest: float
    usual: float

    @property
    def variable(self) -> bool:
        """Whether the frame rate is variable."""
        margin = max(_REGULAR * self.usual, 0.0021)  # times in whole milliseconds differ by up to two
        return self.longest - self.shortest > margin

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        """The timing of frames that are shown at these times."""
        gaps = np.diff(np.asarray(seconds, np.float64))
        if not len(gaps):
            return Timing(len(seconds), 0.0, 0.0, 0.0)
        return Timing(len(seconds), float(gaps.min()), float(gaps.max()), float(np.median(gaps)))


def resampled_count(seconds: float, fps: float) -> int:
    """How many frames a video of this length has at ``fps``; the last is shown for half of its time or more."""
    return max(1, int(seconds * fps + 0.5))


def tolerance(frame_seconds: float, fps: float) -> float:
    """How much later than a moment the frame that shows it may begin, in seconds.

    Args:
        frame_seconds: how long a frame of the video is usually shown.
        fps: of the resampled video.
    """
    return _LATE * min(frame_seconds, 1.0 / fps)


def window_starts(count: int, frames: int, stride: int | None = None, most: int | None = None) -> tuple[int, ...]:
    """The first frames of a video's clips.

    Args:
        count: frames of the resampled video.
        frames: frames of a clip.
        stride: from one start to the next; None: ``frames``.
        most: at most so many clips, spread evenly from the beginning to the end; a single one lies in the middle.

    Returns:
        None where the video is shorter than a clip.
    """
    if count < frames:
        return ()
    last = count - frames
    number = last // (frames if stride is None else stride) + 1
    if most is None or most >= number:
        return tuple(range(0, last + 1, frames if stride is None else stride))
    if most == 1:
        return (last // 2,)
    return tuple(round(last * place / (most - 1)) for place in range(most))


def window_key(key: str, start: int) -> str:
    """The name of a clip: its video's and its first frame."""
    return f"{key}@{start:06d}"
