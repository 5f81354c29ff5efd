"""A picture of measurements over sizes, both on logarithmic axes, with the line of linear growth."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

_LARGER = 2  # drawn so much larger and then made smaller, for smooth edges
_PANEL, _LEFT, _RIGHT, _TOP, _BOTTOM, _HEADER = (380, 300), 70, 20, 34, 48, 40
_INK, _FAINT, _GRID, _MEASURED, _LINEAR = (40, 44, 52), (110, 116, 126), (230, 232, 236), (30, 98, 190), (196, 36, 36)


def draw_growth(panels: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str) -> Image.Image:
    """One panel for each series of (sizes, costs), all above 0: the measurements and a line of slope 1 by the first.

    Raises:
        ValueError: no panel, or numbers that have no logarithm.
    """
    from PIL import Image, ImageDraw

    if not panels or any(not xs or min(*xs, *ys) <= 0 for xs, ys in panels.values()):
        raise ValueError("draw_growth needs one or more series of numbers above 0")
    width = len(panels) * (_LEFT + _PANEL[0] + _RIGHT)
    height = _HEADER + _TOP + _PANEL[1] + _BOTTOM
    sheet = Image.new("RGB", (width * _LARGER, height * _LARGER), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    _text(draw, (14, 12), title, 13, _INK)
    for index, (name, (xs, ys)) in enumerate(panels.items()):
        corner = (index * (width // len(panels)) + _LEFT, _HEADER + _TOP)
        _draw_panel(draw, name, xs, ys, corner)
    return sheet.reduce(_LARGER)


def _draw_panel(
    draw: ImageDraw.ImageDraw, name: str, xs: Sequence[float], ys: Sequence[float], corner: tuple[int, int]
) -> None:
    left, top = corner
    linear = [ys[0] * x / xs[0] for x in xs]
    spans = [_span(xs), _span([*ys, *linear])]

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = ((math.log2(value) - low) / (high - low) for value, (low, high) in zip((x, y), spans))
        return left + across * _PANEL[0], top + (1 - up) * _PANEL[1]

    for power in range(math.ceil(spans[0][0]), math.floor(spans[0][1]) + 1):
        column, _ = place(2.0**power, 2 ** spans[1][0])
        _line(draw, [(column, top), (column, top + _PANEL[1])], _GRID, 1)
        _text(draw, (column, top + _PANEL[1] + 5), f"{2**power:g}", 11, _FAINT, "ma")
    for power in range(math.ceil(spans[1][0]), math.floor(spans[1][1]) + 1):
        _, row = place(2 ** spans[0][0], 2.0**power)
        _line(draw, [(left, row), (left + _PANEL[0], row)], _GRID, 1)
        _text(draw, (left - 6, row), f"{2.0**power:.3g}", 11, _FAINT, "rm")
    frame = [(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]
    _line(draw, [(left + x * _PANEL[0], top + y * _PANEL[1]) for x, y in frame], _FAINT, 1)
    _line(draw, [place(x, y) for x, y in zip(xs, linear)], _LINEAR, 1.5)
    points = [place(x, y) for x, y in zip(xs, ys)]
    _line(draw, points, _MEASURED, 2)
    for column, row in points:
        box = [(column - 4) * _LARGER, (row - 4) * _LARGER, (column + 4) * _LARGER, (row + 4) * _LARGER]
        draw.ellipse(box, fill=_MEASURED)
    _text(draw, (left, top - 20), name, 12, _INK)
    _text(draw, (left, top + _PANEL[1] + 26), "tokens; blue: measured, red: linear", 11, _FAINT)


def _span(values: Sequence[float]) -> tuple[float, float]:
    logs = [math.log2(value) for value in values]
    return min(logs) - 0.3, max(logs) + 0.3


def _line(draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: Any, width: float) -> None:
    draw.line([(x * _LARGER, y * _LARGER) for x, y in points], fill=colour, width=round(width * _LARGER))


def _text(draw: Any, point: tuple[float, float], text: str, size: int, colour: Any, anchor: str = "la") -> None:
    draw.text((point[0] * _LARGER, point[1] * _LARGER), text, fill=colour, font=_font(size), anchor=anchor)


@functools.cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size * _LARGER)
