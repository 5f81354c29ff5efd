"""What LongSANA's training reads: trajectories of a teacher, and prompts without videos."""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.checks import require


@dataclass(frozen=True)
class TrajectoriesDataConfig:
    """A teacher's sampling trajectories, for ODE initialisation: ``python -m train.make_trajectories`` makes them."""

    path: str | None = None
    """The directory of trajectories, which python -m train.make_trajectories has written."""


@dataclass(frozen=True)
class PromptsDataConfig:
    """Prompts without videos, for self-forcing, where the generator makes the videos itself."""

    path: str | None = None
    """A text file with one prompt per line, or a manifest (jsonl, csv) with captions."""
    clip_frames: int = 81
    """Frames of the videos that the generator makes: 1, 5, 9, ... (4k + 1)."""
    clip_size: tuple[int, int] = (480, 832)
    """Height and width of these videos in pixels."""
    clip_fps: float = 16.0
    """Frames per second of these videos, in previews and of the run's directory."""
    motion_score: int | None = None
    """Appended to the prompts as ' motion score: N.'; 10 in the published recipe. None: prompts stay as they are."""
    real_motion_score: int | None = None
    """Another one for the real score alone, appended to its prompts instead. None: it is told what the generator and
    the fake score are told, as in the published recipe."""
    negative_prompt: str = ""
    """What the real score's unconditional branch is told: what videos should not be. Empty: no text."""
    cache: str | None = None
    """Folder of the encoded prompts; None: beside the run."""

    def __post_init__(self):
        frames, size, fps = self.clip_frames, self.clip_size, self.clip_fps
        near = max(0, frames - 1) // 4 * 4 + 1
        allowed = f"4k + 1 frames; the nearest are {near} and {near + 4}"
        require("data.clip-frames", frames, frames >= 1 and frames % 4 == 1, allowed)
        require("data.clip-size", " ".join(map(str, size)), min(size) >= 1, "a height and a width of 1 px or more")
        require("data.clip-fps", fps, 0 < fps < math.inf, "above 0")
        for name in ("motion_score", "real_motion_score"):
            score = getattr(self, name)
            option = f"data.{name.replace('_', '-')}"
            require(option, score, score is None or 0 <= score <= 1000, "a whole number from 0 to 1000, as 30")
