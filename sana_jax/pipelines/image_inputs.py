"""Pictures that users hand in: read, brought to RGB, resized; anything odd about them is said or refused."""

from __future__ import annotations

import os
import pathlib
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.typing import Float
from sana_jax.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

_SHORTEST_SIDE = 16  # px: below this a picture says nothing at the sizes that models draw
_LARGEST_MODE_16_BIT = 65535.0


def read_picture(picture: Any, name: str = "image") -> Image.Image:
    """A picture as an RGB PIL image.

    Args:
        picture: a file's name, a PIL image, or an array (H, W, 3) of bytes or of floats in [0, 1].
        name: the argument's, for messages.

    A rotation that the file asks for is done; other colour models, transparency (on white) and 16 bits become 8-bit
    RGB. Each prints a line.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: not a picture, damaged, animated, too small, or larger than PIL's limit against decompression bombs.
    """
    from PIL import Image

    if isinstance(picture, str | os.PathLike):
        picture = _open(pathlib.Path(picture), name)
    elif not isinstance(picture, Image.Image):
        picture = _from_array(picture, name)
    if getattr(picture, "n_frames", 1) > 1:
        raise UserError(f"{name} is animated ({picture.n_frames} frames); allowed is one picture: save one frame of it")
    if min(picture.size) < _SHORTEST_SIDE:
        raise UserError(
            f"{name} of {picture.height}x{picture.width} pixels is too small; allowed is {_SHORTEST_SIDE} or more on "
            "each side: choose a larger picture"
        )
    return _to_rgb(_upright(picture, name), name)


def _open(path: pathlib.Path, name: str) -> Image.Image:
    from PIL import Image

    if not path.is_file():
        raise FileNotFoundError(f"{name} {path} is not a file; name a picture (png, jpg, webp)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(path)
            if getattr(picture, "n_frames", 1) == 1:
                picture.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(
            f"{name} {path} has more pixels than are read ({Image.MAX_IMAGE_PIXELS}); make it smaller first"
        ) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{name} {path} can't be read ({error}); save it again as png or jpg") from error
    return picture


def _from_array(array: Any, name: str) -> Image.Image:
    from PIL import Image

    array = np.asarray(array)
    if array.ndim != 3 or array.shape[-1] != 3:
        raise UserError(f"{name} of shape {array.shape} is not allowed; give (H, W, 3), a PIL image or a file's name")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating) or not (
            np.isfinite(array).all() and 0 <= array.min() <= array.max() <= 1
        ):
            raise UserError(
                f"{name} of {array.dtype} is not in range; allowed are bytes, or floats in [0, 1]: rescale it"
            )
        array = np.round(array * 255).astype(np.uint8)
    return Image.fromarray(array)


def _upright(picture: Image.Image, name: str) -> Image.Image:
    from PIL import ImageOps

    orientation = picture.getexif().get(0x0112, 1)
    if orientation in (0, 1):
        return picture
    print(f"{name}: turned as its EXIF orientation {orientation} asks")
    return ImageOps.exif_transpose(picture)


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    from PIL import Image

    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    print(f"{name}: {picture.mode} becomes 8-bit RGB{', on white' if picture.has_transparency_data else ''}")
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture, np.float64)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > _LARGEST_MODE_16_BIT:
            raise UserError(f"{name} has values outside 0 to {_LARGEST_MODE_16_BIT:.0f}; save it as 8-bit png")
        picture = Image.fromarray(np.round(values * (255 / _LARGEST_MODE_16_BIT)).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def to_network_range(picture: Image.Image, height: int, width: int) -> Float[np.ndarray, "1 H W 3"]:
    """An RGB picture in [-1, 1] at the given size (Lanczos, as diffusers resizes PIL images)."""
    from PIL import Image

    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return (np.asarray(picture, np.float32) / 255.0 * 2.0 - 1.0)[None]


def read_mask(mask: Any, picture: Image.Image) -> Image.Image:
    """A mask of ``picture``'s size as a PIL image of mode ``L``: white is drawn anew, black stays.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: another size than the picture's, or nothing in it is white.
    """
    from PIL import Image

    if isinstance(mask, str | os.PathLike):
        mask = _open(pathlib.Path(mask), "mask_image")
    elif not isinstance(mask, Image.Image):
        array = np.asarray(mask)
        if array.ndim != 2:
            raise UserError(f"mask_image of shape {array.shape} is not allowed; give (H, W), a PIL image or a file")
        mask = Image.fromarray(np.round(np.clip(array.astype(np.float32), 0, 1) * 255).astype(np.uint8))
    if mask.size != picture.size:
        raise UserError(
            f"mask_image of {mask.height}x{mask.width} for an image of {picture.height}x{picture.width}; allowed is "
            "the same size: resize the mask"
        )
    mask = mask.convert("L")
    if mask.getextrema()[1] < 128:
        raise UserError("mask_image has no white in it, so nothing would be drawn; white is what is drawn anew")
    return mask


def mask_at(mask: Image.Image, height: int, width: int) -> Float[np.ndarray, "H W"]:
    """The mask as 0 or 1 at the given size: a cell is 1 if any part of it is white."""
    white = np.asarray(mask) >= 128
    rows = np.add.reduceat(white, _edges(white.shape[0], height), axis=0, dtype=np.int64)
    cells = np.add.reduceat(rows, _edges(white.shape[1], width), axis=1, dtype=np.int64)
    return (cells > 0).astype(np.float32)


def _edges(length: int, cells: int) -> np.ndarray:
    return np.minimum(np.arange(cells) * length // cells, length - 1)
