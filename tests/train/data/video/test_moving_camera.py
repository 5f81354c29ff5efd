"""Clips of a photograph before a moving camera: pixels lie where rays meet the plane; held-out paths are held out."""

from __future__ import annotations

import contextlib
import dataclasses
import types

import numpy as np
import pytest
from PIL import Image

from configs import load_preset
from configs.longsana_data import TrajectoriesDataConfig
from configs.moving_camera import MovingCameraDataConfig
from sana_jax.camera import parse_action
from sana_jax.errors import UserError
from sana_jax.pipelines.model_directory import CAMERA_DEFAULTS, SamplingDefaults
from sana_jax.pipelines.world_inputs import camera_path, view_at
from train import run_directory
from train.data.loader import Loader
from train.data.video.moving_camera import (
    BLUR,
    MovingCameraData,
    all_actions,
    bilinear,
    load_photograph,
    opposite,
    plane_points,
    texture,
)
from train.previews import Previewer

SIDE = 12
ONE_PHOTOGRAPH = {"photographs": ("flower",), "canvas": SIDE}


@pytest.fixture(scope="module")
def data():
    return MovingCameraData(MovingCameraDataConfig(**ONE_PHOTOGRAPH))


def shifted(x: float = 0.0, y: float = 0.0, z: float = 0.0) -> np.ndarray:
    """A camera that has moved and not turned."""
    pose = np.eye(4)
    pose[:3, 3] = x, y, z
    return pose


def test_a_camera_that_steps_aside_sees_the_plane_moved(data):
    focal = float(data.intrinsics[0])
    view = data.view(3)
    poses = np.stack([np.eye(4), shifted(x=2 / focal), shifted(y=-1 / focal)])
    first, right, up = data.render(view, poses)
    np.testing.assert_allclose(right[:, :-2], first[:, 2:], atol=1e-5)
    np.testing.assert_allclose(up[1:], first[:-1], atol=1e-5)


def test_a_camera_half_way_to_the_plane_sees_its_middle_twice_as_large(data):
    first, near = plane_points(np.stack([np.eye(4), shifted(z=0.5)]), data.intrinsics, SIDE, SIDE)
    np.testing.assert_allclose(near, first / 2, atol=1e-12)


