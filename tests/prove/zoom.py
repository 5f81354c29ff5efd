"""Zoomed crops of real photographs, as a manifest to train on; and a measure of how far a picture is zoomed in.

The photographs ship with scikit-learn. An object is a place in one of them; its picture at zoom z in [0, 1] shows a
square around that place, whose side shrinks by a factor of four from z = 0 to z = 1.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

LARGEST, SMALLEST = 240, 60  # pixels of the photographs along a crop's side at zoom 0 and 1
THUMBNAIL = 4
_PLACES = {
    "china": ((200, 130), (240, 320), (290, 510)),
    "flower": ((150, 200), (210, 330), (290, 480)),
}  # row and column of the middle


@dataclasses.dataclass(frozen=True)
class Object:
    """A place in a photograph."""

    photograph: str
    row: int
    column: int
    number: int

    @property
    def name(self) -> str:
        """As in ``china0``."""
        return f"{self.photograph}{self.number}"


OBJECTS = tuple(
    Object(photograph, row, column, number)
    for photograph, places in _PLACES.items()
    for number, (row, column) in enumerate(places)
)


@functools.cache
def photograph(name: str) -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(f"{name}.jpg"))


def crop(thing: Object, zoom: float, size: int) -> Image.Image:
    """An object's picture of size x size pixels at a zoom in [0, 1]; sides of crops may end between pixels."""
    half = LARGEST * (SMALLEST / LARGEST) ** zoom / 2
    box = (thing.column - half, thing.row - half, thing.column + half, thing.row + half)
    return photograph(thing.photograph).resize((size, size), Image.Resampling.BICUBIC, box=box)


def thumbnail(thing: Object) -> list[float]:
    """What stands for an image encoder's vector where there is none: the object at zoom 0, tiny, in [-1, 1]."""
    tiny = np.asarray(crop(thing, 0.0, THUMBNAIL), np.float32) / 127.5 - 1
    return [round(float(value), 4) for value in tiny.reshape(-1)]


def write_manifest(
    directory: str | pathlib.Path,
    *,
    size: int = 32,
    zooms: Sequence[float] = tuple(np.linspace(0, 1, 33)),
    objects: Sequence[Object] = OBJECTS,
) -> pathlib.Path:
    """Writes pictures and ``triples.jsonl``; returns the latter.

    A line has ``image``, ``text`` (the photograph's name), ``object`` (the object's picture at zoom 0), ``thumbnail``
    (its vector, see ``thumbnail``), ``zoom`` and ``group`` (the object's name).
    """
    directory = pathlib.Path(directory)
    rows = []
    for thing in objects:
        (directory / thing.name).mkdir(parents=True, exist_ok=True)
        crop(thing, 0.0, size).save(directory / thing.name / "object.png")
        for number, zoom in enumerate(zooms):
            name = f"{thing.name}/{number:03d}.png"
            crop(thing, float(zoom), size).save(directory / name)
            rows.append(
                {
                    "image": name,
                    "text": thing.photograph,
                    "object": f"{thing.name}/object.png",
                    "thumbnail": thumbnail(thing),
                    "zoom": round(float(zoom), 6),
                    "group": thing.name,
                }
            )
    path = directory / "triples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- the measure -----------------------------------------------------------------------------------------------------


@functools.cache
def _pyramid(thing: Object, size: int, steps: int) -> np.ndarray:
    """The object's pictures at ``steps`` zooms from 0 to 1, (steps, size·size·3), as directions."""
    pictures = [np.asarray(crop(thing, zoom, size), np.float64) for zoom in np.linspace(0, 1, steps)]
    return _direction(np.stack(pictures))


def _direction(pictures: np.ndarray) -> np.ndarray:
    """Without brightness and contrast: no mean, length 1."""
    flat = pictures.reshape(len(pictures), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)


def measured_zoom(pictures: np.ndarray, thing: Object, steps: int = 65) -> tuple[np.ndarray, np.ndarray]:
    """The zooms (B,) at which an object's own pictures correlate best with the given ones, and these correlations (B,).

    Args:
        pictures: (B, size, size, 3), in any range.
        thing: the object.
        steps: zooms that are compared.
    """
    pictures = np.asarray(pictures, np.float64)
    correlations = _direction(pictures) @ _pyramid(thing, pictures.shape[1], steps).T
    return np.linspace(0, 1, steps)[correlations.argmax(axis=1)], correlations.max(axis=1)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: 1 where both rise together; 0 where one of them stays the same throughout."""
    from scipy.stats import rankdata

    first, second = (rankdata(values) for values in (one, other))
    first, second = first - first.mean(), second - second.mean()
    length = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / length) if length else 0.0
