"""Intrinsics of a pinhole camera, and how they move when its pictures are resized and cropped.

The canonical form is (F, 4): fx, fy, cx, cy for every frame, in pixels of the picture they belong to. The pixel in
column u and row v sees along ((u − cx)/fx, (v − cy)/fy, 1); pixels are counted from 0 and have no half-pixel offset.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sana_jax.errors import UserError, reason_of

if TYPE_CHECKING:
    from PIL import Image

    from kernels.typing import Float

NARROWEST_FIELD, WIDEST_FIELD = 25.0, 120.0  # degrees: what is outside was hardly seen in training
_FORMS = "(4,), (3, 3), (frames, 4) or (frames, 3, 3)"


def read_intrinsics(
    intrinsics: Any, num_frames: int, height: int, width: int, say: Callable[[str], None] = print
) -> Float[np.ndarray, "F 4"]:
    """Intrinsics in any of the four forms -> (F, 4).

    Says one line where there are more frames than needed, and one where the field of view is outside 25 to 120
    degrees.

    Args:
        intrinsics: (4,) fx, fy, cx, cy, or a (3, 3) matrix [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], for all frames; or
            (frames, 4) or (frames, 3, 3), of which the first F are taken.
        num_frames: F.
        height: of the picture that they belong to, in pixels.
        width: the same.
        say: prints a line.

    Returns:
        float32 fx, fy, cx, cy of every frame, in pixels of that picture.

    Raises:
        UserError: another shape, too few frames, a matrix that is none of a pinhole without skew, values that are not
            finite, focal lengths that are not positive, or a principal point outside the picture.
    """
    values = _as_numbers(intrinsics)
    shape = values.shape
    if shape[-2:] == (3, 3) and values.ndim <= 3:
        values = _from_matrices(values)
    elif shape not in ((4,), (*shape[:1], 4)):
        raise UserError(
            f"intrinsics of shape {shape}; allowed is {_FORMS}: give fx, fy, cx, cy in pixels of the {height}x{width} "
            "image (height x width)"
        )
    if values.ndim == 1:
        values = np.tile(values, (num_frames, 1))
    elif len(values) < num_frames:
        raise UserError(
            f"intrinsics of shape {shape} are for {len(values)} frames, and the video has {num_frames}; allowed is "
            f"{_FORMS} with {num_frames} frames or more: give one for every frame, or one for all"
        )
    elif len(values) > num_frames:
        say(f"intrinsics: the first {num_frames} of {len(values)} frames are taken")
        values = values[:num_frames]
    _check_values(values, height, width)
    _warn_of_field(values, height, width, say)
    return values.astype(np.float32)


def _as_numbers(intrinsics: Any) -> np.ndarray:
    try:
        given = np.asarray(intrinsics)
        if given.dtype.kind not in "fiu":
            raise TypeError(f"dtype {given.dtype}")
        return given.astype(np.float64)
    except Exception as error:  # each kind of object fails in its own way: torch's tensors with gradients, texts
        raise UserError(
            f"intrinsics are no array of real numbers ({reason_of(error)}); allowed is {_FORMS}: fx, fy, cx, cy"
        ) from error


def _from_matrices(matrices: np.ndarray) -> np.ndarray:
    vectors = matrices[..., (0, 1, 0, 1), (0, 1, 2, 2)]
    rebuilt = np.zeros_like(matrices)
    rebuilt[..., (0, 1, 0, 1), (0, 1, 2, 2)] = vectors
    rebuilt[..., 2, 2] = 1.0
    rest = np.abs(np.nan_to_num(matrices) - np.nan_to_num(rebuilt)).max((-1, -2))
    largest = np.maximum(1.0, np.abs(np.nan_to_num(vectors)).max(-1))
    if (wrong := rest > 1e-6 * largest).any():
        first = matrices.reshape(-1, 3, 3)[np.flatnonzero(wrong)[0]]
        raise UserError(
            f"intrinsics {first.tolist()} are no pinhole without skew; allowed is [[fx, 0, cx], [0, fy, cy], "
            "[0, 0, 1]]: take skew out, and check that the matrix is not transposed or scaled"
        )
    return vectors


def _check_values(values: np.ndarray, height: int, width: int) -> None:
    def refuse(wrong: np.ndarray, what: str, advice: str) -> None:
        if wrong.any():
            frame = int(np.flatnonzero(wrong)[0])
            shown = ", ".join(f"{value:g}" for value in values[frame])
            raise UserError(f"intrinsics fx, fy, cx, cy = {shown} (frame {frame}): {what}: {advice}")

    refuse(~np.isfinite(values).all(1), "allowed are finite numbers", "look at how they were made")
    refuse((values[:, :2] <= 0).any(1), "focal lengths are allowed above 0", "give them in pixels")
    outside = ((values[:, 2:] < 0) | (values[:, 2:] > (width, height))).any(1)
    refuse(
        outside,
        f"the principal point is outside the image, which is {width} wide and {height} high",
        f"give it in pixels of this image, as it was before resizing; its middle is {width / 2:g}, {height / 2:g}",
    )


def _warn_of_field(values: np.ndarray, height: int, width: int, say: Callable[[str], None]) -> None:
    fields = field_of_view(values, height, width)
    wider = fields.max(1)
    wrong = (wider < NARROWEST_FIELD) | (wider > WIDEST_FIELD)
    if wrong.any():
        frame = int(np.flatnonzero(wrong)[0])
        say(
            f"intrinsics: the field of view is {fields[frame, 0]:.1f} x {fields[frame, 1]:.1f} degrees (frame {frame}),"
            f" outside {NARROWEST_FIELD:g} to {WIDEST_FIELD:g}: are fx and fy in pixels of the {height}x{width} image?"
        )


def field_of_view(intrinsics: Float[np.ndarray, "F 4"], height: int, width: int) -> Float[np.ndarray, "F 2"]:
    """Degrees that a picture spans across and down, also where the principal point is not in its middle."""
    focal, centre = np.asarray(intrinsics, np.float64)[:, :2], np.asarray(intrinsics, np.float64)[:, 2:]
    return np.rad2deg(np.arctan(centre / focal) + np.arctan((np.array([width, height]) - centre) / focal))


def intrinsics_of_field(degrees: float, height: int, width: int) -> Float[np.ndarray, "4"]:
    """Intrinsics of a camera of square pixels that looks through the middle and spans ``degrees`` across.

    Raises:
        UserError: an angle that is not above 0 and below 180.
    """
    if not 0.0 < degrees < 180.0:
        raise UserError(f"a field of view of {degrees} degrees is not allowed; choose above 0 and below 180, best 60")
    focal = width / 2 / math.tan(math.radians(degrees) / 2)
    return np.array([focal, focal, width / 2, height / 2], np.float32)


def intrinsics_matrices(intrinsics: Float[np.ndarray, "F 4"]) -> Float[np.ndarray, "F 3 3"]:
    """(F, 4) -> matrices [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]; the dtype stays."""
    matrices = np.zeros((*intrinsics.shape[:-1], 3, 3), intrinsics.dtype)
    matrices[..., (0, 1, 0, 1), (0, 1, 2, 2)] = intrinsics
    matrices[..., 2, 2] = 1.0
    return matrices


def scale_intrinsics(
    intrinsics: Float[np.ndarray, "F 4"], source: tuple[int, int], target: tuple[int, int]
) -> Float[np.ndarray, "F 4"]:
    """Intrinsics of a picture that is resized from ``source`` to ``target`` (height, width), such as a latent grid."""
    across, down = target[1] / source[1], target[0] / source[0]
    scaled = np.asarray(intrinsics, np.float64) * np.array([across, down, across, down])
    return scaled.astype(np.asarray(intrinsics).dtype)


@dataclasses.dataclass(frozen=True)
class ResizeAndCrop:
    """A resize that keeps the shape of pixels, and a crop to the middle, all in pixels.

    Attributes:
        source: height and width of the picture as it is given.
        resized: after the resize: both sides cover the target, one of them exactly.
        target: after the crop.
        offset: rows and columns that are cropped above and on the left.
    """

    source: tuple[int, int]
    resized: tuple[int, int]
    target: tuple[int, int]
    offset: tuple[int, int]

    @property
    def cropped(self) -> float:
        """The share of the resized picture that the crop takes away."""
        return 1.0 - math.prod(self.target) / math.prod(self.resized)

    def intrinsics(self, intrinsics: Float[np.ndarray, "F 4"]) -> Float[np.ndarray, "F 4"]:
        """The intrinsics of the resized and cropped picture, in its own pixels; the dtype stays."""
        moved = scale_intrinsics(intrinsics, self.source, self.resized)
        moved[..., 2] -= self.offset[1]
        moved[..., 3] -= self.offset[0]
        return moved

    def image(self, image: Image.Image) -> Image.Image:
        """The picture resized with Lanczos's filter and cropped.

        Raises:
            UserError: a picture of another size than ``source``.
        """
        from PIL import Image

        if (image.height, image.width) != self.source:
            raise UserError(
                f"the image is {image.height}x{image.width}, and what is done to it was planned for "
                f"{self.source[0]}x{self.source[1]} (height x width); plan it anew with plan_resize_and_crop"
            )
        (top, left), (height, width) = self.offset, self.target
        resized = image.resize(self.resized[::-1], Image.Resampling.LANCZOS)
        return resized.crop((left, top, left + width, top + height))


def plan_resize_and_crop(source: tuple[int, int], target: tuple[int, int]) -> ResizeAndCrop:
    """How a picture of ``source`` (height, width) becomes one of ``target``: cover it, then crop to the middle.

    Sizes are rounded to the nearest pixel (halves to even numbers), offsets down.

    Raises:
        UserError: a side below 1 pixel.
    """
    if min(*source, *target) < 1:
        raise UserError(f"sizes {source} to {target} are not allowed; choose heights and widths of 1 pixel or more")
    scale = max(target[0] / source[0], target[1] / source[1])
    resized = tuple(max(wanted, round(side * scale)) for side, wanted in zip(source, target, strict=True))
    offset = tuple((side - wanted) // 2 for side, wanted in zip(resized, target, strict=True))
    return ResizeAndCrop(source=tuple(source), resized=resized, target=tuple(target), offset=offset)
