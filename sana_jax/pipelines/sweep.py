"""One number of a model's conditions in steps: the same pictures, with the same noise, for each of its values."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sana_jax.errors import UserError
from sana_jax.images import automatic_enlargement, check_picture_path, enlarge_image, image_grid, save_gif, save_png

if TYPE_CHECKING:
    from PIL import Image

_MOST_VALUES = 1000
_MILLISECONDS = 200


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Which condition takes which values."""

    name: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """Reads ``name=first:last:count``.

        Raises:
            UserError: something else.
        """
        name, _, span = text.partition("=")
        parts = span.split(":")
        try:
            first, last, count = float(parts[0]), float(parts[1]), int(parts[2])
            good = len(parts) == 3 and math.isfinite(first) and math.isfinite(last) and 2 <= count <= _MOST_VALUES
        except (ValueError, IndexError):
            good = False
        if not name or not good:
            raise UserError(
                f"sweep {text!r} is not allowed; allowed is NAME=FIRST:LAST:COUNT with 2 to {_MOST_VALUES} values: "
                "write zoom=0:1:9"
            )
        return cls(name, tuple(float(value) for value in np.linspace(first, last, count)))


def check_sweep(text: str, output: str, conditions: Sequence[str]) -> None:
    """Raises ``UserError`` for a sweep that cannot be read, an output that cannot be written, or two values."""
    sweep = Sweep.parse(text)
    if any(condition.partition("=")[0] == sweep.name for condition in conditions):
        raise UserError(f"--condition {sweep.name}=... would not be used, since --sweep sets it; leave one of them out")
    suffix = pathlib.Path(output).suffix.lower()
    check_picture_path(output, suffix if suffix == ".gif" else ".png")


def parse_condition(text: str) -> tuple[str, Any]:
    """``name=value`` as a name and a number, or else a file's name.

    Raises:
        UserError: no name or no value.
    """
    name, _, value = text.partition("=")
    if not name or not value:
        raise UserError(f"condition {text!r} is not allowed; allowed is NAME=VALUE: write zoom=0.3 or object=a.png")
    try:
        return name, float(value)
    except ValueError:
        return name, value


def draw_sweep(pipeline: Any, sweep: Sweep, prompts: Sequence[str], arguments: Mapping[str, Any]) -> list[Any]:
    """What the pipeline gives for each value, all else, the noise included, being the same.

    Args:
        pipeline: with token encoders.
        sweep: the values.
        prompts: one or several texts.
        arguments: further ones of the call.
    """
    given = pipeline.embed_pictures(arguments.get("conditions") or {})
    return [
        pipeline(list(prompts), **{**arguments, "conditions": {**given, sweep.name: value}}) for value in sweep.values
    ]


def save_sweep(
    path: str | os.PathLike[str],
    sweep: Sweep,
    pictures: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
    *,
    enlarge: int = 0,
    metadata: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes a sweep as a sheet, values from left to right and a row for each picture, or as a film there and back.

    Args:
        path: ending in ``.png`` or ``.gif``.
        sweep: the values.
        pictures: for each value as many as there are labels.
        labels: one for each picture.
        enlarge: as for ``sana_jax.generate``; 0 is automatic.
        metadata: for the text chunks of a PNG, or the comment of a GIF.

    Raises:
        UserError: the file cannot be written.
    """
    path = pathlib.Path(path)
    width, height = pictures[0][0].size
    factor = enlarge or automatic_enlargement(height, width)
    larger = [[enlarge_image(picture, factor) for picture in row] for row in pictures]
    if path.suffix.lower() == ".gif":
        frames = [row[0] if len(row) == 1 else image_grid(row) for row in larger]
        comment = None if metadata is None else "; ".join(f"{key}={metadata[key]}" for key in ("prompt", "sweep"))
        path = save_gif(path, [*frames, *frames[-2:0:-1]], _MILLISECONDS, comment=comment)
        shown = f"a film of {len(frames)} values there and back"
    else:
        cells = [row[index] for index in range(len(labels)) for row in larger]
        values = [f"{sweep.name}={value:.3g}" for value in sweep.values]
        save_png(path, image_grid(cells, len(values), values * len(labels)), metadata=metadata)
        shown = f"a sheet of {len(values)} values"
        shown += f" in {len(labels)} rows: {', '.join(map(repr, labels))}" if len(labels) > 1 else ""
    print(f"picture: {path}, {shown}")
    return path
