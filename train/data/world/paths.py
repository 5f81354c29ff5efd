"""The camera's path beside a video: read, checked, and brought to the frames and the size of a clip."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.world_data import WorldDataConfig
from kernels.typing import Float
from sana_jax.camera import (
    check_poses,
    intrinsics_of_field,
    opengl_to_opencv,
    read_intrinsics,
    relative_poses,
    scale_intrinsics,
)
from sana_jax.errors import UserError, reason_of
from train.data.conditions import View
from train.data.decoding import BadPicture, covering_size, crop_offset
from train.data.video.windows import tolerance

POSES, INTRINSICS = "c2w", "intrinsics"  # arrays of a record
FRAMES_SHOWN = "those shown, by the times of the whole video"  # of a clip, whose poses it gets; part of a cache's key
# What they are called in files and in metadata; the first name that is there is read.
CAMERA_NAMES: Mapping[str, tuple[str, ...]] = {
    POSES: (POSES, "poses", "camera_to_world"),
    INTRINSICS: (INTRINSICS, "K"),
}
_ONLY = "npy"  # the only array of an .npy file


class CameraPath(NamedTuple):
    """A camera's path, a pose for every frame of a video.

    Attributes:
        c2w: camera-to-world matrices with OpenCV's axes.
        intrinsics: fx, fy, cx, cy in pixels of the video.
    """

    c2w: Float[np.ndarray, "N 4 4"]
    intrinsics: Float[np.ndarray, "N 4"]


def load_arrays(content: bytes, name: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz or .npy file.

    Raises:
        BadPicture: it holds none.
    """
    try:
        found = np.load(io.BytesIO(content), allow_pickle=False)
        return {"npy": found} if isinstance(found, np.ndarray) else dict(found.items())
    except Exception as error:  # damaged files make numpy raise anything
        raise BadPicture(name, f"holds no arrays ({reason_of(error, 100)})") from error


