"""How a camera moved, recovered from the pixels of a clip alone, and compared with the path that was asked for.

A clip shows a plane that is one unit in front of its first camera. Every further frame is aligned directly with the
first one: Gauss-Newton steps on the four numbers of a pose that keys can change (yaw, pitch, place to the right and
ahead) make the difference of the colours small that both frames see of the plane. What was asked for is not looked at:
a frame's search begins where the frame before was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernels.typing import Array, Bool, Float
from sana_jax.camera import invert_poses
from train.data.video.moving_camera import plane_points

_BLURS = (1.5, 0.0)  # pixels: coarse alignment and then fine
_STEPS = 10  # at most, for each of them
_DIFFERENCE = 1e-4  # radians and units, of numerical derivatives
_DAMPING = 1e-3
_CONVERGED = 1e-4  # radians and units of a step
_LEAST_OVERLAP = 0.2  # of a frame


@dataclass(frozen=True)
class PathErrors:
    """How far paths are from those asked for; medians over all clips and all frames but the first.

    Attributes:
        rotation: degrees of the rotation that leads from one to the other.
        translation: units; the plane is one unit in front of the first camera.
        pixels: mean distance by which the plane is displaced in the picture.
    """

    rotation: float
    translation: float
    pixels: float

    def times(self, other: PathErrors) -> dict[str, float]:
        """How many times another's errors these are, each."""
        return {name: getattr(self, name) / max(getattr(other, name), 1e-9) for name in ERRORS}


ERRORS = ("rotation", "translation", "pixels")


@dataclass(frozen=True)
class CameraFigures:
    """What was measured.

    Attributes:
        clips: how many.
        requested: recovered paths against those asked for.
        shuffled: the same recovered paths against those asked for in the other clips.
        ratio: how many times ``requested`` is in ``shuffled``, by name of the error.
        floor: what the measurement finds in the true videos of the same paths, from the same first frames.
        still: the error of a camera that never moves.
        opposite: median cosine of the motion recovered from a clip and that of the clip of opposite keys; 1 is the same
            direction, -1 the reverse.
        opposite_requested: the same of what was asked for; turned and then moved, it is not exactly -1.
        reversed: share of clips whose motion has a negative cosine with that of the opposite keys.
        pixel_error: root mean square difference of the frames, the first left out, from the true video, where this
            shows what the first frame shows; of pixels in [-1, 1].
    """

    clips: int
    requested: PathErrors
    shuffled: PathErrors
    ratio: dict[str, float]
    floor: PathErrors
    still: PathErrors
    opposite: float
    opposite_requested: float
    reversed: float
    pixel_error: float


def pose_of(motion: Float[np.ndarray, "*N 6"]) -> Float[np.ndarray, "*N 4 4"]:
    """Camera-to-world matrices of a rotation vector (radians) and a place (units)."""
    vector = np.asarray(motion[..., :3], np.float64)
    angle = np.linalg.norm(vector, axis=-1)[..., None, None]
    cross = np.cross(np.eye(3), vector[..., None, :])  # its rows are e_i × v: the matrix of v × is its negative's ᵀ
    small = np.maximum(angle, 1e-12)
    pose = np.tile(np.eye(4), (*vector.shape[:-1], 1, 1))
    pose[..., :3, :3] += np.sin(small) / small * cross + (1 - np.cos(small)) / small**2 * (cross @ cross)
    pose[..., :3, 3] = motion[..., 3:]
    return pose


def motion_of(poses: Float[np.ndarray, "*N 4 4"]) -> Float[np.ndarray, "*N 6"]:
    """The inverse of ``pose_of``, for rotations of less than half a turn."""
    rotation = np.asarray(poses, np.float64)[..., :3, :3]
    turned = np.stack([rotation[..., i, j] - rotation[..., j, i] for i, j in ((2, 1), (0, 2), (1, 0))], -1) / 2
    sine = np.linalg.norm(turned, axis=-1, keepdims=True)
    cosine = (np.trace(rotation, axis1=-2, axis2=-1)[..., None] - 1) / 2
    scale = np.arctan2(sine, cosine) / np.maximum(sine, 1e-12)
    return np.concatenate([turned * scale, np.asarray(poses)[..., :3, 3]], axis=-1)


def camera_pose(motion: Float[np.ndarray, "*N 4"]) -> Float[np.ndarray, "*N 4 4"]:
    """Camera-to-world matrices of yaw (radians, to the right), pitch (upwards), and units to the right and ahead.

    As ``sana_jax.camera.integrate_motion`` makes them: R_y(yaw)·R_x(pitch), at a constant height.
    """
    yaw, pitch, right, ahead = np.moveaxis(np.asarray(motion, np.float64), -1, 0)
    zero = np.zeros_like(yaw)
    turns = [pose_of(np.stack(part + [zero] * 3, -1)) for part in ([zero, yaw, zero], [pitch, zero, zero])]
    pose = turns[0] @ turns[1]
    pose[..., 0, 3], pose[..., 2, 3] = right, ahead
    return pose


