"""Functions from pictures to vectors, by which sets of pictures are compared: ``pixels:32``, ``siglip:DIRECTORY``.

A function's name says everything that changes its vectors, since figures of different functions do not compare.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kernels.typing import Float
from sana_jax.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

_PIXELS_SIDE = 32
_BATCH = 64


@dataclass(frozen=True)
class FeatureFunction:
    """Pictures (PIL, of any size) to vectors (B, D), and a name that is recorded with what is measured."""

    name: str
    compute: Callable[[Sequence[Image.Image]], Float[np.ndarray, "B D"]]

    def __call__(self, pictures: Iterable[Image.Image]) -> Float[np.ndarray, "N D"]:
        """Vectors of all pictures, float32; reads no more of them than 64 at a time.

        Raises:
            UserError: no pictures.
        """
        vectors, part = [], []
        for picture in pictures:
            part.append(picture.convert("RGB"))
            if len(part) == _BATCH:
                vectors.append(self.compute(part))
                part = []
        if part:
            vectors.append(self.compute(part))
        if not vectors:
            raise UserError("no pictures to compute features of; give one or more")
        return np.concatenate(vectors).astype(np.float32)


def load_features(text: str) -> FeatureFunction:
    """The function that an option names: ``kind`` or ``kind:argument``.

    Raises:
        UserError, FileNotFoundError, CheckpointError: an unknown kind, or an argument that is not allowed.
    """
    kind, _, argument = text.partition(":")
    if kind not in _KINDS:
        raise UserError(
            f"features {text!r} are not allowed; choose pixels, pixels:SIZE, or siglip:DIRECTORY of a SigLIP model"
        )
    return _KINDS[kind](argument)


def _pixels(argument: str) -> FeatureFunction:
    side = int(argument) if argument.isdecimal() else 0 if argument else _PIXELS_SIDE
    if not 1 <= side <= 256:
        raise UserError(f"features pixels:{argument} are not allowed; choose a size from 1 to 256, such as pixels:32")
    return FeatureFunction(f"pixels {side}x{side} RGB", functools.partial(pixel_features, side=side))


def pixel_features(pictures: Sequence[Image.Image], side: int) -> Float[np.ndarray, "B D"]:
    """The pixels in [0, 1] of pictures scaled to a square (antialiased, bicubic): for tiny pictures."""
    from PIL import Image

    scaled = [picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for picture in pictures]
    return np.stack([np.asarray(picture, np.float32).reshape(-1) / 255 for picture in scaled])


def _siglip(argument: str) -> FeatureFunction:
    if not argument:
        raise UserError("features siglip need a directory; write siglip:DIRECTORY of a SigLIP model")
    from sana_jax.image_encoders import SiglipImageEncoder

    encoder = SiglipImageEncoder.from_directory(argument)
    return FeatureFunction(f"siglip {encoder.id} pooled", encoder.encode)


# kind -> the function for what stands after the colon
_KINDS: Mapping[str, Callable[[str], FeatureFunction]] = {"pixels": _pixels, "siglip": _siglip}
