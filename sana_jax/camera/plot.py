"""A small picture of a trajectory: seen from above and from the side, with where the camera looks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sana_jax.camera.trajectories import check_poses, summarize_trajectory

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image, ImageDraw

    from kernels.typing import Float

_DRAWN_LARGER = 2  # everything is drawn so much larger and then made smaller, for smooth edges
_PANEL = (430, 360)  # px, of the area inside a panel's axes
_MARGIN_LEFT, _MARGIN_RIGHT, _MARGIN_TOP, _MARGIN_BOTTOM, _HEADER = 56, 14, 34, 40, 52
_CAMERA, _TURNING_CAMERA = 30.0, 110.0  # px, how long a camera is drawn, and one that only turns
_CAMERA_SLOPE = 0.45  # half its width where it opens, over its length
_MOST_CAMERAS, _MOST_TURNING_CAMERAS, _MOST_LINES = 14, 6, 2000
_SMALLEST_SPAN = 0.5  # units that a panel shows at least, such as where the camera only turns
_INK, _FAINT, _GRID = (40, 44, 52), (110, 116, 126), (230, 232, 236)
_COLOURS = np.array([(30, 98, 190), (150, 70, 160), (228, 108, 20)], float)  # of the first frame, the middle, the last
_START, _END = (22, 140, 70), (196, 36, 36)


@dataclasses.dataclass(frozen=True)
class _View:
    """How the world becomes a panel: two rows that give the panel's axes, and where the camera opens its mouth."""

    title: str
    across: tuple[str, tuple[float, float, float]]
    up: tuple[str, tuple[float, float, float]]
    opens: int  # the camera's axis along which it is drawn wide

    def project(self, points: np.ndarray) -> np.ndarray:
        return points @ np.array([self.across[1], self.up[1]]).T


_VIEWS = (
    _View("from above", ("x, right", (1, 0, 0)), ("z, forward", (0, 0, 1)), opens=0),
    _View("from the side", ("z, forward", (0, 0, 1)), ("height", (0, -1, 0)), opens=1),
)


