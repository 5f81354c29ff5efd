"""From a picture's file to pixels: every colour model, depth and oddity that Pillow reads becomes 8-bit gray or RGB.

Rotation that the file asks for is done, transparency is put on white, of several frames the first is taken, colour
profiles are ignored, and the name's ending counts for nothing. What can't be used raises ``BadPicture``.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from kernels.typing import UInt8
from sana_jax.errors import UserError, reason_of

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS = 1 << 27  # of one picture (11,585 squared): 400 MB as RGB, which a bomb of a few kB can ask for
SHORTEST_SIDE = 2  # px: a line of single pixels has no shape
# px along a square's side: of the tables, 512, 1024, 2048, 4096, the authors' data for 2048 alone is made with Lanczos.
_LANCZOS_FROM, LANCZOS_BELOW = 1536, 3072

Crop = Literal["center"] | tuple[float, float]


class BadPicture(UserError):
    """A file that can't be used as a picture.

    Attributes:
        name: the file.
        reason: why, as in "is empty".
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name} {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self):
        return (BadPicture, (self.name, self.reason))


class Header(NamedTuple):
    """What a picture's file says before its pixels.

    Attributes:
        height: as shown, after rotation.
        width: as shown.
        format: Pillow's name, such as ``JPEG``.
        oddities: what is done to it, such as "rotated as its EXIF data asks".
    """

    height: int
    width: int
    format: str
    oddities: tuple[str, ...]


def read_header(file: IO[bytes], *, name: str) -> Header:
    """Size and kind of a picture, without decoding it.

    Raises:
        BadPicture: empty, not a picture, or of a size that can't be used.
    """
    return _guarded(name, lambda: _header(_open(file, name)))