def test_a_camera_that_turns_sees_what_its_rays_meet(data):
    """Yaw by θ: a pixel at angle α across, in the middle row, sees tan(α + θ) on the plane."""
    poses = data.poses("l-4").astype(np.float64)  # yaw to the right
    fx, _, cx, _ = data.intrinsics
    across = plane_points(poses, data.intrinsics, SIDE, SIDE)
    angles = np.arctan((np.arange(SIDE) - cx) / fx)
    for frame, turned in enumerate(np.deg2rad(data.config.rotation_speed) * np.arange(5)):
        middle = across[frame, SIDE // 2 - 1 : SIDE // 2 + 1].mean(0)  # the middle lies between two rows
        np.testing.assert_allclose(middle[:, 0], np.tan(angles + turned), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(middle[:, 1], 0, atol=1e-6)
    assert np.isnan(plane_points(np.diag([-1.0, 1, -1, 1])[None], data.intrinsics, SIDE, SIDE)).all()  # behind it


def test_pixels_between_pixels_and_beyond_the_border():
    picture = np.arange(12, dtype=np.float32).reshape(3, 4, 1)
    places = np.array([[1, 2], [0.5, 0.25], [-1, 0], [0, 4], [3, -1.5], [200, 300]], np.float64)
    expected = [6, 2.25, 4, 2, 5.5, 0]
    np.testing.assert_allclose(bilinear(picture, places)[:, 0], expected, rtol=1e-6)


def test_the_photograph_is_as_sharp_as_the_first_frame(data):
    view = data.view(0)._replace(mirrored=False)
    frame = data.render(view, np.eye(4)[None])[0]
    step, sharp = view.span / SIDE, texture(view.photograph, view.span, SIDE)
    rows, columns = (middle + (np.arange(SIDE) - (SIDE - 1) / 2) * step for middle in view.middle)
    places = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1)
    np.testing.assert_allclose(frame, sharp.at(places), atol=1e-4)
    # what is mirrored is the whole scene, not the camera
    turned = data.render(view._replace(mirrored=True), np.eye(4)[None])[0]
    np.testing.assert_allclose(turned, frame[:, ::-1], atol=1e-4)


def test_action_strings(data):
    for steps in (1, 4):
        actions = all_actions(steps)
        assert len(set(actions)) == len(actions)
        assert all(len(parse_action(action, num_frames=steps + 1)) == steps for action in actions)
        assert {opposite(action) for action in actions} == set(actions)
    assert opposite("wl-3,none-1") == "sj-3,none-1"
    with_opposite, against = data.poses("wl-2,i-2"), data.poses(opposite("wl-2,i-2"))
    np.testing.assert_allclose(with_opposite[:, 2, 3], -against[:, 2, 3], atol=1e-6)
    np.testing.assert_allclose(with_opposite[:, 0, 2], -against[:, 0, 2], atol=1e-6)


def test_held_out_paths_are_held_out():
    data = MovingCameraData(MovingCameraDataConfig(frames=4, **ONE_PHOTOGRAPH))
    other = data.validation
    assert other.validation is None
    for part in (data, other):
        assert set(part.actions) == {opposite(action) for action in part.actions}
        assert all(part.actions[2 * n + 1] == opposite(part.actions[2 * n]) for n in range(len(part) // 2))
    assert not set(data.actions) & set(other.actions)
    assert sorted(data.actions + other.actions) == sorted(all_actions(3))
    assert len(other) == round(0.1 * len(all_actions(3)) / 2) * 2
    paths = np.stack([data.poses(action) for action in data.actions]).reshape(len(data), -1)
    nearest = [np.abs(paths - other.poses(action).reshape(-1)).max(1).min() for action in other.actions[::8]]
    assert min(nearest) > 0.01  # not the path of another string, either


def test_samples_are_a_function_of_seed_and_index(data):
    again = MovingCameraData(MovingCameraDataConfig(**ONE_PHOTOGRAPH))
    others = MovingCameraData(MovingCameraDataConfig(seed=1, **ONE_PHOTOGRAPH))
    indices = np.array([5, 0, 5])
    first = data.videos(indices)
    np.testing.assert_array_equal(first, again.videos(indices))
    np.testing.assert_array_equal(first[0], first[2])
    assert np.abs(first - others.videos(indices)).max() > 0.1
    places = np.array([[0, 0.25], [0, 0.25], [0, 0.75]])
    chosen = data.videos(indices, places)
    np.testing.assert_array_equal(chosen, again.videos(indices, places))
    assert np.abs(chosen[0] - chosen[2]).max() > 0.1


def test_the_network_is_told_what_the_pipeline_would_tell_it(data):
    batch = data.batch(np.array([7]))
    assert batch.latents.shape == (1, 5, SIDE, SIDE, 3)
    poses = camera_path(data.actions[7], None, 5, data.scheme, 1)
    picture = Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8))
    cameras = [view_at(picture, poses, data.intrinsics, (SIDE, SIDE), 1, 1).camera]
    # nothing said of the camera: as the run's directory has it, and of a larger picture of another shape
    own = SamplingDefaults(**{name: getattr(data.config, name) for name in CAMERA_DEFAULTS})
    said, wide = [], Image.fromarray(np.zeros((2 * SIDE, 3 * SIDE, 3), np.uint8))
    path = camera_path(data.actions[7], None, None, None, 1, said.append, own)
    cameras.append(view_at(wide, path, None, (SIDE, SIDE), 1, 1, said.append, own.field_of_view).camera)
    assert "0.15 units and 4 degrees per frame" in said[0]
    assert "spans 100 degrees across" in said[1]
    for camera in cameras:
        np.testing.assert_allclose(batch.conditions["camera_conditions"][0], camera.conditions, atol=1e-6)
        np.testing.assert_allclose(batch.conditions["chunk_plucker"][0], camera.chunk_plucker, atol=1e-6)
    assert {array.dtype for array in batch.conditions.values()} == {np.dtype(np.float32)}


def test_clips_of_previews_are_named_by_their_action(data):
    config = dataclasses.replace(load_preset("moving_camera"), data=data.config)
    recipe = types.SimpleNamespace(conditions=("camera_conditions", "chunk_plucker"))
    parts = types.SimpleNamespace(config=config, dataset=data, recipe=recipe)
    previewer = Previewer(parts, None, contextlib.nullcontext())
    source, indices = previewer._examples
    assert previewer._labels == [source.actions[index] for index in indices] * config.preview.per_caption
    assert len(set(previewer._labels)) == len(indices) > 1


def test_a_run_s_directory_has_the_camera(data):
    own = {"field_of_view": 100.0, "translation_speed": 0.15, "rotation_speed": 4.0}
    run = types.SimpleNamespace(config=types.SimpleNamespace(data=data.config), base=None)
    assert run_directory._camera(run) == own
    base = types.SimpleNamespace(parts=types.SimpleNamespace(defaults=SamplingDefaults(**own)))
    distilled = types.SimpleNamespace(config=types.SimpleNamespace(data=TrajectoriesDataConfig(path="a")), base=base)
    assert run_directory._camera(distilled) == own
    distilled.base = None
    assert set(run_directory._camera(distilled).values()) == {None}
    assert SamplingDefaults.from_dict(SamplingDefaults(**own).to_dict(), "it").field_of_view == 100.0


def test_batches_come_from_the_loader(data):
    batch = next(Loader(data, seed=0, batch_size=4, rows=(1, 3)))
    assert batch.latents.shape == (2, *data.preview_shape)
    assert np.isfinite(batch.latents).all()
    assert np.abs(batch.latents).max() <= 1
    assert batch.prompt_embeds.shape[0] == batch.conditions["chunk_plucker"].shape[0] == 2
    assert "paths are held out" in data.describe()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"photographs": ("moon",)}, "moon"),
        ({"photographs": ()}, "none"),
        ({"rotation_speed": 12.0}, "rotation-speed 12.0"),
        ({"translation_speed": 0.25}, "below 0.25"),
        ({"held_out": 0.0}, "held-out"),
        ({"caption": "one two three four"}, "one to 3 words"),
    ],
)
def test_settings_that_are_not_possible(options, named):
    with pytest.raises(UserError, match=named):
        MovingCameraDataConfig(**options)


def test_a_texture_lies_where_the_photograph_does():
    """Smaller as it is: what it shows is not moved against the photograph."""
    from scipy.ndimage import gaussian_filter

    seen, sharp = texture("coffee", 192, SIDE), load_photograph("coffee")
    assert seen.reduced == 4
    whole = gaussian_filter(sharp, (BLUR * 192 / SIDE,) * 2 + (0,), mode="mirror")
    places = np.random.default_rng(0).uniform(60, 300, (50, 2))
    np.testing.assert_allclose(seen.at(places), bilinear(whole, places), atol=0.02)
    moved = np.abs(seen.at(places) - bilinear(whole, places + 2)).mean()
    assert np.abs(seen.at(places) - bilinear(whole, places)).mean() < moved / 4


def test_another_part():
    with pytest.raises(UserError, match="held_out"):
        MovingCameraData(MovingCameraDataConfig(), "test")