def draw_trajectory(
    c2w: Float[np.ndarray, "F 4 4"], title: str = "", say: Callable[[str], None] = print
) -> Image.Image:
    """Draws a trajectory from above and from the side, both in one scale, in units of the poses.

    Blue cameras are early, orange ones late; each opens towards where it looks. Start and end are marked.

    Args:
        c2w: camera-to-world matrices with OpenCV's axes.
        title: the line on top; the trajectory's numbers come below it.
        say: prints a line, see ``check_poses``.

    Raises:
        UserError: poses that are not (F, 4, 4), finite and rigid.
    """
    from PIL import Image, ImageDraw

    poses = check_poses(c2w, say=say).astype(np.float64)
    width = 2 * (_MARGIN_LEFT + _PANEL[0] + _MARGIN_RIGHT)
    height = _HEADER + _MARGIN_TOP + _PANEL[1] + _MARGIN_BOTTOM
    large = (width * _DRAWN_LARGER, height * _DRAWN_LARGER)
    sheet = Image.new("RGB", large, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    _text(draw, (14, 10), _fitted(draw, title or "camera trajectory", width - 28, 15), 15, _INK)
    _text(draw, (14, 31), summarize_trajectory(poses).describe(), 12, _FAINT)
    pixels_per_unit = min(_scale(view.project(poses[:, :3, 3])) for view in _VIEWS)
    for index, view in enumerate(_VIEWS):
        left = index * (width // 2) + _MARGIN_LEFT
        _draw_panel(draw, view, poses, pixels_per_unit, (left, _HEADER + _MARGIN_TOP))
    return sheet.reduce(_DRAWN_LARGER)


def _scale(points: np.ndarray) -> float:
    """Pixels per unit at which a path fits a panel with room for the cameras around it."""
    span = np.maximum(np.ptp(points, axis=0), _SMALLEST_SPAN)
    return float(((np.array(_PANEL) - 3 * _CAMERA) / span).min())


def _draw_panel(
    draw: ImageDraw.ImageDraw, view: _View, poses: np.ndarray, pixels_per_unit: float, corner: tuple[int, int]
) -> None:
    path = view.project(poses[:, :3, 3])
    middle = (path.min(axis=0) + path.max(axis=0)) / 2
    centre = np.array(corner) + np.array(_PANEL) / 2

    def place(points: np.ndarray) -> np.ndarray:
        return centre + (points - middle) * pixels_per_unit * np.array([1, -1])

    _draw_axes(draw, view, middle, pixels_per_unit, corner)
    moves = np.ptp(path, axis=0).max() * pixels_per_unit > 2 * _CAMERA
    length = (_CAMERA if moves else _TURNING_CAMERA) / pixels_per_unit
    shown = _shown_frames(len(poses), _MOST_CAMERAS if moves else _MOST_TURNING_CAMERAS)
    for frame in shown:
        apex, colour = poses[frame, :3, 3], _colour(frame, len(poses))
        forward, sideways = poses[frame, :3, 2], poses[frame, :3, view.opens]
        corners = np.stack([apex, apex + length * (forward + _CAMERA_SLOPE * sideways)])
        corners = np.concatenate([corners, apex[None] + length * (forward - _CAMERA_SLOPE * sideways)])
        _polygon(draw, place(view.project(corners)), colour)
    placed = place(path)
    for before, frame in itertools.pairwise(_shown_frames(len(poses), _MOST_LINES)):
        _line(draw, placed[[before, frame]], _colour(frame, len(poses)), 2.0)
    for frame in shown:
        _disc(draw, placed[frame], 2.6, _colour(frame, len(poses)))
    together = np.abs(placed[0] - placed[-1]).max() < 16
    marks = [(-1, "start, end", _END)] if together else [(0, "start", _START), (-1, "end", _END)]
    _disc(draw, placed[0], 5.0, _START)
    for frame, name, colour in marks:
        _disc(draw, placed[frame], 5.0, colour)
        looks = view.project(poses[frame, :3, 2]) * [1, -1]
        behind = -looks / max(np.abs(looks).max(), 1e-6) if np.abs(looks).max() > 0.2 else np.array([0.0, 1.0])
        _text(draw, placed[frame] + behind * [13 + 3.2 * len(name), 15], name, 12, colour, anchor="mm", halo=True)


def _draw_axes(
    draw: ImageDraw.ImageDraw, view: _View, middle: np.ndarray, pixels_per_unit: float, corner: tuple[int, int]
) -> None:
    (left, top), (width, height) = corner, _PANEL
    step = _tick_step(pixels_per_unit)
    low = middle - np.array(_PANEL) / 2 / pixels_per_unit
    high = middle + np.array(_PANEL) / 2 / pixels_per_unit
    for tick in _ticks(low[0], high[0], step):
        column = left + (tick - low[0]) * pixels_per_unit
        _line(draw, [(column, top), (column, top + height)], _GRID, 1.0)
        _text(draw, (column, top + height + 5), _number(tick, step), 11, _FAINT, anchor="ma")
    for tick in _ticks(low[1], high[1], step):
        row = top + height - (tick - low[1]) * pixels_per_unit
        _line(draw, [(left, row), (left + width, row)], _GRID, 1.0)
        _text(draw, (left - 6, row), _number(tick, step), 11, _FAINT, anchor="rm")
    frame = [(left, top), (left + width, top), (left + width, top + height), (left, top + height), (left, top)]
    _line(draw, frame, _FAINT, 1.0)
    _text(draw, (left + width / 2, top - 24), view.title, 13, _INK, anchor="ma")
    _text(draw, (left - 40, top - 22), f"{view.up[0]} (units)", 11, _FAINT)
    _text(draw, (left + width, top + height + 22), f"{view.across[0]} (units)", 11, _FAINT, anchor="ra")


def _shown_frames(frames: int, most: int) -> list[int]:
    """The first and the last frame, and some between them at equal distances."""
    return sorted({round(frame) for frame in np.linspace(0, frames - 1, min(frames, most))})


def _colour(frame: int, frames: int) -> tuple[int, int, int]:
    progress = 2 * frame / max(frames - 1, 1)
    red, green, blue = (round(float(np.interp(progress, range(3), channel))) for channel in _COLOURS.T)
    return red, green, blue


def _tick_step(pixels_per_unit: float) -> float:
    """1, 2 or 5 times a power of ten, so that ticks are 55 pixels apart or a little more."""
    wanted = 55 / pixels_per_unit
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted)


def _ticks(low: float, high: float, step: float) -> list[float]:
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _number(value: float, step: float) -> str:
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value + 0.0:.{digits}f}"


def _polygon(draw: ImageDraw.ImageDraw, points: np.ndarray, colour: tuple[int, int, int]) -> None:
    pale = tuple(round(255 - (255 - channel) * 0.22) for channel in colour)
    draw.polygon([tuple(point * _DRAWN_LARGER) for point in points], fill=pale)
    _line(draw, [*points, points[0]], colour, 1.0)


def _line(draw: ImageDraw.ImageDraw, points: Any, colour: tuple[int, int, int], width: float) -> None:
    placed = [tuple(np.asarray(point, float) * _DRAWN_LARGER) for point in points]
    draw.line(placed, fill=colour, width=round(width * _DRAWN_LARGER), joint="curve")


def _disc(draw: ImageDraw.ImageDraw, point: np.ndarray, radius: float, colour: tuple[int, int, int]) -> None:
    (column, row), radius = np.asarray(point) * _DRAWN_LARGER, radius * _DRAWN_LARGER
    draw.ellipse((column - radius, row - radius, column + radius, row + radius), fill=colour)


def _text(
    draw: ImageDraw.ImageDraw,
    point: Any,
    text: str,
    size: int,
    colour: tuple[int, int, int],
    anchor: str = "la",
    halo: bool = False,
) -> None:
    place = tuple(np.asarray(point, float) * _DRAWN_LARGER)
    around = {"stroke_width": 2 * _DRAWN_LARGER, "stroke_fill": (255, 255, 255)} if halo else {}
    draw.text(place, text, fill=colour, font=_font(size), anchor=anchor, **around)


def _fitted(draw: ImageDraw.ImageDraw, text: str, width: float, size: int) -> str:
    """The text, or as much of its beginning as fits the width, and dots."""
    font, limit = _font(size), width * _DRAWN_LARGER
    if draw.textlength(text, font=font) <= limit:
        return text
    while text and draw.textlength(f"{text}...", font=font) > limit:
        text = text[:-1]
    return f"{text}..."


@functools.cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size * _DRAWN_LARGER)
