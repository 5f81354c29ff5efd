"""Pictures that users hand in: read, brought to RGB, resized; anything odd about them is said or refused."""

from __future__ import annotations

import os
import pathlib
import warnings
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from kernels.typing import Float
from sana_jax.errors import UserError, reason_of
from sana_jax.pipelines.checks import as_array

if TYPE_CHECKING:
    from PIL import Image

SHORTEST_SIDE = 16  # px: below this a picture says nothing at the sizes that models draw
# What is white in modes of more than 8 bits: PIL opens 16-bit files in any of the first two.
_WHITE = {"I": 65535.0, "F": 1.0}

# Brightness of red, green and blue (ITU-R BT.601), as PIL makes gray of colour.
LUMA = np.asarray([0.299, 0.587, 0.114], np.float32)


def read_picture(picture: Any, name: str = "image", shortest: int = SHORTEST_SIDE) -> Image.Image:
    """A picture as an RGB PIL image.

    Args:
        picture: a file's name, a PIL image, or an array (H, W, 3) of bytes or of floats in [0, 1].
        name: the argument's, for messages.
        shortest: pixels that its shorter side must have.

    A rotation that the file asks for is done; other colour models, transparency (on white), 16 bits and floats in
    [0, 1] become 8-bit RGB; of a photograph with a preview or a depth map in its file (MPO), the photograph is taken.
    Each prints a line.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: not a picture, damaged, animated, too small, or larger than PIL's limit against decompression bombs.
    """
    from PIL import Image

    if isinstance(picture, str | os.PathLike):
        picture = open_picture(picture, name)
    elif not isinstance(picture, Image.Image):
        picture = _from_array(picture, name)
    if min(picture.size) < shortest:
        raise UserError(
            f"{name} of {picture.height}x{picture.width} pixels is too small; allowed is {shortest} or more on each "
            "side: choose a larger picture"
        )
    return _to_rgb(_upright(_still(picture, name), name), name)


def read_pictures(pictures: Any, name: str, shortest: int = SHORTEST_SIDE) -> list[Image.Image] | None:
    """One picture or a list of them (or an array (B, H, W, 3)), read; None for None.

    Raises:
        FileNotFoundError, UserError: an empty list, or as ``read_picture``.
    """
    if pictures is None:
        return None
    several = isinstance(pictures, list | tuple) or getattr(pictures, "ndim", None) == 4
    pictures = list(pictures) if several else [pictures]
    if not pictures:
        raise UserError(f"{name} is an empty list; allowed is one picture or more: give one")
    return [read_picture(picture, name, shortest) for picture in pictures]


def open_picture(path: str | os.PathLike[str], name: str) -> Image.Image:
    """A file's picture as it is; ``name`` as in ``read_picture``.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: not a picture, damaged, animated, or larger than PIL's limit against decompression bombs.
    """
    from PIL import Image

    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{name} {path} is not a file; name a picture (png, jpg, webp)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown tags and the like, while the pixels are good
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = _still(Image.open(path), name)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(
            f"{name} {path} has more pixels than are read ({Image.MAX_IMAGE_PIXELS}); make it smaller first"
        ) from error
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{name} {path} is not a picture of a kind that is known; save it as png or jpg") from error
    except Exception as error:  # each kind of file fails in its own way
        raise UserError(f"{name} {path} can't be read ({reason_of(error)}); save it again as png or jpg") from error
    return picture


def _still(picture: Image.Image, name: str) -> Image.Image:
    """The picture, once its pixels are in memory and it is known to be the only one of its file."""
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format == "MPO":
        print(f"{name}: the file holds {frames} pictures, a photograph and what its camera adds; the first is taken")
        picture.seek(0)
    elif frames > 1:
        raise UserError(f"{name} is animated ({frames} frames); allowed is one picture: save one frame of it")
    picture.load()
    return picture.copy() if frames > 1 else picture


def _from_array(array: Any, name: str) -> Image.Image:
    from PIL import Image

    array = as_array(name, array)
    if array.ndim != 3 or array.shape[-1] != 3:
        raise UserError(f"{name} of shape {array.shape} is not allowed; give (H, W, 3), a PIL image or a file's name")
    if array.dtype != np.uint8:
        if not jnp.issubdtype(array.dtype, jnp.floating) or not ((array >= 0) & (array <= 1)).all():
            raise UserError(
                f"{name} of {array.dtype} is not in range; allowed are bytes, or floats in [0, 1]: rescale it"
            )
        array = np.round(array * 255).astype(np.uint8)
    return Image.fromarray(array)


