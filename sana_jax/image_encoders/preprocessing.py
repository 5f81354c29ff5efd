"""From pictures to an image encoder's input, as the model's ``preprocessor_config.json`` says."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kernels.typing import Float
from sana_jax.errors import UserError
from sana_jax.files import read_json
from sana_jax.pipelines.image_inputs import read_picture

FILE_NAME = "preprocessor_config.json"
_PROCESSORS = ("SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil")
_RESAMPLING = (0, 1, 2, 3, 4, 5)  # PIL's numbers: nearest, Lanczos, bilinear, bicubic, box, Hamming
_BICUBIC = 3
# Steps that would change the result and that SigLIP's processors do not have.
_MUST_BE_OFF = ("do_center_crop", "do_pad", "do_flip_channel_order")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Resizing (the shape is not kept), rescaling and normalisation; each step can be left out.

    Attributes:
        height: pixels that a picture is resized to; None leaves it as it is.
        width: likewise.
        resample: PIL's number of the filter: 2 bilinear, 3 bicubic.
        rescale_factor: what bytes are multiplied with; None leaves them.
        mean: taken off each channel; None leaves them.
        std: what each channel is divided by then.
    """

    height: int | None
    width: int | None
    resample: int = _BICUBIC
    rescale_factor: float | None = 1 / 255
    mean: tuple[float, ...] | None = (0.5, 0.5, 0.5)
    std: tuple[float, ...] | None = (0.5, 0.5, 0.5)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> Preprocessing:
        """Reads ``preprocessor_config.json`` of a model directory.

        Raises:
            FileNotFoundError: there is none.
            UserError: it is damaged, or asks for something that is not done here.
        """
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; it says how pictures are resized and normalised: download it beside the weights"
            )
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = FILE_NAME) -> Preprocessing:
        """The parsed file; ``source`` names it in errors. What is missing is as in SigLIP's processor: 224 px, bicubic.

        Raises:
            UserError: a value that is not allowed.
        """

        def refuse(name: str, value: Any, allowed: str) -> UserError:
            return UserError(f"{source}: {name}={value!r} is not allowed; allowed is {allowed}: mend it")

        kind = values.get("image_processor_type", _PROCESSORS[0])
        if kind not in _PROCESSORS:
            raise refuse("image_processor_type", kind, " or ".join(_PROCESSORS))
        for name in _MUST_BE_OFF:
            if values.get(name):
                raise refuse(name, values[name], "false")
        does = {name: values.get(f"do_{name}", True) for name in ("resize", "rescale", "normalize")}
        for name, value in does.items():
            if not isinstance(value, bool | None):
                raise refuse(f"do_{name}", value, "true or false")
        size = values.get("size", {"height": 224, "width": 224})
        if does["resize"] and not (
            isinstance(size, Mapping)
            and set(size) == {"height", "width"}
            and all(type(length) is int and 1 <= length <= 1 << 14 for length in size.values())
        ):
            raise refuse("size", size, "height and width in pixels")
        resample = values.get("resample", _BICUBIC)
        if type(resample) is not int or resample not in _RESAMPLING:
            raise refuse("resample", resample, f"one of {_RESAMPLING}")
        factor = values.get("rescale_factor", 1 / 255)
        if not _is_number(factor):
            raise refuse("rescale_factor", factor, "a finite number")
        mean, std = (_channels(values.get(name, 0.5)) for name in ("image_mean", "image_std"))
        if mean is None or std is None or 0 in std:
            raise refuse("image_mean, image_std", (values.get("image_mean"), values.get("image_std")), "3 numbers each")
        return cls(
            height=size["height"] if does["resize"] else None,
            width=size["width"] if does["resize"] else None,
            resample=resample,
            rescale_factor=float(factor) if does["rescale"] else None,
            mean=mean if does["normalize"] else None,
            std=std if does["normalize"] else None,
        )

    def __call__(self, pictures: Any) -> Float[np.ndarray, "B H W 3"]:
        """Pictures (files, PIL images, arrays (H, W, 3)) as float32, ready for the network.

        Raises:
            FileNotFoundError, UserError: a picture that can't be read, or pictures of several sizes and no resizing.
        """
        ready = [self._one(read_picture(picture, "picture")) for picture in pictures]
        if len({picture.shape for picture in ready}) > 1:
            raise UserError("pictures of several sizes, and preprocessor_config.json does not resize; resize them")
        return np.stack(ready)

    def _one(self, picture: Any) -> Float[np.ndarray, "H W 3"]:
        from PIL import Image

        if self.height is not None:
            picture = picture.resize((self.width, self.height), Image.Resampling(self.resample))
        pixels = np.asarray(picture, np.float64)  # rounded once, at the end
        if self.rescale_factor is not None:
            pixels = pixels * self.rescale_factor
        if self.mean is not None:
            pixels = (pixels - np.array(self.mean)) / np.array(self.std)
        return pixels.astype(np.float32)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _channels(value: Any) -> tuple[float, ...] | None:
    """Three numbers, one for all or one each; None for anything else."""
    values: Sequence[Any] = [value] * 3 if _is_number(value) else value
    if not isinstance(values, list | tuple) or len(values) != 3 or not all(map(_is_number, values)):
        return None
    return tuple(float(value) for value in values)