def places_in_first(
    poses: Float[np.ndarray, "N 4 4"], intrinsics: Float[np.ndarray, "4"], height: int, width: int
) -> Float[np.ndarray, "N H W 2"]:
    """(row, column) in the first frame of what the pixels of frames at these poses show; NaN where they miss it."""
    fx, fy, cx, cy = np.asarray(intrinsics, np.float64)
    points = plane_points(poses, intrinsics, height, width)
    return np.stack([points[..., 1] * fy + cy, points[..., 0] * fx + cx], axis=-1)


def inside(places: Float[np.ndarray, "*N 2"], height: int, width: int) -> Bool[np.ndarray, "*N"]:
    """Whether places are in a frame."""
    rows, columns = places[..., 0], places[..., 1]
    return (rows >= 0) & (rows <= height - 1) & (columns >= 0) & (columns <= width - 1)


def recover_poses(frames: Float[np.ndarray, "F H W C"], intrinsics: Float[np.ndarray, "4"]) -> Float[Array, "F 4 4"]:
    """The camera-to-world matrices of a clip's frames, from its pixels; the first is the identity.

    Args:
        frames: colours; of the plane z = 1.
        intrinsics: fx, fy, cx, cy in pixels.
    """
    from scipy.ndimage import gaussian_filter

    frames = np.asarray(frames, np.float64)
    found = np.zeros((len(frames), 4))
    blurred = [gaussian_filter(frames, (0, blur, blur, 0), mode="nearest") if blur else frames for blur in _BLURS]
    for frame in range(1, len(frames)):
        motion = found[frame - 1]
        for level in blurred:
            motion = _aligned(level[0], level[frame], motion, intrinsics)
        found[frame] = motion
    return camera_pose(found)


def _aligned(first: np.ndarray, other: np.ndarray, start: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """The motion near ``start`` at which the first frame, seen from there, differs least from another one."""
    from scipy.ndimage import map_coordinates, spline_filter

    height, width, channels = first.shape
    splines = [spline_filter(first[..., channel], order=3, mode="mirror") for channel in range(channels)]
    steps = np.concatenate([np.zeros((1, 4)), _DIFFERENCE * np.eye(4)])
    beside = _DIFFERENCE * np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # pixels

    def compared(motion: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """What is left to explain where frames overlap (N,), its slopes (N, 4), and its mean square."""
        places = places_in_first(camera_pose(motion + steps), intrinsics, height, width)
        seen = inside(places[0], height, width) & np.isfinite(places).all((0, 3))
        if seen.mean() < _LEAST_OVERLAP:
            return np.zeros(0), np.zeros((0, 4)), np.inf
        places = places[:, seen]
        at = np.moveaxis(places[0] + beside[:, None], -1, 0)
        warped = np.stack([map_coordinates(spline, at, order=3, mode="mirror", prefilter=False) for spline in splines])
        residual = warped[:, 0] - other[seen].T
        in_picture = (warped[:, 1:] - warped[:, :1]) / _DIFFERENCE  # (C, row and column, pixels)
        by_motion = (places[1:] - places[:1]) / _DIFFERENCE  # (4, pixels, row and column)
        slopes = np.einsum("cap,mpa->cpm", in_picture, by_motion)
        return residual.ravel(), slopes.reshape(-1, 4), float(np.square(residual).mean())

    motion, damping = start, _DAMPING
    residual, slopes, best = compared(motion)
    for _ in range(_STEPS):
        normal = slopes.T @ slopes
        change = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), -slopes.T @ residual)
        tried = compared(motion + change)
        if tried[2] < best:
            motion, damping, (residual, slopes, best) = motion + change, damping / 4, tried
        else:
            damping *= 8
        if np.abs(change).max() < _CONVERGED:
            break
    return motion


def path_errors(
    recovered: Float[np.ndarray, "*N 4 4"],
    asked: Float[np.ndarray, "*N 4 4"],
    intrinsics: Float[np.ndarray, "4"],
    side: int,
) -> dict[str, Float[np.ndarray, "*N"]]:
    """Every pose's errors, by the names of ``PathErrors``.

    Args:
        recovered: camera-to-world matrices.
        asked: the same, as they should be.
        intrinsics: fx, fy, cx, cy in pixels.
        side: pixels along each side of a frame.
    """
    recovered, asked = np.asarray(recovered, np.float64), np.asarray(asked, np.float64)
    between = motion_of(invert_poses(recovered) @ asked)
    flat = [poses.reshape(-1, 4, 4) for poses in (recovered, asked)]
    found, wanted = (places_in_first(poses, intrinsics, side, side) for poses in flat)
    displaced = np.where(inside(wanted, side, side), np.linalg.norm(found - wanted, axis=-1), np.nan)
    return {
        "rotation": np.rad2deg(np.linalg.norm(between[..., :3], axis=-1)),
        "translation": np.linalg.norm(recovered[..., :3, 3] - asked[..., :3, 3], axis=-1),
        "pixels": np.nanmean(displaced, axis=(1, 2)).reshape(recovered.shape[:-2]),
    }


