"""Features seen from the camera's rays: what queries, keys and values are turned by before attention, and back after.

Unified camera positional encoding (UCPE), as SANA-WM has it. Every token has a rigid 4x4 matrix P that leads from the
world into the frame of its ray (``sana_jax.camera.ray_matrices``). The first half of a head's channels are groups of
four, which P moves; the second half turns by rotary positions. Queries are moved by Pᵀ, keys and values by P⁻¹, so
that a query meets a key through the pose of one ray relative to the other, P_query P_key⁻¹. The result is led back by
the query's P.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels.linear_attention.rotation import rotate_pairs
from kernels.typing import Array, Float
from sana_jax.nn.rope import Rotation, axis_channels

SHORTEST = 1e-6  # axes of a ray's frame are not divided by less
_RMS_EPSILON = 1e-6
_UP = np.array([0.0, -1.0, 0.0], np.float32)  # of the world: y points down
_TILT = np.float32(0.1)


class RayTransforms(NamedTuple):
    """What every attention layer turns by, float32.

    Attributes:
        matrices: P of every token, from the world into its ray's frame.
        inverses: P⁻¹.
        rotation: angles of the second half of a head; None for none.
    """

    matrices: Float[Array, "B T S 4 4"]
    inverses: Float[Array, "B T S 4 4"]
    rotation: Rotation | None


def ray_transforms(
    camera_conditions: Float[Array, "B T 20"],
    grid: tuple[int, int],
    patch_size: tuple[int, int],
    rotation: Rotation | None,
    head_dim: int,
) -> RayTransforms:
    """The transforms of all tokens, from the camera of every latent frame.

    Args:
        camera_conditions: pose relative to the first frame, row by row, then fx, fy, cx, cy in latent pixels.
        grid: rows and columns of tokens.
        patch_size: latent pixels per token, down and across.
        rotation: the tokens' angles for whole heads; of each axis the first are taken.
        head_dim: size of a head.
    """
    poses, intrinsics = _split(camera_conditions)
    scale = np.array([patch_size[1], patch_size[0]] * 2, np.float32)
    z = _in_world(poses, _directions(intrinsics / scale, *grid))
    x = _normalise(jnp.cross(poses[:, :, None, None, :3, 1], z), SHORTEST)
    y = _normalise(jnp.cross(z, x), SHORTEST)
    turn = jnp.stack([x, y, z], axis=-2)
    position = poses[:, :, None, None, :3, 3]
    batch, frames = camera_conditions.shape[:2]
    matrices = _rigid(turn, -_apply(turn, position)).reshape(batch, frames, -1, 4, 4)
    inverses = _rigid(jnp.swapaxes(turn, -1, -2), jnp.broadcast_to(position, z.shape)).reshape(matrices.shape)
    return RayTransforms(matrices, inverses, None if rotation is None else half_rotation(rotation, head_dim))


def half_rotation(rotation: Rotation, head_dim: int) -> Rotation:
    """The angles of half a head: of every axis the first, fastest ones of the whole head's."""
    whole, half = (np.array(axis_channels(size)) // 2 for size in (head_dim, head_dim // 2))
    firsts = np.cumsum([0, *whole[:2]])
    columns = np.concatenate([first + np.arange(count) for first, count in zip(firsts, half)])
    return Rotation(rotation.cos[:, columns], rotation.sin[:, columns])


def to_ray(
    x: Float[Array, "B T S h d"], matrices: Float[Array, "B T S 4 4"], rotation: Rotation | None
) -> Float[Array, "B T S h d"]:
    """Moves groups of four channels by the tokens' matrices, and turns the second half; float32."""
    batch, frames, tokens, heads, size = x.shape
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    groups = first.reshape(*first.shape[:-1], -1, 4)
    rows = matrices[:, :, :, None, None]
    moved = sum(rows[..., j] * groups[..., j, None] for j in range(4)).reshape(first.shape)
    if rotation is not None:
        shape = (batch, frames * tokens, heads, size // 2)
        second = rotate_pairs(second.reshape(shape), *rotation).reshape(first.shape)
    return jnp.concatenate([moved, second], axis=-1)


def query_to_ray(x: Float[Array, "B T S h d"], rays: RayTransforms) -> Float[Array, "B T S h d"]:
    """``to_ray`` by Pᵀ."""
    return to_ray(x, jnp.swapaxes(rays.matrices, -1, -2), rays.rotation)


def key_to_ray(x: Float[Array, "B T S h d"], rays: RayTransforms) -> Float[Array, "B T S h d"]:
    """``to_ray`` by P⁻¹; of values too."""
    return to_ray(x, rays.inverses, rays.rotation)


def from_ray(x: Float[Array, "B T S h d"], rays: RayTransforms) -> Float[Array, "B T S h d"]:
    """``to_ray`` by P, and the second half turned back."""
    rotation = rays.rotation
    return to_ray(x, rays.matrices, None if rotation is None else Rotation(rotation.cos, -rotation.sin))


def shrink_to(reference: Float[Array, "*N d"], x: Float[Array, "*N d"]) -> Float[Array, "*N d"]:
    """``x``, made smaller where its root mean square exceeds the reference's."""
    wanted, found = (jnp.sqrt(jnp.square(a).mean(-1, keepdims=True) + _RMS_EPSILON) for a in (reference, x))
    return x * jnp.minimum(wanted / found, 1.0)


def direction_map(camera_conditions: Float[Array, "B T 20"], height: int, width: int) -> Float[Array, "B T H W 3"]:
    """``sana_jax.camera.direction_map`` inside a compiled program: which way is up, and the latitude.

    Args:
        camera_conditions: as in ``ray_transforms``.
        height: H, rows of latent pixels.
        width: W, columns of latent pixels.
    """
    poses, intrinsics = _split(camera_conditions)
    rays = _in_world(poses, _directions(intrinsics, height, width))
    latitude = jnp.arctan2(-rays[..., 1], jnp.hypot(rays[..., 0], rays[..., 2]))
    axis = _normalise(jnp.cross(rays, _UP), 1e-8)
    third = axis**2 * rays.sum(axis=-1, keepdims=True)  # as the reference has it, see sana_jax.camera.direction_map
    tilted = rays * np.cos(_TILT) + jnp.cross(axis, rays) * np.sin(_TILT) + third * (1 - np.cos(_TILT))
    in_camera = _apply(jnp.swapaxes(poses[..., :3, :3], -1, -2)[:, :, None, None], tilted)
    fx, fy, cx, cy = jnp.moveaxis(intrinsics, -1, 0)[..., None, None]
    across = fx * in_camera[..., 0] / in_camera[..., 2] + cx - np.arange(width, dtype=np.float32)
    down = fy * in_camera[..., 1] / in_camera[..., 2] + cy - np.arange(height, dtype=np.float32)[:, None]
    up = _normalise(jnp.stack([across, down], axis=-1), 1e-8)
    return jnp.concatenate([up, latitude[..., None]], axis=-1)


def _split(conditions: Array) -> tuple[Array, Array]:
    conditions = conditions.astype(jnp.float32)
    return conditions[..., :16].reshape(*conditions.shape[:-1], 4, 4), conditions[..., 16:]


def _directions(intrinsics: Array, height: int, width: int) -> Array:
    fx, fy, cx, cy = jnp.moveaxis(intrinsics, -1, 0)[..., None, None]
    across = (np.arange(width, dtype=np.float32) - cx) / fx
    down = (np.arange(height, dtype=np.float32)[:, None] - cy) / fy
    across, down = jnp.broadcast_arrays(across, down)
    return _normalise(jnp.stack([across, down, jnp.ones_like(across)], axis=-1))


def _in_world(poses: Array, directions: Array) -> Array:
    return _normalise(_apply(poses[:, :, None, None, :3, :3], directions), 1e-8)


def _apply(matrix: Array, vector: Array) -> Array:
    """Sums written out: a product of 3x3 matrices per token would be rounded by a device's fast matrix units."""
    return sum(matrix[..., j] * vector[..., j, None] for j in range(3))


def _rigid(turn: Array, shift: Array) -> Array:
    top = jnp.concatenate([turn, jnp.broadcast_to(shift, turn.shape[:-1])[..., None]], axis=-1)
    last = jnp.broadcast_to(np.array([[0, 0, 0, 1]], np.float32), (*top.shape[:-2], 1, 4))
    return jnp.concatenate([top, last], axis=-2)


def _normalise(vectors: Array, shortest: float = 0.0) -> Array:
    length = jnp.sqrt(jnp.square(vectors).sum(-1, keepdims=True))
    return vectors / (length if shortest == 0.0 else jnp.maximum(length, shortest))
