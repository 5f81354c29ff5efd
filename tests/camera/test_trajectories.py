"""Paths from motions, checks of given poses, and their numbers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sana_jax.camera import (
    action_to_c2w,
    check_poses,
    integrate_motion,
    intrinsics_of_field,
    invert_poses,
    opengl_to_opencv,
    read_intrinsics,
    relative_poses,
    snap_frames,
    summarize_trajectory,
    yaw_and_pitch,
)
from sana_jax.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path() -> np.ndarray:
    return action_to_c2w("wd-4,wl-6,wi-5,sj-3,k-4", "v1").astype(np.float64)


def test_axes(capsys):
    """x right, y down, z forward: a turn to the right looks towards +x, a look upwards towards −y."""
    poses = action_to_c2w("w-10,l-75,w-10,d-10,i-25")
    assert (poses.dtype, poses.shape) == (np.float32, (131, 4, 4))
    np.testing.assert_array_equal(poses[0], np.eye(4))
    np.testing.assert_allclose(poses[10, :3, 3], [0, 0, 0.5], atol=1e-6)
    np.testing.assert_allclose(poses[85, :3, 2], [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(poses[95, :3, 3], [0.5, 0, 0.5], atol=1e-6)
    np.testing.assert_allclose(poses[105, :3, 3], [0.5, 0, 0.0], atol=1e-6)
    np.testing.assert_allclose(poses[-1, :3, 2], [math.cos(math.pi / 6), -0.5, 0], atol=1e-6)
    np.testing.assert_array_equal(poses[:, 1, 3], 0)  # keys move in the horizontal plane
    assert capsys.readouterr().out == ""


def test_motion_is_integrated_step_by_step():
    """The closed form against the recurrence that defines it."""
    motion = np.random.default_rng(0).normal(0, [0.1, 0.1, 0.2, 0.03], (40, 4))
    pose, expected = np.eye(4), [np.eye(4)]
    for forward, right, yaw, pitch in motion:
        turn, tilt = np.eye(3), np.eye(3)
        turn[np.ix_([0, 2], [0, 2])] = [[math.cos(yaw), math.sin(yaw)], [-math.sin(yaw), math.cos(yaw)]]
        tilt[1:, 1:] = [[math.cos(pitch), -math.sin(pitch)], [math.sin(pitch), math.cos(pitch)]]
        rotation = turn @ pose[:3, :3] @ tilt
        ahead, aside = rotation[:, 2] * [1, 0, 1], rotation[:, 0] * [1, 0, 1]
        position = pose[:3, 3] + forward * ahead / np.linalg.norm(ahead) + right * aside / np.linalg.norm(aside)
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = rotation, position
        expected.append(pose)
    np.testing.assert_allclose(integrate_motion(motion), expected, atol=1e-6)


def test_reversed_keys_lead_back():
    poses = action_to_c2w("w-10,s-10")
    np.testing.assert_allclose(poses[-1], np.eye(4), atol=1e-6)


@pytest.mark.parametrize("motion", [np.zeros((3, 3)), np.zeros(4), np.full((2, 4), np.nan)])
def test_motions_that_are_not_allowed(motion):
    with pytest.raises(UserError, match="motion"):
        integrate_motion(motion)


def test_notices(capsys):
    action_to_c2w("w-2,wsd-2,ad-1,i-120", "v2", smooth=False)
    assert capsys.readouterr().out.splitlines() == [
        "action: opposite keys held together cancel each other out, s and w, first in frame 3",
        "action: the limit of pitch, 60 degrees, holds the camera back in 20 frames, first in frame 106",
    ]


def test_relative_poses_and_inverses(path):
    path = path[7:]
    np.testing.assert_allclose(invert_poses(path) @ path, np.tile(np.eye(4), (len(path), 1, 1)), atol=1e-6)
    relative = relative_poses(path)
    assert relative.dtype == np.float32
    np.testing.assert_array_equal(relative[0], np.eye(4))
    np.testing.assert_allclose(path[0] @ relative, path, atol=1e-6)
    # far from the origin of the world nothing is lost, as long as the poses are float64
    moved = path + np.array([0, 0, 0, 1])[None, None] * np.array([1e6, 2e6, 3e6, 0])[None, :, None]
    np.testing.assert_allclose(relative_poses(moved), relative, atol=1e-6)


def test_opengl_poses_look_the_same_way(path):
    """An OpenGL camera's columns are right, up, backwards."""
    opengl = path.copy()
    opengl[:, :, 1:3] *= -1
    np.testing.assert_array_equal(opengl_to_opencv(opengl), path)


def test_good_poses_pass(path, capsys):
    np.testing.assert_array_equal(check_poses(path), path)
    assert check_poses(path).dtype == np.float64
    assert check_poses(path.astype(np.float32).tolist()).dtype == np.float64
    assert check_poses(path.astype(np.float32)).dtype == np.float32
    check_poses(np.round(path, 4))
    assert capsys.readouterr().out == ""
    path[5:, 2, 3] += 40
    check_poses(path)
    printed = capsys.readouterr().out
    assert printed.startswith("c2w: the camera moves 40 units to frame 5; action strings move 0.025 to 0.05 per frame:")
    assert printed.endswith("are the units metres?\n")