def median_errors(
    recovered: Float[np.ndarray, "N F 4 4"],
    asked: Float[np.ndarray, "N F 4 4"],
    intrinsics: Float[np.ndarray, "4"],
    side: int,
    shuffled: bool = False,
) -> PathErrors:
    """The medians over clips and frames; ``shuffled`` compares each clip with what was asked for in all others."""
    rows, columns = np.arange(len(recovered)), np.arange(len(recovered))
    if shuffled:
        rows, columns = np.nonzero(~np.eye(len(recovered), dtype=bool))
    errors = path_errors(recovered[rows, 1:], asked[columns, 1:], intrinsics, side)
    return PathErrors(**{name: float(np.nanmedian(values)) for name, values in errors.items()})


def cosines(
    one: Float[np.ndarray, "N F 4 4"], other: Float[np.ndarray, "N F 4 4"], speeds: tuple[float, float]
) -> Float[np.ndarray, " N"]:
    """Of every clip's motions at all frames, a key's turn and a key's step being worth the same.

    Args:
        one: camera-to-world matrices.
        other: the same.
        speeds: radians and units per frame of one key.
    """
    worth = np.repeat(1 / np.asarray(speeds), 3)
    first, second = ((motion_of(poses[:, 1:]) * worth).reshape(len(poses), -1) for poses in (one, other))
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(1) / np.maximum(lengths, 1e-12)


def measure(
    clips: Float[np.ndarray, "N F H W 3"],
    true_clips: Float[np.ndarray, "N F H W 3"],
    asked: Float[np.ndarray, "N F 4 4"],
    intrinsics: Float[np.ndarray, "4"],
    speeds: tuple[float, float],
) -> CameraFigures:
    """Compares clips with the paths that were asked for.

    Args:
        clips: in [-1, 1]; clips 2k and 2k + 1 have opposite keys.
        true_clips: the rendered videos of the same paths.
        asked: camera-to-world matrices.
        intrinsics: fx, fy, cx, cy in pixels.
        speeds: radians and units per frame of one key.
    """
    side = clips.shape[2]
    recovered, floor = (np.stack([recover_poses(clip, intrinsics) for clip in many]) for many in (clips, true_clips))

    def errors(poses: np.ndarray, shuffled: bool = False) -> PathErrors:
        return median_errors(poses, asked, intrinsics, side, shuffled)

    requested, shuffled = errors(recovered), errors(recovered, shuffled=True)
    turned = cosines(recovered[::2], recovered[1::2], speeds)
    seen = inside(places_in_first(asked.reshape(-1, 4, 4), intrinsics, side, side), side, side)
    seen = seen.reshape(asked.shape[:2] + seen.shape[1:])
    seen[:, 0] = False
    return CameraFigures(
        clips=len(clips),
        requested=requested,
        shuffled=shuffled,
        ratio=shuffled.times(requested),
        floor=errors(floor),
        still=errors(np.broadcast_to(np.eye(4), asked.shape)),
        opposite=float(np.median(turned)),
        opposite_requested=float(np.median(cosines(asked[::2], asked[1::2], speeds))),
        reversed=float((turned < 0).mean()),
        pixel_error=float(np.sqrt(np.square(clips - true_clips)[seen].mean())),
    )


def describe(figures: CameraFigures) -> Sequence[str]:
    """One line for each figure."""

    def line(name: str, errors: PathErrors) -> str:
        return f"{name:<34} {errors.rotation:.2f} deg, {errors.translation:.4f} units, {errors.pixels:.2f} px"

    ratio = figures.ratio
    return [
        f"clips                              {figures.clips}",
        line("median error", figures.requested),
        line("  of true videos (the floor)", figures.floor),
        line("  against other clips' paths", figures.shuffled),
        line("  of a camera that never moves", figures.still),
        f"shuffled over requested            {ratio['rotation']:.1f}x, {ratio['translation']:.1f}x, "
        f"{ratio['pixels']:.1f}x",
        f"opposite keys, median cosine       {figures.opposite:.2f} (asked for {figures.opposite_requested:.2f})",
        f"opposite keys, motion reversed     {figures.reversed:.1%} of pairs",
        f"difference from the true videos    {figures.pixel_error:.3f} (root mean square, pixels in [-1, 1])",
    ]
