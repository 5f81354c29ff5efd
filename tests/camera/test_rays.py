"""Rays, Plücker coordinates and matrices, against what they mean."""

from __future__ import annotations

import numpy as np
import pytest

from sana_jax.camera import (
    action_to_c2w,
    camera_directions,
    camera_inputs,
    direction_map,
    invert_poses,
    plucker_map,
    ray_matrices,
    split_conditions,
)
from sana_jax.errors import UserError

HEIGHT, WIDTH = 3, 5
POSES = action_to_c2w("wd-9,wl-9,wi-9", "v1")
INTRINSICS = np.tile(np.array([140.0, 150.0, 85.0, 40.0], np.float32), (len(POSES), 1))


@pytest.fixture(scope="module")
def inputs():
    return camera_inputs(POSES, INTRINSICS, height=32 * HEIGHT, width=32 * WIDTH)


def project(pose: np.ndarray, intrinsics: np.ndarray, point: np.ndarray) -> np.ndarray:
    x, y, z = pose[:3, :3].T @ (point - pose[:3, 3])
    return np.array([intrinsics[0] * x / z + intrinsics[2], intrinsics[1] * y / z + intrinsics[3]])


def test_rays_come_back_to_their_pixels():
    intrinsics = INTRINSICS[0] / 32
    directions = camera_directions(intrinsics, HEIGHT, WIDTH)
    assert directions.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=-1), 1)
    for row, column in ((0, 0), (2, 4), (1, 3)):
        pixel = project(np.eye(4), intrinsics, 7 * directions[row, column])
        np.testing.assert_allclose(pixel, [column, row], atol=1e-9)


def test_plucker_coordinates_are_those_of_the_line():
    """Moment = point × direction for every point of the ray, and direction ⟂ moment."""
    maps = plucker_map(POSES, INTRINSICS / 32, HEIGHT, WIDTH).astype(np.float64)
    assert maps.shape == (len(POSES), HEIGHT, WIDTH, 6)
    direction, moment = maps[..., :3], maps[..., 3:]
    np.testing.assert_allclose((direction * moment).sum(-1), 0, atol=1e-6)
    point = POSES[:, None, None, :3, 3] + 2.5 * direction
    np.testing.assert_allclose(np.cross(point, direction), moment, atol=1e-6)


def test_chunks(inputs):
    assert inputs.conditions.shape == (4, 20)
    assert inputs.chunk_plucker.shape == (4, HEIGHT, WIDTH, 48)
    assert inputs.conditions.dtype == inputs.chunk_plucker.dtype == np.float32
    maps = plucker_map(POSES, INTRINSICS / 32, HEIGHT, WIDTH)
    # frames 0..7 for the first latent frame, then the eight that end at 8, 16, 24
    for latent, first in enumerate((0, 1, 9, 17)):
        expected = np.concatenate(list(maps[first : first + 8]), axis=-1)
        np.testing.assert_allclose(inputs.chunk_plucker[latent], expected, atol=1e-6)
    poses, intrinsics = split_conditions(inputs.conditions)
    np.testing.assert_allclose(poses, POSES[::8][:4], atol=1e-6)
    np.testing.assert_allclose(intrinsics, INTRINSICS[:4] / 32)


def test_only_relative_poses_matter(inputs):
    somewhere = invert_poses(action_to_c2w("wl-40,i-20,d-9").astype(np.float64))[-1]
    moved = camera_inputs(somewhere @ POSES, INTRINSICS, height=32 * HEIGHT, width=32 * WIDTH)
    np.testing.assert_allclose(moved.conditions, inputs.conditions, atol=1e-6)
    np.testing.assert_allclose(moved.chunk_plucker, inputs.chunk_plucker, atol=1e-6)
    again = camera_inputs(POSES, INTRINSICS, height=32 * HEIGHT, width=32 * WIDTH)
    np.testing.assert_array_equal(again.chunk_plucker, inputs.chunk_plucker)


@pytest.mark.parametrize("frames", [1, 3, 8, 9, 10])
def test_short_videos_repeat_their_last_frame(frames):
    inputs = camera_inputs(POSES[:frames], INTRINSICS[:frames], height=32 * HEIGHT, width=32 * WIDTH)
    maps = plucker_map(POSES[:frames], INTRINSICS[:frames] / 32, HEIGHT, WIDTH)
    assert len(inputs.conditions) == len(inputs.chunk_plucker) == (frames + 7) // 8
    chunk = inputs.chunk_plucker[0].reshape(HEIGHT, WIDTH, 8, 6)
    for place in range(8):
        np.testing.assert_allclose(chunk[:, :, place], maps[min(place, frames - 1)], atol=1e-6)


def test_ray_matrices_put_the_ray_on_z(inputs):
    matrices = ray_matrices(inputs.conditions, HEIGHT, WIDTH).astype(np.float64)
    assert matrices.shape == (4, HEIGHT, WIDTH, 4, 4)
    poses, intrinsics = split_conditions(inputs.conditions)
    rotations = matrices[..., :3, :3]
    np.testing.assert_allclose(rotations @ np.swapaxes(rotations, -1, -2), np.eye(3) + 0 * rotations, atol=1e-6)
    assert (np.linalg.det(rotations) > 0).all()
    directions = camera_directions(intrinsics, HEIGHT, WIDTH)
    in_world = np.einsum("tij,thwj->thwi", poses[:, :3, :3], directions)
    ahead = poses[:, None, None, :3, 3] + 3 * in_world
    in_ray = np.einsum("thwij,thwj->thwi", matrices[..., :3, :], np.concatenate([ahead, np.ones((4, 3, 5, 1))], -1))
    np.testing.assert_allclose(in_ray, np.broadcast_to([0, 0, 3], in_ray.shape), atol=1e-5)
    # what is below the camera is below the ray
    assert ((rotations[..., 1, :] * poses[:, None, None, :3, 1]).sum(-1) > 0).all()
    batch = ray_matrices(np.stack([inputs.conditions] * 2), HEIGHT, WIDTH)
    np.testing.assert_array_equal(batch[1], matrices.astype(np.float32))


def test_patches_are_tokens(inputs):
    whole = ray_matrices(inputs.conditions, 2 * HEIGHT, 4 * WIDTH)
    conditions = inputs.conditions.copy()
    tokens = ray_matrices(conditions, HEIGHT, WIDTH, (2, 4))
    np.testing.assert_allclose(tokens[:, :, :], whole[:, ::2, ::4], atol=1e-6)


def test_direction_map_of_a_level_camera():
    conditions = np.concatenate([np.eye(4).ravel(), [2.0, 2.0, 2.0, 2.0]])[None]
    directions = direction_map(conditions, 5, 5)[0]
    assert directions.shape == (5, 5, 3)
    # up is up in the middle column, though the reference's third term of the rotation pulls aside a little;
    # rows above the horizon have positive latitude
    np.testing.assert_allclose(directions[:, 2, :2], [[0, -1]] * 5, atol=0.07)
    np.testing.assert_allclose(directions[:, 2, 2], np.arctan((2 - np.arange(5)) / 2), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: camera_inputs(POSES, INTRINSICS[:3], height=96, width=96), r"intrinsics of shape \(3, 4\)"),
        (lambda: camera_inputs(POSES[:, :3], INTRINSICS, height=96, width=96), r"poses of shape \(28, 3, 4\)"),
        (lambda: camera_inputs(POSES, INTRINSICS, height=31, width=96), "31x96 is smaller than one latent pixel"),
        (lambda: ray_matrices(np.zeros((3, 16)), 2, 2), r"camera conditions of shape \(3, 16\)"),
    ],
)
def test_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