def _mask_from_array(array: Any, name: str) -> Image.Image:
    from PIL import Image

    array = as_array(name, array)
    if array.ndim != 2 or not array.size:
        raise UserError(f"{name} of shape {array.shape} is not allowed; give (H, W), a PIL image or a file's name")
    if array.dtype == np.uint8 and array.max() > 1:
        return Image.fromarray(array)
    if array.dtype.kind not in "buif" or not ((array >= 0) & (array <= 1)).all():
        raise UserError(
            f"{name} of {array.dtype} is not in range; allowed are booleans, bytes, or numbers in [0, 1]: rescale it"
        )
    return Image.fromarray(np.round(array.astype(np.float32) * 255).astype(np.uint8))


def _upright(picture: Image.Image, name: str) -> Image.Image:
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = picture.getexif().get(0x0112, 1)
            if orientation in range(2, 9):
                picture = ImageOps.exif_transpose(picture)
                print(f"{name}: turned as its EXIF orientation {orientation} asks")
    except Exception as error:  # damaged EXIF fails in many ways, and the picture is good without it
        print(f"{name}: its EXIF data can't be read ({type(error).__name__}), so it is taken as it lies")
    return picture


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    from PIL import Image

    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    white = _WHITE.get(picture.mode[0])
    if white is not None:
        values = np.asarray(picture, np.float64)
        if not ((values >= 0) & (values <= white)).all():
            raise UserError(
                f"{name} of mode {picture.mode} has values outside 0 to {white:.0f}, so what is white in it is not "
                "known; save it as 8-bit png"
            )
        print(f"{name}: {picture.mode} becomes 8-bit RGB, {white:.0f} being white")
        gray = np.round(values * (255 / white))
        if (transparent := picture.info.get("transparency")) is not None:
            gray[values == transparent] = 255
        return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    print(f"{name}: {picture.mode} becomes 8-bit RGB{', on white' if picture.has_transparency_data else ''}")
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

    Args:
        mask: a file's name, a PIL image, or an array (H, W) of booleans, of 0 and 1, of bytes, or of floats in [0, 1].
            What is transparent in it counts as black.
        picture: what it belongs to.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: not a picture, damaged, animated, another size than the picture's, or nothing in it is white.
    """
    from PIL import Image

    name = "mask_image"
    if isinstance(mask, str | os.PathLike):
        mask = open_picture(mask, name)
    elif not isinstance(mask, Image.Image):
        mask = _mask_from_array(mask, name)
    mask = _upright(_still(mask, name), name)
    if mask.size != picture.size:
        raise UserError(
            f"mask_image of {mask.height}x{mask.width} for an image of {picture.height}x{picture.width}; allowed is "
            "the same size: resize the mask"
        )
    if white := _WHITE.get(mask.mode[0]):
        mask = Image.fromarray((np.asarray(mask, np.float64) >= white / 2).astype(np.uint8) * 255)
    if mask.has_transparency_data:
        print(f"{name}: what is transparent in it is not drawn anew")
        mask = mask.convert("RGBA")
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, (0, 0, 0, 255)), mask)
    mask = mask.convert("L")
    if mask.getextrema()[1] < 128:
        raise UserError("mask_image has no white in it, so nothing would be drawn; white is what is drawn anew")
    return mask


def mask_at(mask: Image.Image | Float[np.ndarray, "H W"], height: int, width: int) -> Float[np.ndarray, "h w"]:
    """The mask as 0 or 1 at the given size: a cell is 1 if any part of it is white.

    ``mask`` is as ``read_mask`` or ``mask_at`` gives it.
    """
    white = np.asarray(mask) >= (0.5 if isinstance(mask, np.ndarray) else 128)
    return _any_white(_any_white(white, height).T, width).T.astype(np.float32)


def _any_white(white: np.ndarray, cells: int) -> np.ndarray:
    """Whether any row that a cell touches is white, for every cell along the first axis."""
    length = white.shape[0]
    before = np.concatenate([np.zeros((1, white.shape[1]), np.int64), np.cumsum(white, axis=0, dtype=np.int64)])
    index = np.arange(cells + 1) * length
    first, end = index[:-1] // cells, -(-index[1:] // cells)
    return before[end] > before[first]


def place(values: Float[np.ndarray, "H W *C"], size: tuple[int, int]) -> Float[np.ndarray, "h w *C"]:
    """Values in the middle of a larger area, whose rest repeats the values at the border."""
    before = [(there - here) // 2 for there, here in zip(size, values.shape)]
    widths = [(a, there - here - a) for a, there, here in zip(before, size, values.shape)]
    return np.pad(values, widths + [(0, 0)] * (values.ndim - 2), mode="edge")
