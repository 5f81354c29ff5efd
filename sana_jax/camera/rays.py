"""What SANA-WM is told of a camera: 20 numbers per latent frame, Plücker coordinates, and a matrix per token.

Float32 arrays made on the host from float64, so that they are the same on every machine. Grids have H rows and W
columns of tokens; intrinsics are in their pixels. Rays leave through integer pixel coordinates, without half-pixel
offset.

Sources: Plücker coordinates of rays as in Light Field Networks (arXiv 2106.02634); matrices per ray and the map of
directions from unified camera positional encoding (UCPE); packing as in diffusers 0.42.1.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from sana_jax.camera.intrinsics import scale_intrinsics
from sana_jax.camera.trajectories import relative_poses
from sana_jax.errors import UserError

if TYPE_CHECKING:
    from kernels.typing import Float

_SHORTEST = 1e-6  # axes of a ray's frame are not divided by less
_UP = np.array([0.0, -1.0, 0.0])  # of the world: y points down
_TILT = 0.1  # radians by which a ray is tilted upwards to see where up is in the picture


@dataclasses.dataclass(frozen=True)
class CameraInputs:
    """The camera of one video as SANA-WM takes it.

    Attributes:
        conditions: (T, 20) float32 per latent frame: the pose relative to frame 0, row by row, then fx, fy, cx, cy in
            pixels of the latent grid.
        chunk_plucker: (T, H, W, 6·temporal_factor) float32: Plücker coordinates of the pixel frames that a latent frame
            stands for, frame after frame.
    """

    conditions: Float[np.ndarray, "T 20"]
    chunk_plucker: Float[np.ndarray, "T H W 6s"]


def camera_inputs(
    c2w: Float[np.ndarray, "F 4 4"],
    intrinsics: Float[np.ndarray, "F 4"],
    *,
    height: int,
    width: int,
    temporal_factor: int = 8,
    spatial_factor: int = 32,
) -> CameraInputs:
    """Poses and intrinsics of all pixel frames -> what the network is given.

    Latent frame k takes the pose of pixel frame k·temporal_factor, T = 1 + (F − 1) // temporal_factor; its chunk of
    Plücker coordinates are the temporal_factor frames that end there. The first latent frame has none before it and
    takes the frames 0 to temporal_factor − 1; the last frame is repeated where there are fewer.

    Args:
        c2w: camera-to-world matrices; only where they are relative to the first matters.
        intrinsics: fx, fy, cx, cy in pixels of the video.
        height: of the video, in pixels.
        width: the same.
        temporal_factor: pixel frames per latent frame.
        spatial_factor: pixels per side of a latent pixel.

    Raises:
        UserError: shapes that do not go together, or a video that is smaller than one latent pixel.
    """
    c2w, intrinsics = np.asarray(c2w), np.asarray(intrinsics)
    frames = len(c2w)
    if c2w.shape != (frames, 4, 4) or intrinsics.shape != (frames, 4) or not frames:
        raise UserError(
            f"poses of shape {c2w.shape} and intrinsics of shape {intrinsics.shape}; allowed is (F, 4, 4) and (F, 4): "
            "bring both to one number of frames, see check_poses and read_intrinsics"
        )
    grid = (height // spatial_factor, width // spatial_factor)
    if min(grid) < 1:
        raise UserError(
            f"a video of {height}x{width} is smaller than one latent pixel; choose {spatial_factor} or more for both"
        )
    poses = relative_poses(c2w)
    on_grid = scale_intrinsics(intrinsics, (height, width), grid).astype(np.float32)
    last = np.arange(0, frames, temporal_factor)
    conditions = np.concatenate([poses[last].reshape(len(last), 16), on_grid[last]], axis=1)
    first = np.maximum(0, last - (temporal_factor - 1))
    chunks = np.minimum(first[:, None] + np.arange(temporal_factor), frames - 1)
    used, place = np.unique(chunks, return_inverse=True)
    maps = plucker_map(poses[used], on_grid[used], *grid)[place.reshape(chunks.shape)]
    packed = np.moveaxis(maps, 1, 3).reshape(len(last), *grid, 6 * temporal_factor)
    return CameraInputs(conditions=conditions, chunk_plucker=np.ascontiguousarray(packed))


def camera_directions(intrinsics: Float[np.ndarray, "*F 4"], height: int, width: int) -> Float[np.ndarray, "*F H W 3"]:
    """Where the pixels of a grid look, as float64 unit vectors with the camera's axes.

    Args:
        intrinsics: fx, fy, cx, cy in pixels of the grid.
        height: H.
        width: W.
    """
    fx, fy, cx, cy = np.moveaxis(np.asarray(intrinsics, np.float64), -1, 0)[..., None, None]
    across = np.broadcast_to((np.arange(width) - cx) / fx, (*fx.shape[:-2], height, width))
    down = np.broadcast_to((np.arange(height)[:, None] - cy) / fy, across.shape)
    return _normalise(np.stack([across, down, np.ones_like(across)], axis=-1))


def plucker_map(
    c2w: Float[np.ndarray, "*F 4 4"], intrinsics: Float[np.ndarray, "*F 4"], height: int, width: int
) -> Float[np.ndarray, "*F H W 6"]:
    """Plücker coordinates of the rays of every pixel: direction d in the world, then moment t × d.

    Args:
        c2w: camera-to-world matrices.
        intrinsics: fx, fy, cx, cy in pixels of the grid.
        height: H.
        width: W.
    """
    poses = np.asarray(c2w, np.float64)
    directions = _in_world(poses, camera_directions(intrinsics, height, width))
    moments = np.cross(poses[..., None, None, :3, 3], directions)
    return np.concatenate([directions, moments], axis=-1).astype(np.float32)


def ray_matrices(
    conditions: Float[np.ndarray, "*T 20"], height: int, width: int, patch_size: tuple[int, int] = (1, 1)
) -> Float[np.ndarray, "*T H W 4 4"]:
    """UCPE: for every token the rigid matrix that leads from the world into the frame of its ray.

    A ray's frame stands where the camera stands; z is the ray, x is the camera's y axis × z, y is z × x. Their inverses
    are ``invert_poses`` of them.

    Args:
        conditions: poses and intrinsics per latent frame, see ``CameraInputs``.
        height: H, rows of tokens.
        width: W, columns of tokens.
        patch_size: latent pixels per token, down and across.
    """
    poses, intrinsics = split_conditions(conditions)
    on_tokens = intrinsics / np.array([patch_size[1], patch_size[0]] * 2)
    z = _in_world(poses, camera_directions(on_tokens, height, width))
    x = _normalise(np.cross(poses[..., None, None, :3, 1], z), _SHORTEST)
    y = _normalise(np.cross(z, x), _SHORTEST)
    matrices = np.zeros((*z.shape[:-1], 4, 4))
    matrices[..., :3, :3] = np.stack([x, y, z], axis=-2)
    matrices[..., :3, 3] = -np.einsum("...ij,...j->...i", matrices[..., :3, :3], poses[..., None, None, :3, 3])
    matrices[..., 3, 3] = 1.0
    return matrices.astype(np.float32)


def direction_map(conditions: Float[np.ndarray, "*T 20"], height: int, width: int) -> Float[np.ndarray, "*T H W 3"]:
    """UCPE's absolute map: which way is up at every pixel, and how far above the horizon it looks.

    Networks without Plücker coordinates after attention take it; the published ones do not.

    Args:
        conditions: poses and intrinsics per latent frame, see ``CameraInputs``.
        height: H, rows of latent pixels, not of tokens.
        width: W, columns of latent pixels.

    Returns:
        float32 (across, down) as a unit vector, in which a small tilt of the ray upwards moves it in the picture; and
        the latitude of the ray in radians.
    """
    poses, intrinsics = split_conditions(conditions)
    rays = _in_world(poses, camera_directions(intrinsics, height, width))
    latitude = np.arctan2(-rays[..., 1], np.hypot(rays[..., 0], rays[..., 2]))
    axis = _normalise(np.cross(rays, _UP), 1e-8)
    # Rodrigues' rotation of the ray, but for its third term: that one is axis·(axis · ray), zero here, in the textbook,
    # and axis²·(sum of the ray's parts) in the reference (diffusers 0.42.1), which is kept.
    third = axis**2 * rays.sum(axis=-1, keepdims=True)
    tilted = rays * np.cos(_TILT) + np.cross(axis, rays) * np.sin(_TILT) + third * (1 - np.cos(_TILT))
    in_camera = np.einsum("...ji,...hwj->...hwi", poses[..., :3, :3], tilted)
    fx, fy, cx, cy = np.moveaxis(intrinsics, -1, 0)[..., None, None]
    across = fx * in_camera[..., 0] / in_camera[..., 2] + cx - np.arange(width)
    down = fy * in_camera[..., 1] / in_camera[..., 2] + cy - np.arange(height)[:, None]
    up = _normalise(np.stack([across, down], axis=-1), 1e-8)
    return np.concatenate([up, latitude[..., None]], axis=-1).astype(np.float32)


def split_conditions(
    conditions: Float[np.ndarray, "*T 20"],
) -> tuple[Float[np.ndarray, "*T 4 4"], Float[np.ndarray, "*T 4"]]:
    """Poses and intrinsics of the 20 numbers per latent frame, as float64.

    Raises:
        UserError: another number than 20.
    """
    conditions = np.asarray(conditions, np.float64)
    if conditions.ndim < 1 or conditions.shape[-1] != 20:
        raise UserError(
            f"camera conditions of shape {conditions.shape}; allowed is (..., frames, 20): a pose row by row, then fx, "
            "fy, cx, cy, as camera_inputs makes them"
        )
    return conditions[..., :16].reshape(*conditions.shape[:-1], 4, 4), conditions[..., 16:]


def _in_world(poses: np.ndarray, directions: np.ndarray) -> np.ndarray:
    return _normalise(np.einsum("...ij,...hwj->...hwi", poses[..., :3, :3], directions), 1e-8)


def _normalise(vectors: np.ndarray, shortest: float = 0.0) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), shortest)
