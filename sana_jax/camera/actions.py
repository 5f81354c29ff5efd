"""Action strings: which keys are held for how many frames, and what keys mean.

``"w-80,dw-40,none-8"`` holds w for 80 frames, d and w together for 40, and nothing for 8. What a key does differs
between revisions of SANA-WM, so it is part of a named scheme: the same string is another path under another scheme.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping

from sana_jax.errors import UserError

# A motion is (forward, right, yaw, pitch) per frame; yaw is positive to the right, pitch upwards.
MOTION_AXES = ("forward", "right", "yaw", "pitch")
_MOTIONS = {
    "forward": (0, 1),
    "back": (0, -1),
    "right": (1, 1),
    "left": (1, -1),
    "yaw right": (2, 1),
    "yaw left": (2, -1),
    "pitch up": (3, 1),
    "pitch down": (3, -1),
}
_NO_KEYS = "none"
_MOST_FRAMES = 100_000  # of one action; the longest video that SANA-WM can make has 8185
_SHOWN = 60  # characters of a string in a message
_EXAMPLE = "w-80,dw-40,none-8"


def _require(name: str, value: float, *, low: float, high: float = math.inf, open_low: bool = False) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    fits = number and math.isfinite(value) and low <= value <= high
    if not fits or (open_low and value == low):
        upper = "" if math.isinf(high) else f" to {high:g}"
        raise UserError(
            f"{name} {value} is not allowed; choose a number {'above' if open_low else 'from'} {low:g}{upper}"
        )


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """First-order smoothing of speeds: per frame, the share 1 − exp(−1 / (frame_rate·time)) of the way to the wanted.

    A frame in which a key is newly held takes all wanted speeds at once.

    Attributes:
        frame_rate: frames per second.
        press_time: seconds, of an axis that is to move.
        release_time: seconds, of an axis that is to come to rest.
    """

    frame_rate: float = 16.0
    press_time: float = 0.45
    release_time: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _require(field.name, getattr(self, field.name), low=0.0, open_low=True)

    def share(self, moves: bool) -> float:
        """The share of the way to the wanted speed that one frame goes."""
        return 1.0 - math.exp(-1.0 / (self.frame_rate * (self.press_time if moves else self.release_time)))


@dataclasses.dataclass(frozen=True)
class ActionScheme:
    """What keys mean and how fast they move.

    Attributes:
        name: such as ``v1``.
        source: where the scheme is from, in words.
        keys: key -> motion, one of forward, back, right, left, yaw right, yaw left, pitch up, pitch down.
        translation_speed: units per frame of one key.
        rotation_speed: degrees per frame of one key.
        pitch_limit: degrees; the camera looks no further up or down. From 0 to below 90.
        clamps_pitch: whether the step that would pass the limit goes up to it (True) or is left out (False).
        smoothing: of the speeds; None changes them at once.
        heading_epsilon: is added to the length of the horizontal axes when they are normalised.

    Raises:
        UserError: a number that is not allowed.
    """

    name: str
    source: str
    keys: Mapping[str, str]
    translation_speed: float
    rotation_speed: float
    pitch_limit: float
    clamps_pitch: bool
    smoothing: Smoothing | None
    heading_epsilon: float = 0.0

    def __post_init__(self) -> None:
        _require("translation_speed", self.translation_speed, low=0.0)
        _require("rotation_speed", self.rotation_speed, low=0.0, high=90.0)
        _require("pitch_limit", self.pitch_limit, low=0.0, high=89.0)

    def axis_and_sign(self, key: str) -> tuple[int, int]:
        """Which of ``MOTION_AXES`` a key moves, and in which direction."""
        return _MOTIONS[self.keys[key]]

    def describe_keys(self) -> str:
        """The keys in words: ``w forward, s back, ...``."""
        return ", ".join(f"{key} {motion}" for key, motion in self.keys.items())


SCHEMES: Mapping[str, ActionScheme] = {
    "v1": ActionScheme(
        name="v1",
        source="diffusers 0.42.1",
        keys={
            "w": "forward",
            "s": "back",
            "a": "left",
            "d": "right",
            "j": "yaw left",
            "l": "yaw right",
            "i": "pitch up",
            "k": "pitch down",
        },
        translation_speed=0.05,
        rotation_speed=1.2,
        pitch_limit=85.0,
        clamps_pitch=False,
        smoothing=None,
    ),
    "v2": ActionScheme(
        name="v2",
        source="NVlabs/Sana since the streaming release",
        keys={
            "w": "forward",
            "s": "back",
            "a": "yaw left",
            "d": "yaw right",
            "j": "left",
            "l": "right",
            "i": "pitch up",
            "k": "pitch down",
        },
        translation_speed=0.025,
        rotation_speed=0.6,
        pitch_limit=60.0,
        clamps_pitch=True,
        smoothing=Smoothing(),
        heading_epsilon=1e-6,
    ),
}


def find_scheme(
    scheme: str | ActionScheme,
    *,
    translation_speed: float | None = None,
    rotation_speed: float | None = None,
    pitch_limit: float | None = None,
    smooth: bool | None = None,
) -> ActionScheme:
    """The scheme of a name, with other speeds where they are given.

    Args:
        scheme: ``v1``, ``v2``, or a scheme, which is taken as it is.
        translation_speed: units per frame.
        rotation_speed: degrees per frame.
        pitch_limit: degrees.
        smooth: False takes smoothing away, True gives it to a scheme that has none.

    Raises:
        UserError: an unknown name, or a number that is not allowed.
    """
    if not isinstance(scheme, ActionScheme):
        if not isinstance(scheme, str) or scheme not in SCHEMES:
            known = ", ".join(f"{name} ({known.source})" for name, known in SCHEMES.items())
            raise UserError(f"scheme {scheme!r} is not known; choose one of {known}")
        scheme = SCHEMES[scheme]
    given = {"translation_speed": translation_speed, "rotation_speed": rotation_speed, "pitch_limit": pitch_limit}
    changes: dict = {name: value for name, value in given.items() if value is not None}
    if smooth is not None:
        changes["smoothing"] = (scheme.smoothing or Smoothing()) if smooth else None
    return dataclasses.replace(scheme, **changes) if changes else scheme


def parse_action(
    action: str, scheme: str | ActionScheme = "v1", *, num_frames: int | None = None
) -> tuple[frozenset[str], ...]:
    """The keys that an action string holds in every frame.

    Segments are separated by commas, each ``<keys>-<frames>``; keys are letters of the scheme in any order and case, or
    the word ``none``. White space means nothing, and the full-width comma is a comma.

    Args:
        action: such as ``"w-80,dw-40,none-8"``.
        scheme: which keys there are.
        num_frames: F, the frames of the video, which the string must make. Frame 0 is the image, before any motion,
            so the string holds keys for F − 1 frames. None takes any.

    Returns:
        Lower-case keys that are held on the way to frame 1, 2, ..., F − 1.

    Raises:
        UserError: anything else, in one line.
    """
    scheme = find_scheme(scheme)
    held: list[frozenset[str]] = []
    for keys, count in _segments(action, scheme):
        if len(held) + count > _MOST_FRAMES:
            raise UserError(
                f"action {_shown(action)} is longer than {_MOST_FRAMES} frames, the most that is allowed; write "
                "smaller numbers"
            )
        held += [keys] * count
    if num_frames is not None and len(held) + 1 != num_frames:
        frames, extra = len(held) + 1, len(held) + 1 - num_frames
        mend = f"shorten it by {extra}" if extra > 0 else f"add ,{_NO_KEYS}-{-extra} to hold the camera at the end"
        raise UserError(
            f"action {_shown(action)} makes {frames} frames (the image, and {len(held)} of motion), not the "
            f"{num_frames} that are asked for: {mend}, or ask for {frames} frames"
        )
    return tuple(held)


def _segments(action: str, scheme: ActionScheme) -> list[tuple[frozenset[str], int]]:
    if not isinstance(action, str):
        raise UserError(f"action {_shown(action)} is not allowed; write a text such as {_EXAMPLE}")
    compact = "".join(action.replace("，", ",").split())
    if not compact:
        raise UserError(f"action {_shown(action)} is empty; write segments of keys and frames such as {_EXAMPLE}")
    parts = compact.split(",")
    segments = []
    for number, part in enumerate(parts, start=1):
        where = f"action {_shown(action)}, segment {number}"
        if not part:
            comma = "the comma at the end" if number == len(parts) else "one comma"
            raise UserError(f"{where} is empty; leave out {comma}, or write keys and frames such as {_EXAMPLE}")
        segments.append((_keys(part, where, scheme), _count(part, where)))
    return segments


def _keys(part: str, where: str, scheme: ActionScheme) -> frozenset[str]:
    keys, hyphen, count = part.rpartition("-")
    where = f"{where} {_shown(part)}"
    if not hyphen:
        raise UserError(f"{where} has no hyphen; write keys, a hyphen and a number of frames, such as {_EXAMPLE}")
    keys = keys.lower()
    if keys == _NO_KEYS:
        return frozenset()
    if not keys:
        raise UserError(f"{where} has no keys; write {_NO_KEYS}-{count or 'N'} to hold the camera still")
    if keys.endswith("-"):
        raise UserError(f"{where} has a negative number of frames, -{count}; write a whole number from 1 on")
    unknown = sorted(set(keys) - set(scheme.keys))
    if unknown:
        shown = ", ".join(repr(key) for key in unknown[:8])
        raise UserError(
            f"{where} has keys that are not known, {shown}; scheme {scheme.name} has {scheme.describe_keys()}, and the "
            f"word {_NO_KEYS}"
        )
    return frozenset(keys)


def _count(part: str, where: str) -> int:
    count = part.rpartition("-")[2]
    where = f"{where} {_shown(part)}"
    if not count:
        raise UserError(f"{where} has no number of frames; write one after the hyphen, such as {part[:_SHOWN]}8")
    # isdecimal, not isdigit: superscript digits are no number; and int() refuses thousands of digits
    frames = (int(count) if len(count) < 19 else _MOST_FRAMES + 1) if count.isdecimal() else 0
    if frames < 1:
        raise UserError(f"{where} cannot last {count[:_SHOWN]!r} frames; write a whole number from 1 on")
    return frames


def _shown(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 4]}...{shown[-1]}"
