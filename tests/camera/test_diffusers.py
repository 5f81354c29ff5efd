"""Cameras against diffusers 0.42.1: scheme v1, intrinsics, packing, Plücker coordinates, rays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_sana_wm as reference_network
from diffusers.pipelines.sana_wm import cam_utils as reference
from PIL import Image

from sana_jax.camera import (
    action_to_c2w,
    camera_inputs,
    direction_map,
    invert_poses,
    parse_action,
    plan_resize_and_crop,
    plucker_map,
    ray_matrices,
    read_intrinsics,
    scale_intrinsics,
    snap_frames,
)

torch.set_num_threads(1)
TOLERANCE = 1e-6  # absolute, of float32


def close(ours, theirs, name: str, tolerance: float = TOLERANCE) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert (ours.shape, ours.dtype) == (theirs.shape, np.float32), name
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=name)


def wandering_camera(frames: int, seed: int = 0) -> np.ndarray:
    """Poses in general position, the first not the identity, all axes turning."""
    random = np.random.default_rng(seed)
    angles = np.cumsum(random.normal(0, 0.1, (frames, 3)), axis=0) + 0.3
    pose = np.tile(np.eye(4), (frames, 1, 1))
    for axis in range(3):
        turn = np.tile(np.eye(4), (frames, 1, 1))
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn[:, first, first] = turn[:, second, second] = np.cos(angles[:, axis])
        turn[:, second, first] = np.sin(angles[:, axis])
        turn[:, first, second] = -turn[:, second, first]
        pose = pose @ turn
    pose[:, :3, 3] = np.cumsum(random.normal(0, 0.1, (frames, 3)), axis=0) - 0.2
    return pose.astype(np.float32)


def wandering_intrinsics(frames: int, height: int, width: int, seed: int = 1) -> np.ndarray:
    random = np.random.default_rng(seed)
    middle = np.array([0.8 * width, 0.9 * width, width / 2, height / 2])
    return (middle * random.uniform(0.9, 1.1, (frames, 4))).astype(np.float32)


@pytest.mark.parametrize(
    "action",
    [
        "w-80,jw-40,w-40",
        "WASD-3, ijkl-2",
        "wd-5,none-3,NONE-2，as-4",
        "i-90,w-3,k-150,d-2",  # both limits of pitch
        "l-310,w-2",
        "ww-2,iw-7,kla-9",
    ],
)
@pytest.mark.parametrize(
    "speeds",
    [{}, {"translation_speed": 0.3, "rotation_speed_deg": 5.0, "pitch_limit_deg": 22.0}],
    ids=["default", "given"],
)
def test_scheme_v1(action, speeds):
    keywords = {name.removesuffix("_deg"): value for name, value in speeds.items()}
    theirs = reference.action_string_to_c2w(action, **speeds)
    close(action_to_c2w(action, "v1", **keywords), theirs, action)
    assert [sorted(keys) for keys in parse_action(action, "v1")] == reference._parse_action_string(action)


@pytest.mark.parametrize("source", [(70, 130), (64, 96), (99, 101), (300, 41), (7, 5), (352, 640)])
@pytest.mark.parametrize("target", [(64, 96), (96, 32)])
def test_resize_and_crop(source, target):
    random = np.random.default_rng(2)
    image = Image.fromarray(random.integers(0, 256, (*source, 3), dtype=np.uint8))
    cropped, size, resized, offset = reference.resize_and_center_crop(image, *target)
    plan = plan_resize_and_crop(source, target)
    assert (plan.resized[::-1], plan.offset[::-1], plan.source[::-1]) == (resized, offset, size)
    np.testing.assert_array_equal(np.asarray(plan.image(image)), np.asarray(cropped))
    intrinsics = wandering_intrinsics(3, *source)
    theirs = reference.transform_intrinsics_for_crop(intrinsics, size, resized, offset)
    np.testing.assert_allclose(plan.intrinsics(intrinsics), theirs, rtol=1e-6)


@pytest.mark.parametrize("frames", [1, 6, 9, 17, 21])
def test_packing(frames):
    poses, intrinsics = wandering_camera(frames), wandering_intrinsics(frames, 64, 96)
    theirs = reference.prepare_camera(poses, intrinsics, target_size=(64, 96), vae_stride=(8, 32, 32))
    ours = camera_inputs(poses, intrinsics, height=64, width=96)
    close(ours.conditions, theirs["raymap"], "conditions")
    close(np.moveaxis(ours.chunk_plucker, -1, 0), theirs["chunk_plucker"], "chunk_plucker")


def test_packing_at_the_published_size():
    poses = action_to_c2w("w-8,jw-8", "v1")
    intrinsics = read_intrinsics([800.0, 810.0, 645.0, 350.0], len(poses), 704, 1280)
    theirs = reference.prepare_camera(poses, intrinsics, target_size=(704, 1280), vae_stride=(8, 32, 32))
    ours = camera_inputs(poses, intrinsics, height=704, width=1280)
    assert ours.chunk_plucker.shape == (3, 22, 40, 48)
    close(ours.conditions, theirs["raymap"], "conditions")
    close(np.moveaxis(ours.chunk_plucker, -1, 0), theirs["chunk_plucker"], "chunk_plucker")


def test_plucker_map():
    poses, intrinsics = wandering_camera(3), wandering_intrinsics(3, 5, 7)
    theirs = reference.compute_raymap(torch.from_numpy(intrinsics), torch.from_numpy(poses), 5, 7)
    close(plucker_map(poses, intrinsics, 5, 7), theirs, "plucker")


@pytest.mark.parametrize("patch_size", [(1, 1), (2, 3)])
def test_rays(patch_size):
    tokens = (3, 4)
    latent = (tokens[0] * patch_size[0], tokens[1] * patch_size[1])
    conditions = np.stack(
        [
            np.concatenate([wandering_camera(5, seed).reshape(5, 16), wandering_intrinsics(5, *latent, seed)], axis=1)
            for seed in (3, 4)
        ]
    )
    matrices, absolute = reference_network._process_camera_conditions_ucpe(
        torch.from_numpy(conditions), 2, (5, *tokens), (1, *patch_size)
    )
    ours = ray_matrices(conditions, *tokens, patch_size)
    close(ours, matrices, "matrices")
    close(invert_poses(ours), reference_network._invert_SE3(matrices), "inverses")
    # the reference normalises small differences of float32 pixel coordinates, which leaves 2e-6 of its own rounding;
    # tests/golden compares with float64
    close(direction_map(conditions, *latent), absolute, "directions", tolerance=5e-6)


def test_frames():
    for number in range(1, 60):
        assert snap_frames(number) == reference.snap_num_frames(number)
        for available in range(number, number + 9):
            assert snap_frames(number, available=available) == reference.snap_num_frames(number, upper_bound=available)


@pytest.mark.parametrize("frames", [1, 3])
def test_all_forms_of_intrinsics(frames):
    from diffusers.pipelines.sana_wm.pipeline_sana_wm import SanaWMPipeline

    class Pipeline:
        vae_temporal_compression_ratio = 8

    vectors = wandering_intrinsics(frames + 2, 64, 96)
    matrices = np.zeros((frames + 2, 3, 3), np.float32)
    matrices[:, (0, 1, 0, 1), (0, 1, 2, 2)], matrices[:, 2, 2] = vectors, 1
    poses = np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1))
    for form in (vectors[0], vectors[0].tolist(), matrices[0], vectors, matrices):
        # the reference snaps the number of frames, so it is asked for one that stays
        _, theirs = SanaWMPipeline.prepare_camera_trajectory(Pipeline(), poses[:1], None, form, 1)
        np.testing.assert_array_equal(read_intrinsics(form, frames, 64, 96)[:1], theirs)


def test_intrinsics_on_the_latent_grid():
    ours = scale_intrinsics(np.array([[800.0, 810.0, 645.0, 350.0]], np.float32), (704, 1280), (22, 40))
    np.testing.assert_allclose(ours, [[25.0, 810 / 32, 645 / 32, 350 / 32]], rtol=1e-7)
