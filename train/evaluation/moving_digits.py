"""Whether clips show the digit and the motion that were asked for, measured frame by frame.

The digit is found by its centre of mass on the joined canvas, and read by the support vector machine of
``train.evaluation.digits``, which has learnt the real digits cut out in the same way. The direction is that of the
centre's mean shift.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernels.typing import Float, Int
from train.data.digits import load_images
from train.data.video.moving_digits import BLACK, DIRECTIONS

_SIDE = 8  # px of a digit
_CUT = 12  # px of the square around its centre that is read
_FAINT = 0.15  # of 0 (black) to 1 (white): below it there is no ink
_STILL = 0.25  # px per frame: slower is no motion


@dataclass(frozen=True)
class ClipFigures:
    """What was measured.

    Attributes:
        clips: how many.
        recognised: share of all frames that are read as the digit asked for.
        direction: share of clips that move as asked for.
        both: share of clips with the right direction and the digit recognised in most frames.
        recognised_by_digit: as ``recognised``, of each digit's clips.
        direction_by_name: as ``direction``, of each direction's clips.
        recognised_by_frame: as ``recognised``, of each frame's number: whether digits decay with time.
    """

    clips: int
    recognised: float
    direction: float
    both: float
    recognised_by_digit: dict[int, float]
    direction_by_name: dict[str, float]
    recognised_by_frame: tuple[float, ...]


def centres(frames: Float[np.ndarray, "F H W 1"]) -> Float[np.ndarray, "F 2"]:
    """(row, column) of each frame's centre of mass on a canvas whose opposite sides are joined; NaN without any ink.

    Args:
        frames: in [-1, 1], black is -1.
    """
    ink = _ink(frames)
    found = []
    for axis, side in ((1, ink.shape[1]), (2, ink.shape[2])):
        # the direction of the mean of unit vectors, one turn around the canvas
        turns = np.exp(2j * np.pi * np.arange(side) / side)
        mean = ink.sum(axis=3 - axis) @ turns
        place = np.angle(mean) / (2 * np.pi) * side % side
        found.append(np.where(np.abs(mean) > 1e-6, place, np.nan))
    return np.stack(found, -1)


def direction(frames: Float[np.ndarray, "F H W 1"], directions: Sequence[str] = tuple(DIRECTIONS)[:4]) -> str | None:
    """Where the digit of a clip moves: the name that its mean shift per frame is nearest to; None where it stays.

    Args:
        frames: in [-1, 1].
        directions: names to choose from.
    """
    sides = np.asarray(frames.shape[1:3])
    shifts = np.diff(centres(frames), axis=0)
    shifts = (shifts + sides / 2) % sides - sides / 2
    shifts = shifts[np.isfinite(shifts).all(-1)]
    if not len(shifts):
        return None
    mean = shifts.mean(0)
    if np.linalg.norm(mean) < _STILL:
        return None
    units = [np.asarray(DIRECTIONS[name]) / np.linalg.norm(DIRECTIONS[name]) for name in directions]
    return directions[int(np.argmax([unit @ mean for unit in units]))]


def located(frames: Float[np.ndarray, "F H W 1"]) -> Float[np.ndarray, "F 144"]:
    """The digit of each frame, cut out around its centre of mass, in 0 to 16 as scikit-learn's digits are."""
    height, width = frames.shape[1:3]
    places = np.nan_to_num(centres(frames))
    # rounded first, so that a centre half-way between two pixels is cut alike wherever it lies
    offsets = np.floor(np.round(places, 3) + 0.5).astype(int) - _CUT // 2
    values = np.clip((frames[..., 0] - BLACK) * 8.0, 0.0, 16.0)
    cut = np.arange(_CUT)
    inside = (cut[:, None] < height) & (cut[None, :] < width)
    rows = [
        np.where(inside, frame[np.ix_((top + cut) % height, (left + cut) % width)], 0.0)
        for frame, (top, left) in zip(values, offsets)
    ]
    return np.stack(rows).reshape(len(frames), -1)


def recognised_digit(frames: Float[np.ndarray, "F H W 1"]) -> Int[np.ndarray, " F"]:
    """The digit that is read in each frame.

    Args:
        frames: in [-1, 1], of 10 px or more on each side.
    """
    return _reader(frames.shape[1]).predict(located(frames))


@functools.lru_cache(maxsize=4)
def _reader(canvas: int):
    """The support vector machine that ``train.evaluation.digits`` reads with, trained on digits cut out in this way."""
    from sklearn.svm import SVC

    images, labels = load_images(tuple(range(10)))
    still = np.full((len(images), canvas, canvas, 1), BLACK, np.float32)
    still[:, :_SIDE, :_SIDE] = images
    return SVC(gamma=0.001).fit(located(still), labels)


def measure(
    clips: Float[np.ndarray, "S F H W 1"],
    digits: Int[np.ndarray, " S"],
    directions: Sequence[str],
    among: Sequence[str] = tuple(DIRECTIONS)[:4],
) -> ClipFigures:
    """Compares clips with what was asked for.

    Args:
        clips: in [-1, 1].
        digits: asked for.
        directions: asked for.
        among: all directions that there are.
    """
    digits, directions = np.asarray(digits), np.asarray(directions)
    count, frames = clips.shape[:2]
    read = recognised_digit(clips.reshape(count * frames, *clips.shape[2:])).reshape(count, frames)
    right = read == digits[:, None]
    moved = np.asarray([direction(clip, among) == asked for clip, asked in zip(clips, directions)])
    return ClipFigures(
        clips=count,
        recognised=float(right.mean()),
        direction=float(moved.mean()),
        both=float((moved & (right.mean(1) > 0.5)).mean()),
        recognised_by_digit={int(d): float(right[digits == d].mean()) for d in np.unique(digits)},
        direction_by_name={str(name): float(moved[directions == name].mean()) for name in np.unique(directions)},
        recognised_by_frame=tuple(float(share) for share in right.mean(0)),
    )


def describe(figures: ClipFigures) -> list[str]:
    """One line for each figure."""
    by_digit = " ".join(f"{digit}:{share:.0%}" for digit, share in figures.recognised_by_digit.items())
    by_name = " ".join(f"{name}:{share:.0%}" for name, share in figures.direction_by_name.items())
    frames = figures.recognised_by_frame
    return [
        f"clips                              {figures.clips}",
        f"frames with the digit asked for    {figures.recognised:.1%} (first {frames[0]:.0%}, last {frames[-1]:.0%})",
        f"  by digit                         {by_digit}",
        f"clips with the direction asked for {figures.direction:.1%}",
        f"  by direction                     {by_name}",
        f"clips with both                    {figures.both:.1%}",
    ]


def _ink(frames: np.ndarray) -> np.ndarray:
    values = (np.asarray(frames, np.float64)[..., 0] - BLACK) / 2
    return np.where(values > _FAINT, np.clip(values, 0.0, 1.0), 0.0)