def test_notices_go_where_they_are_sent(path, capsys):
    said = []
    path[5:, 2, 3] += 40
    check_poses(path, "poses", said.append)
    read_intrinsics(np.tile(intrinsics_of_field(150.0, 90, 140), (3, 1)), 2, 90, 140, said.append)
    action_to_c2w("ad-3,i-200", "v1", say=said.append)
    starts = ["poses: the camera moves 40", "intrinsics: the first 2 of 3", "intrinsics: the field of view is 150.0"]
    starts += ["action: opposite keys", "action: the limit of pitch"]
    assert [line.startswith(start) for line, start in zip(said, starts, strict=True)] == [True] * 5
    assert capsys.readouterr().out == ""


def broken(path: np.ndarray, how: str) -> np.ndarray:
    if how == "nan":
        path[3, 0, 3] = np.nan
    elif how == "infinite":
        path[2, 1, 1] = np.inf
    elif how == "scaled":
        path[:, :3, :3] *= 1.01
    elif how == "sheared":
        path[4, 0, 1] += 0.1
    elif how == "mirrored":
        path[:, :, 0] *= -1
    elif how == "transposed":
        path = np.swapaxes(path, 1, 2)
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", "poses holds NaN or infinity in 1 frames, first in frame 3; allowed are finite numbers"),
        ("infinite", "poses holds NaN or infinity in 1 frames, first in frame 2; allowed are finite numbers"),
        ("scaled", "poses is not rigid in 23 frames: in frame 0 RᵀR is 0.02 away from the identity; allowed is 0.001"),
        ("sheared", "poses is not rigid in 1 frames: in frame 4 "),
        ("mirrored", "poses holds reflections in 23 frames, first in frame 0; allowed are rotations"),
        ("transposed", "poses: the last row of frame 1 is "),
    ],
)
def test_poses_that_are_not_rigid(path, how, message):
    with pytest.raises(UserError) as refusal:
        check_poses(broken(path, how), "poses")
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((5, 3, 4)), r"shape \(5, 3, 4\); allowed is \(frames, 4, 4\): add the row 0 0 0 1"),
        (np.eye(4), r"shape \(4, 4\); .*c2w\[None\]"),
        (np.zeros((1, 5, 4, 4)), "give the path of one video"),
        (np.zeros((0, 4, 4)), r"shape \(0, 4, 4\)"),
        (np.zeros((5, 16)), r"shape \(5, 16\)"),
        ([[1, 2], [3]], "is no array of real numbers"),
        ("poses.npy", "is no array of real numbers"),
        (np.full((2, 4, 4), 1j), "is no array of real numbers"),
    ],
)
def test_poses_of_another_shape(given, message):
    with pytest.raises(UserError, match=message):
        check_poses(given)


def test_numbers_of_a_path():
    summary = summarize_trajectory(action_to_c2w("wl-300,j-30,i-20,k-30"))
    assert summary.frames == 381
    assert summary.path_length == pytest.approx(15.0, rel=1e-5)
    assert summary.longest_step == pytest.approx(0.05, rel=1e-4)
    degrees = (summary.yaw, summary.turned, summary.pitch, summary.lowest_pitch, summary.highest_pitch)
    np.testing.assert_allclose(degrees, (324, 396, -12, -12, 24), rtol=1e-4)
    assert summary.describe() == (
        "381 frames, path 15.000 units, yaw +324.0° (396.0° in all), pitch -12.0° (from -12.0° to +24.0°)"
    )
    still = summarize_trajectory(np.eye(4)[None]).describe()
    assert still == "1 frames, path 0.000 units, yaw +0.0°, pitch +0.0°"


def test_a_camera_that_looks_straight_up_keeps_its_heading():
    motion = np.zeros((5, 4))
    motion[:, 3] = [np.pi / 4, np.pi / 4, -np.pi / 4, -np.pi / 4, 0]
    motion[0, 2] = 0.5
    yaw, pitch = yaw_and_pitch(integrate_motion(motion))
    np.testing.assert_allclose(yaw[1:], np.rad2deg(0.5), rtol=1e-5)
    np.testing.assert_allclose(pitch, [0, 45, 90, 45, 0, 0], atol=0.05)


def test_frames_that_the_autoencoder_takes():
    assert [snap_frames(number) for number in (1, 4, 5, 80, 81, 84, 85)] == [1, 1, 9, 81, 81, 81, 89]
    assert snap_frames(80, available=80) == 73
    with pytest.raises(UserError, match="num_frames 0 is not allowed"):
        snap_frames(0)


def test_the_package_needs_numpy_only():
    script = (
        "import sys, sana_jax.camera; "
        "print(sorted({'jax', 'jaxtyping', 'PIL', 'tyro', 'matplotlib', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"
