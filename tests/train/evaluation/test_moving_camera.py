"""The camera's motion recovered from pixels: right on true clips, wrong where they are wrong."""

from __future__ import annotations

import numpy as np
import pytest

from configs.moving_camera import MovingCameraDataConfig
from sana_jax.camera import integrate_motion
from train.data.video.moving_camera import MovingCameraData
from train.evaluate_moving_camera import choose
from train.evaluation.moving_camera import (
    ERRORS,
    camera_pose,
    describe,
    measure,
    motion_of,
    path_errors,
    pose_of,
    recover_poses,
)

PAIRS = 3


@pytest.fixture(scope="module")
def data():
    return MovingCameraData(MovingCameraDataConfig(photographs=("flower", "china")), "held_out")


@pytest.fixture(scope="module")
def asked(data):
    return choose(data, PAIRS, 0)


@pytest.fixture(scope="module")
def figures(data, asked):
    """Of true clips with a little noise, as a model that is good at it would make them."""
    noise = np.random.default_rng(0).normal(0, 0.03, asked.videos.shape)
    noise[:, 0] = 0
    speeds = (np.deg2rad(data.config.rotation_speed), data.config.translation_speed)
    return measure(asked.videos + noise, asked.videos, asked.poses, data.intrinsics, speeds)


def test_true_clips_are_measured_as_what_they_are(figures):
    assert figures.clips == 2 * PAIRS
    # the measurement itself adds little to what it is to tell apart
    for error in ERRORS:
        assert getattr(figures.floor, error) < getattr(figures.shuffled, error) / 12
        assert getattr(figures.requested, error) < getattr(figures.shuffled, error) / 6
    assert figures.floor.pixels < 0.08
    assert 0.025 < figures.pixel_error < 0.035


def test_other_clips_paths_are_far_from_them(figures):
    assert min(figures.ratio.values()) >= 6
    assert figures.ratio["rotation"] == figures.shuffled.rotation / figures.requested.rotation
    assert figures.still.rotation > 3
    assert figures.still.translation > 0.05
    assert any(f"{figures.requested.rotation:.2f} deg" in line for line in describe(figures))


def test_opposite_keys_are_seen_to_move_the_other_way(figures):
    assert figures.reversed == 1.0
    assert figures.opposite < -0.9
    assert figures.opposite == pytest.approx(figures.opposite_requested, abs=0.05)


def test_a_picture_that_stays_is_no_motion(data, asked):
    still = np.repeat(asked.videos[:1, :1], 3, axis=1)[0]
    np.testing.assert_allclose(recover_poses(still, data.intrinsics), np.tile(np.eye(4), (3, 1, 1)), atol=1e-6)


def test_a_clip_of_another_path_is_found_to_be_on_that_path(data, asked):
    """The search does not know what was asked for: exchanged clips are measured as exchanged."""
    speeds = (np.deg2rad(data.config.rotation_speed), data.config.translation_speed)
    exchanged = measure(asked.videos[[1, 0]], asked.videos[[1, 0]], asked.poses[:2], data.intrinsics, speeds)
    assert exchanged.requested.pixels > 5 * exchanged.shuffled.pixels


def test_poses_and_motions():
    motions = np.random.default_rng(0).normal(0, 0.4, (5, 6))
    motions[0] = 0
    poses = pose_of(motions)
    turns = poses[:, :3, :3]
    np.testing.assert_allclose(turns @ turns.swapaxes(1, 2), np.tile(np.eye(3), (5, 1, 1)), atol=1e-12)
    np.testing.assert_allclose(motion_of(poses), motions, atol=1e-9)
    # a turn about y by a right angle takes z to x, as yaw to the right does
    np.testing.assert_allclose(pose_of(np.array([0, np.pi / 2, 0, 0, 0, 0]))[:3, 2], [1, 0, 0], atol=1e-12)


def test_poses_of_the_motions_that_keys_make():
    motion = np.array([[0.05, 0.02, 0.3, -0.2]])  # forward, right, yaw, pitch
    expected = integrate_motion(motion)[1]
    right, ahead = expected[0, 3], expected[2, 3]
    np.testing.assert_allclose(camera_pose(np.array([0.3, -0.2, right, ahead])), expected, atol=1e-6)


def test_errors_in_degrees_units_and_pixels(data):
    asked = np.eye(4)[None]
    turned = pose_of(np.array([[0, np.deg2rad(3), 0, 0, 0, 0]]))
    moved = pose_of(np.array([[0, 0, 0, 0.0, 0.06, 0.08]]))
    side, focal = data.config.canvas, float(data.intrinsics[0])
    found = path_errors(np.concatenate([turned, moved]), np.tile(asked, (2, 1, 1)), data.intrinsics, side)
    np.testing.assert_allclose(found["rotation"], [3, 0], atol=1e-6)
    np.testing.assert_allclose(found["translation"], [0, 0.1], atol=1e-12)
    aside = path_errors(pose_of(np.array([[0, 0, 0, 0.1, 0, 0]])), asked, data.intrinsics, side)
    np.testing.assert_allclose(aside["pixels"], focal * 0.1, rtol=1e-6)
