"""Handwritten digits as a folder of pictures with captions, and a measure of how well pictures keep to edges."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
from PIL import Image

from train.data.conditions import canny_edges
from train.data.digits import NAMES, load_images
from train.example_pictures import STYLES

HELD_OUT = 100


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures (B, 8, 8) of bytes, the digits that they show, and a caption for each."""

    pixels: np.ndarray
    digits: np.ndarray

    @property
    def captions(self) -> list[str]:
        return [f"a handwritten {NAMES[digit]}" for digit in self.digits]

    @property
    def edges(self) -> np.ndarray:
        return edges_of(self.pixels)

    def write(self, folder: pathlib.Path) -> pathlib.Path:
        """A picture and a text of the same name for each."""
        folder.mkdir(parents=True)
        for number, (picture, caption) in enumerate(zip(self.pixels, self.captions)):
            Image.fromarray(picture).save(folder / f"{number:04d}.png")
            (folder / f"{number:04d}.txt").write_text(caption)
        return folder


def digits() -> tuple[Pictures, Pictures]:
    """Scikit-learn's digits in two parts: to train on, and ``HELD_OUT`` others, ten of each digit.

    Each is moved to the left or right, so that its edges say more than its caption: a model of the digits as they come
    draws them in the middle.
    """
    images, labels = load_images(tuple(range(10)))
    moved = [STYLES["moved"](image / 2 + 0.5, np.random.default_rng(number)) for number, image in enumerate(images)]
    pixels = np.round(np.stack(moved)[..., 0] * 255).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(pixels))
    each = [order[labels[order] == digit] for digit in range(10)]
    held_out = np.concatenate([places[: HELD_OUT // 10] for places in each])
    others = np.concatenate([places[HELD_OUT // 10 :] for places in each])
    return tuple(Pictures(pixels[places], labels[places]) for places in (others, held_out))


def edges_of(pixels: np.ndarray) -> np.ndarray:
    """Canny's edges (B, H, W) of pictures (B, H, W) of bytes: the filter that the control pictures are made with."""
    return np.stack([canny_edges(picture[..., None])[..., 0] for picture in pixels]) > 0


def edge_agreement(pixels: np.ndarray, edges: np.ndarray) -> float:
    """F1 of the edges of pictures and the edges that they should have, pixel by pixel: 1 where all are the same."""
    found = edges_of(pixels)
    both = (found & edges).sum()
    return float(2 * both / max(found.sum() + edges.sum(), 1))