def decode_picture(data: bytes, *, name: str, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """The pixels of a picture's file.

    Args:
        data: the file's bytes.
        name: for messages.
        channels: 1 for gray, 3 for RGB.

    Raises:
        BadPicture: empty, truncated, damaged, not a picture, or of a size that can't be used.
        UserError: another number of channels.
    """
    if channels not in (1, 3):
        raise UserError(f"channels {channels} is not allowed; pictures are read as gray (1) or RGB (3)")
    return _guarded(name, lambda: _pixels(_open(io.BytesIO(data), name), name, channels))


def covering_size(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """(height, width) that a picture is scaled to, so that it covers the target; the longer side is rounded down."""
    old_height, old_width = size
    if height / old_height > width / old_width:
        scaled = height, int(old_width * (height / old_height))
    else:
        scaled = int(old_height * (width / old_width)), width
    # rounding down must not leave a row of the target uncovered
    return max(scaled[0], height), max(scaled[1], width)


def crop_offset(scaled: tuple[int, int], height: int, width: int, crop: Crop) -> tuple[int, int]:
    """(top, left) of the part of a scaled picture that is kept.

    Raises:
        UserError: a name other than "center", or fractions outside of 0 to 1.
    """
    spare = scaled[0] - height, scaled[1] - width
    if isinstance(crop, str):
        if crop != "center":
            raise UserError(f"crop {crop!r} is not allowed; choose center or two fractions from 0 to 1")
        return round(spare[0] / 2), round(spare[1] / 2)
    if not all(0 <= fraction <= 1 for fraction in crop):
        raise UserError(f"crop {crop} is not allowed; choose two fractions from 0 (top, left) to 1 (bottom, right)")
    return round(spare[0] * crop[0]), round(spare[1] * crop[1])


def resize_and_crop_to(
    picture: UInt8[np.ndarray, "H W C"], height: int, width: int, crop: Crop = "center"
) -> UInt8[np.ndarray, "h w C"]:
    """Scales a picture to cover the target and keeps a part of the target's size.

    Bicubic with antialiasing; Lanczos for targets of about 2048 px, as the published models' data was made.

    Args:
        picture: pixels.
        height: pixels of the target.
        width: pixels of the target.
        crop: ``"center"``, or how far from the top and from the left, as fractions of what is cut off.

    Raises:
        UserError: a crop that is not allowed.
    """
    from PIL import Image

    scaled = covering_size(picture.shape[:2], height, width)
    top, left = crop_offset(scaled, height, width, crop)
    if scaled != picture.shape[:2]:
        image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
        lanczos = _LANCZOS_FROM**2 <= height * width < LANCZOS_BELOW**2
        method = Image.Resampling.LANCZOS if lanczos else Image.Resampling.BICUBIC
        picture = _with_channels(np.asarray(image.resize(scaled[::-1], method)))
    return np.ascontiguousarray(picture[top : top + height, left : left + width])


def flip(picture: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W C"]:
    """The picture's mirror image: left becomes right."""
    return np.ascontiguousarray(picture[:, ::-1])


def _guarded(name: str, work: Callable):
    """Runs Pillow on bytes that may be anything: whatever it raises on them is a bad picture."""
    try:
        return work()
    except (BadPicture, UserError):
        raise
    except MemoryError:
        raise
    except Exception as error:
        from PIL import Image, UnidentifiedImageError

        if isinstance(error, UnidentifiedImageError):
            reason = "is not a picture of a known format"
        elif isinstance(error, Image.DecompressionBombError):
            reason = f"has more than {MOST_PIXELS} pixels, the most that are read"
        elif isinstance(error, OSError) and error.errno is not None:
            reason = f"can't be read ({error.strerror})"
        else:
            kind, text = type(error).__name__, reason_of(error, 100)
            reason = f"is damaged ({kind if text == kind else f'{kind}: {text}'})"
        raise BadPicture(name, reason) from error


@functools.cache
def _quiet_pillow() -> None:
    """Unknown tags and large sizes: the pixels are good, or what is wrong with them is found anyway."""
    # for the whole process, because filters that Python can take back are not safe among threads
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _open(file: IO[bytes], name: str) -> Image.Image:
    from PIL import Image

    if not file.read(1):
        raise BadPicture(name, "is empty")
    file.seek(0)
    _quiet_pillow()
    picture = Image.open(file)
    width, height = picture.size
    if min(width, height) < SHORTEST_SIDE:
        raise BadPicture(name, f"has {height}x{width} pixels; {SHORTEST_SIDE} or more are needed on each side")
    if width * height > MOST_PIXELS:
        raise BadPicture(name, f"has {height}x{width} pixels; the most that are read are {MOST_PIXELS}")
    if picture.mode == "LAB":
        raise BadPicture(name, "is in the colour model LAB, which is not read; save it as RGB")
    return picture


def _orientation(picture: Image.Image) -> int:
    """1 to 8, as EXIF numbers them; asked before the pixels are read, so that headers and pixels agree."""
    if picture.format == "TIFF":  # Pillow rotates these by itself
        return 1
    if picture.format == "PNG" and "exif" not in picture.info:  # it would read the pixels to look behind them
        return 1
    from PIL import ExifTags

    value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def _header(picture: Image.Image) -> Header:
    width, height = picture.size
    orientation = _orientation(picture)
    oddities = []
    if orientation != 1:
        oddities.append("rotated or mirrored as their EXIF data asks")
    if picture.format != "MPO" and getattr(picture, "is_animated", False):
        oddities.append("of several frames: the first is taken")
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        oddities.append("transparent: put on white")
    elif picture.mode.startswith(("I", "F")):
        oddities.append("of more than 8 bits: brought to 8")
    elif picture.mode == "CMYK":
        oddities.append("of the colour model CMYK: brought to RGB")
    if orientation >= 5:
        height, width = width, height
    return Header(height, width, picture.format or "", tuple(oddities))


def _pixels(picture: Image.Image, name: str, channels: int) -> UInt8[np.ndarray, "H W C"]:
    from PIL import Image

    orientation = _orientation(picture)
    picture.load()
    if orientation != 1:
        picture = picture.transpose(
            {
                2: Image.Transpose.FLIP_LEFT_RIGHT,
                3: Image.Transpose.ROTATE_180,
                4: Image.Transpose.FLIP_TOP_BOTTOM,
                5: Image.Transpose.TRANSPOSE,
                6: Image.Transpose.ROTATE_270,
                7: Image.Transpose.TRANSVERSE,
                8: Image.Transpose.ROTATE_90,
            }[orientation]
        )
    if picture.mode.startswith(("I", "F")):
        picture = _to_8_bits(picture, name, picture.info.get("transparency"))
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return _with_channels(np.asarray(picture.convert("L" if channels == 1 else "RGB")))


def _to_8_bits(picture: Image.Image, name: str, transparent: int | None = None) -> Image.Image:
    """16-bit integers, and floats in [0, 1] or [0, 255], as 8-bit gray; white where they have the transparent value."""
    from PIL import Image

    values = np.asarray(picture, np.float32)
    if not np.isfinite(values).all():
        raise BadPicture(name, "holds values that are not finite")
    low, high = float(values.min()), float(values.max())
    if picture.mode == "F":
        white = 1.0 if high <= 1 else 255.0
    else:
        white = 65535.0
    if low < 0 or high > white:
        raise BadPicture(name, f"holds values from {low:g} to {high:g}; allowed are 0 to {white:g}")
    gray = np.round(values * (255.0 / white)).astype(np.uint8)
    return Image.fromarray(gray if transparent is None else np.where(values == transparent, np.uint8(255), gray))


def _with_channels(pixels: np.ndarray) -> UInt8[np.ndarray, "H W C"]:
    return pixels[..., None] if pixels.ndim == 2 else pixels