def camera_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Poses and intrinsics of one source as ``c2w`` and ``intrinsics``, whatever it calls them, where it has them."""
    there = {name for name, value in values.items() if value is not None}
    found = {kind: next((name for name in names if name in there), None) for kind, names in CAMERA_NAMES.items()}
    return {kind: values[name] for kind, name in found.items() if name is not None}


def read_path(arrays: Mapping[str, np.ndarray], name: str, size: tuple[int, int], data: WorldDataConfig) -> CameraPath:
    """A path as a file holds it; nothing of it is checked but that it is there.

    Args:
        arrays: of the file.
        name: of the video, for messages.
        size: height and width of the video in pixels.
        data: ``axes`` and ``field_of_view`` are used.

    Raises:
        BadPicture: there is no path, or there are no intrinsics.
    """
    camera = camera_of(arrays)
    poses = camera.get(POSES, arrays.get(_ONLY))
    if poses is None:
        file = f"{Path(name).stem}.npz"
        there = f" ({file} has {', '.join(arrays)})" if arrays else ""
        raise BadPicture(
            name, f"has no camera; write {file} beside it with {POSES} (frames, 4, 4) and {INTRINSICS}{there}"
        )
    intrinsics = camera.get(INTRINSICS)
    if intrinsics is None:
        if data.field_of_view is None:
            raise BadPicture(name, "has poses and no intrinsics; save them beside c2w, or give --data.field-of-view")
        intrinsics = intrinsics_of_field(data.field_of_view, *size)
    poses = np.asarray(poses)
    if data.axes == "opengl" and poses.ndim == 3 and poses.shape[1:] == (4, 4):
        poses = opengl_to_opencv(poses)
    return CameraPath(poses, np.asarray(intrinsics))


def check_path(path: CameraPath, name: str, size: tuple[int, int]) -> tuple[str, ...]:
    """Looks at a whole path; returns lines about what is unusual.

    Raises:
        BadPicture: poses that are not rigid or not finite, or intrinsics that are none of this video.
    """
    said: list[str] = []
    try:
        check_poses(path.c2w, f"c2w of {name}", said.append)
        read_intrinsics(path.intrinsics, len(path.c2w), *size, said.append)
    except UserError as error:
        raise BadPicture(name, f"has a camera that can't be used: {error}") from error
    return tuple(said)


def check_count(path: CameraPath, name: str, frames: int) -> bool:
    """Whether there is a pose for every frame, or one more or fewer, as where a video's length is rounded.

    Raises:
        BadPicture: the numbers differ by more.
    """
    count = len(path.c2w)
    if abs(count - frames) > 1:
        raise BadPicture(name, f"has {count} poses for {frames} frames; a path has one for every frame of the video")
    return count == frames


def frames_shown(start: int, count: int, fps: float, seconds: Float[np.ndarray, " N"], source_fps: float) -> np.ndarray:
    """Which frames of a video a clip shows, by the rule of ``read_clips``: int (count,).

    Args:
        start: the clip's first frame at ``fps``.
        count: its frames.
        fps: of the clip.
        seconds: times of all frames of the video, rising.
        source_fps: of the video.
    """
    latest = (start + np.arange(count)) / fps + tolerance(1.0 / source_fps, fps)
    return np.maximum(np.searchsorted(seconds, latest, side="right") - 1, 0)


def clip_path(path: CameraPath, shown: np.ndarray, size: tuple[int, int], view: View) -> CameraPath:
    """The path of a clip, float32: poses relative to its first frame, and intrinsics in pixels of the clip.

    Args:
        path: of the whole video.
        shown: which of its frames the clip shows.
        size: height and width of the video.
        view: how its frames are scaled and cut.
    """
    places = np.clip(shown, 0, len(path.c2w) - 1)
    scaled = covering_size(size, view.height, view.width)
    top, left = crop_offset(scaled, view.height, view.width, view.crop)
    moved = scale_intrinsics(rows_of_intrinsics(path.intrinsics, len(path.c2w))[places], size, scaled)
    moved[:, 2:] -= (left, top)
    return CameraPath(relative_poses(path.c2w[places]), moved.astype(np.float32))


def rows_of_intrinsics(intrinsics: np.ndarray, count: int) -> Float[np.ndarray, "N 4"]:
    """Intrinsics in any of the four forms as float64 fx, fy, cx, cy of each of ``count`` frames."""
    values = np.asarray(intrinsics, np.float64)
    if values.shape[-2:] == (3, 3):
        values = values[..., (0, 1, 0, 1), (0, 1, 2, 2)]
    return np.tile(values, (count, 1)) if values.ndim == 1 else values[:count]


def path_between(path: CameraPath, factor: int) -> CameraPath:
    """A path of latent frames as one of pixel frames: turned and moved evenly from each pose to the next.

    Args:
        path: T poses.
        factor: pixel frames from one latent frame to the next.

    Returns:
        1 + factor·(T - 1) poses.
    """
    c2w, count = np.asarray(path.c2w, np.float64), len(path.c2w)
    intrinsics = rows_of_intrinsics(path.intrinsics, count)
    places = np.arange(factor * (count - 1) + 1) / factor
    before = np.minimum(places.astype(np.int64), max(count - 2, 0))
    after, share = np.minimum(before + 1, count - 1), places - before
    between = c2w[before]
    turns = np.swapaxes(c2w[before, :3, :3], -1, -2) @ c2w[after, :3, :3]
    between[:, :3, :3] = c2w[before, :3, :3] @ _part_of_turn(turns, share)
    between[:, :3, 3] += share[:, None] * (c2w[after, :3, 3] - c2w[before, :3, 3])
    moved = intrinsics[before] + share[:, None] * (intrinsics[after] - intrinsics[before])
    return CameraPath(between, moved)


def _part_of_turn(turns: Float[np.ndarray, "N 3 3"], share: Float[np.ndarray, " N"]) -> Float[np.ndarray, "N 3 3"]:
    """A share of each rotation, about its own axis (Rodrigues' formula)."""
    skew = (turns - np.swapaxes(turns, -1, -2)) / 2
    axes = np.stack([skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0]], axis=-1)
    sines = np.linalg.norm(axes, axis=-1)
    angles = np.arctan2(sines, (np.trace(turns, axis1=1, axis2=2) - 1) / 2)
    unit = skew / np.maximum(sines, 1e-12)[:, None, None]
    part = (share * angles)[:, None, None]
    return np.eye(3) + np.sin(part) * unit + (1 - np.cos(part)) * (unit @ unit)
