"""The sizes that models were trained at, and the way from a requested size to one of them and back.

Training used a table of sizes ("bins") per model, each near the model's pixel count at another aspect ratio. The
tables are the published ones (diffusers' PixArt and SANA pipelines). Sampling at a size of the table and cropping to
what was asked for gives better pictures than sampling at sizes the model never saw.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import numpy as np

from kernels.typing import Float
from sana_jax.errors import UserError

Binning = Literal["nearest", "off", "error"]

# aspect ratio (height / width), height, width; in pixels, for models of 1024 px
_BINS_1024 = (
    (0.25, 512, 2048),
    (0.28, 512, 1856),
    (0.32, 576, 1792),
    (0.33, 576, 1728),
    (0.35, 576, 1664),
    (0.4, 640, 1600),
    (0.42, 640, 1536),
    (0.48, 704, 1472),
    (0.5, 704, 1408),
    (0.52, 704, 1344),
    (0.57, 768, 1344),
    (0.6, 768, 1280),
    (0.68, 832, 1216),
    (0.72, 832, 1152),
    (0.78, 896, 1152),
    (0.82, 896, 1088),
    (0.88, 960, 1088),
    (0.94, 960, 1024),
    (1.0, 1024, 1024),
    (1.07, 1024, 960),
    (1.13, 1088, 960),
    (1.21, 1088, 896),
    (1.29, 1152, 896),
    (1.38, 1152, 832),
    (1.46, 1216, 832),
    (1.67, 1280, 768),
    (1.75, 1344, 768),
    (2.0, 1408, 704),
    (2.09, 1472, 704),
    (2.4, 1536, 640),
    (2.5, 1600, 640),
    (3.0, 1728, 576),
    (4.0, 2048, 512),
)
# what the larger models have beside twice the sizes above
_MORE_BINS_2048 = (
    (0.26, 1024, 3968),
    (0.27, 1024, 3840),
    (2.89, 3328, 1152),
    (3.11, 3584, 1152),
    (3.62, 3712, 1024),
    (3.75, 3840, 1024),
    (3.88, 3968, 1024),
)


class Bin(NamedTuple):
    """One trained size in pixels, under its rounded aspect ratio."""

    ratio: float
    height: int
    width: int


def _scaled(bins: tuple[tuple[float, int, int], ...], factor: float) -> tuple[Bin, ...]:
    return tuple(Bin(ratio, int(height * factor), int(width * factor)) for ratio, height, width in sorted(bins))


_BINS_2048 = _scaled((*_scaled(_BINS_1024, 2), *_MORE_BINS_2048), 1)
# by the transformer's sample_size: latent side at a factor of 32
BINS = {16: _scaled(_BINS_1024, 0.5), 32: _scaled(_BINS_1024, 1), 64: _BINS_2048, 128: _scaled(_BINS_2048, 2)}
BINNED_FACTOR = 32
# of the video models, by the transformer's sample_size: 480p and 720p
VIDEO_BINS = {
    30: _scaled(
        (
            (0.5, 448, 896),
            (0.57, 480, 832),
            (0.68, 528, 768),
            (0.78, 560, 720),
            (1.0, 624, 624),
            (1.13, 672, 592),
            (1.29, 720, 560),
            (1.46, 768, 528),
            (1.67, 816, 496),
            (1.75, 832, 480),
            (2.0, 896, 448),
        ),
        1,
    ),
    22: _scaled(
        (
            (0.5, 672, 1344),
            (0.57, 704, 1280),
            (0.68, 800, 1152),
            (0.78, 832, 1088),
            (1.0, 960, 960),
            (1.13, 1024, 896),
            (1.29, 1088, 832),
            (1.46, 1152, 800),
            (1.67, 1248, 736),
            (1.75, 1280, 704),
            (2.0, 1344, 672),
        ),
        1,
    ),
}
_VIDEO_TOKENS = {30: 16, 22: 32}  # pixels per side that a token of these models stands for
_MOST_PIXELS = 1 << 28  # of a picture scaled to what was asked for: 16 times the largest that is sampled


def nearest_bin(height: int, width: int, bins: tuple[Bin, ...]) -> Bin:
    """The trained size whose aspect ratio is nearest to that of ``height`` x ``width`` pixels."""
    return min(bins, key=lambda candidate: abs(candidate.ratio - height / width))


def size_to_sample(height: int, width: int, binning: Binning | None, sample_size: int, factor: int) -> tuple[int, int]:
    """The size in pixels that is sampled for a requested one.

    Args:
        height: requested pixels.
        width: requested pixels.
        binning: ``"nearest"``: the trained size of the nearest aspect ratio; ``"off"``: the request itself;
            ``"error"``: the request if it is a trained size. None: nearest where the model has a table, else off.
        sample_size: the transformer's; picks the table.
        factor: pixels per latent; the tables are for autoencoders of 32.

    Raises:
        UserError: a name that is not allowed, a model without a table, or a size that is not in it.
    """
    bins = BINS.get(sample_size) if factor == BINNED_FACTOR else None
    of_what = (
        f"a model with sample_size {sample_size} and {factor} pixels per latent has no table of trained sizes (those "
        f"with sample_size {', '.join(map(str, BINS))} have)"
    )
    return choose_size(height, width, binning, bins, of_what)


def video_bins(sample_size: int, token: int) -> tuple[Bin, ...] | None:
    """The table of a video model; None where it has none.

    Args:
        sample_size: the transformer's.
        token: pixels per side of a token: the transformer's patch size times the autoencoder's factor.
    """
    return VIDEO_BINS[sample_size] if _VIDEO_TOKENS.get(sample_size) == token else None


def video_size_to_sample(
    height: int, width: int, binning: Binning | None, sample_size: int, token: int
) -> tuple[int, int]:
    """As ``size_to_sample``, of the video models; all sizes of their tables can be sampled.

    (diffusers refuses seven of the eleven at 480p, for they are not multiples of 32; the networks need 16.)
    ``sample_size`` and ``token`` are as in ``video_bins``.

    Raises:
        UserError: as ``size_to_sample``.
    """
    known = " and ".join(f"{size} of tokens of {pixels}" for size, pixels in _VIDEO_TOKENS.items())
    of_what = (
        f"a video model with sample_size {sample_size} and tokens of {token} pixels has no table of trained sizes "
        f"(those with {known} have)"
    )
    return choose_size(height, width, binning, video_bins(sample_size, token), of_what)


def check_whole_pixels(height: int, width: int) -> None:
    """Raises ``UserError`` for a size that no array has."""
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, int | np.integer | jax.Array):  # of a division: shapes take no 512.0
            raise UserError(f"{name} {value!r} is not allowed; give a whole number of pixels")


def choose_size(
    height: int, width: int, binning: Binning | None, bins: tuple[Bin, ...] | None, without_table: str
) -> tuple[int, int]:
    """The size that is sampled, by a model's table; None where it has none, as ``without_table`` says in words.

    Raises:
        UserError: as ``size_to_sample``.
    """
    check_whole_pixels(height, width)
    if binning not in (None, "nearest", "off", "error"):
        raise UserError(f"binning {binning!r} is not allowed; choose nearest, off or error")
    if binning is None:
        binning = "off" if bins is None else "nearest"
    if binning == "off":
        return height, width
    if bins is None:
        raise UserError(f"binning {binning!r}: {without_table}: choose binning off")
    if height < 1 or width < 1:
        raise UserError(f"size {height}x{width} is not allowed; height and width are pixels: choose 1 or more")
    found = nearest_bin(height, width, bins)
    if binning == "error" and (height, width) not in {(each.height, each.width) for each in bins}:
        raise UserError(
            f"size {height}x{width} is not one that this model was trained at; the nearest is "
            f"{found.height}x{found.width}: choose that, or binning nearest or off"
        )
    scaled_height, scaled_width = _covering((found.height, found.width), (height, width))
    if scaled_height * scaled_width > _MOST_PIXELS:
        raise UserError(
            f"size {height}x{width}: pictures of {found.height}x{found.width} would be scaled to "
            f"{scaled_height}x{scaled_width} for it, more than {_MOST_PIXELS} pixels: choose a smaller size or one "
            "nearer to a square"
        )
    return found.height, found.width


def _covering(sampled: tuple[int, int], requested: tuple[int, int]) -> tuple[int, int]:
    """What the sampled size is scaled to before it is cropped to the requested one."""
    ratio = max(want / have for want, have in zip(requested, sampled))
    # rounding down may lose the last row of what was asked for
    return tuple(max(int(have * ratio), want) for want, have in zip(requested, sampled))


def kept_window(sampled: tuple[int, int], requested: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the middle of a sampled picture that ``resize_and_crop`` keeps."""
    ratio = max(want / have for want, have in zip(requested, sampled))
    return tuple(min(have, max(1, round(want / ratio))) for want, have in zip(requested, sampled))


def resize_and_crop(pictures: Float[np.ndarray, "B H W C"], height: int, width: int) -> Float[np.ndarray, "B h w C"]:
    """Scales to cover ``height`` x ``width`` (bilinear, not antialiased) and crops the centre, as diffusers does.

    One rounding differs: the scaled size never falls short of the request, where diffusers may return a single row.
    """
    old_height, old_width = pictures.shape[1:3]
    if (old_height, old_width) == (height, width):
        return pictures
    new_height, new_width = _covering((old_height, old_width), (height, width))
    shape = (pictures.shape[0], new_height, new_width, pictures.shape[3])
    pictures = np.asarray(jax.image.resize(pictures, shape, "linear", antialias=False))
    top, left = (new_height - height) // 2, (new_width - width) // 2
    return pictures[:, top : top + height, left : left + width]
