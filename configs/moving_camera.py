"""Clips of a photograph on a plane, seen by a camera that moves: the true video of every path can be computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.checks import require
from sana_jax.errors import UserError

PHOTOGRAPHS = ("china", "flower", "astronaut", "chelsea", "coffee")
_WIDEST = 85.0  # degrees from the plane's normal at which a ray of the last frame may still meet it


@dataclass(frozen=True)
class MovingCameraDataConfig:
    """Photographs that ship with scikit-learn and scikit-image, each on a plane one unit in front of the first camera,
    which moves as a random action string says: clips whose motion can be measured."""

    photographs: tuple[str, ...] = PHOTOGRAPHS
    """Which photographs: china, flower (scikit-learn), astronaut, chelsea, coffee (scikit-image)."""
    caption: str = "a photograph"
    """The caption of every clip; what moves is the camera alone."""
    embedding_dim: int = 16
    """Size of a word's vector; the transformer's caption_channels."""
    max_words: int = 3
    """Words that a prompt may have."""
    frames: int = 5
    """Frames of a clip, the given first one included."""
    canvas: int = 12
    """Pixels along each side of a frame."""
    field_of_view: float = 100.0
    """Degrees that a frame spans across."""
    translation_speed: float = 0.15
    """Units per frame of one key; the photograph is one unit in front of the first camera."""
    rotation_speed: float = 4.0
    """Degrees per frame of one key."""
    held_out: float = 0.1
    """Share of the action strings that no training clip has; clips of them are for measuring."""
    seed: int = 0
    """Of the split, and of what part of a photograph a clip shows."""

    def __post_init__(self):
        if not self.photographs or (unknown := sorted(set(self.photographs) - set(PHOTOGRAPHS))):
            wrong = ", ".join(unknown) if self.photographs else "(none)"
            raise UserError(f"--data.photographs {wrong}: choose one or more of {', '.join(PHOTOGRAPHS)}")
        words = len(self.caption.split())
        require("data.caption", repr(self.caption), 1 <= words <= self.max_words, f"one to {self.max_words} words")
        require("data.frames", self.frames, self.frames >= 2, "2 or more, since a single frame does not move")
        require("data.canvas", self.canvas, self.canvas >= 8, "8 or more")
        require("data.field-of-view", self.field_of_view, 25 <= self.field_of_view <= 120, "25 to 120 degrees")
        furthest = (self.frames - 1) * self.translation_speed
        moves = self.translation_speed > 0 and furthest < 1
        require("data.translation-speed", self.translation_speed, moves, f"above 0 and below {1 / (self.frames - 1):g}")
        require("data.rotation-speed", self.rotation_speed, self._sees_the_plane(), self._rotation_allowed())
        require(
            "data.held-out",
            self.held_out,
            0 < self.held_out < 1,
            "above 0 and below 1, for that is what is measured on",
        )
        require("data.seed", self.seed, self.seed >= 0, "0 or more")

    def _sees_the_plane(self) -> bool:
        """Whether the outermost ray of a camera that has turned all the time, sideways and upwards, meets the plane."""
        turned = math.radians((self.frames - 1) * self.rotation_speed)
        edge = math.tan(math.radians(self.field_of_view) / 2)
        ahead = math.cos(turned) * (math.cos(turned) - math.sin(turned) * edge) - math.sin(turned) * edge
        length = math.sqrt(1 + 2 * edge**2)
        return self.rotation_speed > 0 and ahead / length > math.cos(math.radians(_WIDEST))

    def _rotation_allowed(self) -> str:
        return (
            f"more than 0 and so few degrees that a camera that turns in all {self.frames - 1} steps, sideways and "
            "upwards at once, has the photograph's plane before it in all of its view"
        )
