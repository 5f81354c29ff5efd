"""Action scheme v2, the packing of cameras, rays and the map of directions, against recorded vectors."""

from __future__ import annotations

import numpy as np
import pytest

from sana_jax.camera import SCHEMES, action_to_c2w, camera_inputs, direction_map, ray_matrices
from sana_jax.errors import UserError
from tests.golden.golden_files import assert_golden, load_golden

GOLDEN = load_golden("wm_camera")
TOLERANCE = 1e-5
OPTIONS = {
    "translation_speed": "translation_speed",
    "rotation_speed_deg": "rotation_speed",
    "pitch_limit_deg": "pitch_limit",
    "smooth": "smooth",
}
CAMERAS = GOLDEN.children("in/")


def test_the_schemes_own_numbers():
    scheme, defaults = SCHEMES["v2"], GOLDEN.hparams["defaults"]
    for recorded, ours in OPTIONS.items():
        value = scheme.smoothing is not None if ours == "smooth" else getattr(scheme, ours)
        assert value == defaults[recorded], recorded
    smoothing = scheme.smoothing
    recorded = [GOLDEN.hparams[name] for name in ("fps", "tau_press", "tau_coast")]
    assert [smoothing.frame_rate, smoothing.press_time, smoothing.release_time] == recorded


@pytest.mark.parametrize("index", range(len(GOLDEN.hparams["strings"])))
def test_poses(index):
    action = GOLDEN.hparams["strings"][index]
    # recorded code takes no keys for a pause; ours wants the word for it
    action = ",".join(f"none{part}" if part.startswith("-") else part for part in "".join(action.split()).split(","))
    for number, keywords in enumerate(GOLDEN.hparams["kwargs"]):
        name = f"out/poses/string{index:02d}/kwargs{number}"
        poses = action_to_c2w(action, "v2", **{OPTIONS[option]: value for option, value in keywords.items()})
        assert poses.dtype == np.float32
        assert_golden(poses, GOLDEN[name], TOLERANCE, name)


@pytest.mark.parametrize(
    "action", [text for text, raised in zip(GOLDEN.hparams["error_strings"], GOLDEN.hparams["error_raised"]) if raised]
)
def test_refused_strings(action):
    with pytest.raises(UserError) as refusal:
        action_to_c2w(action, "v2")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("camera", CAMERAS)
def test_camera_inputs(camera):
    case = GOLDEN.hparams["camera_cases"][int(camera.removeprefix("camera"))]
    (height, width), (temporal, _, spatial) = case["target_size"], case["vae_stride"]
    poses, intrinsics = GOLDEN[f"in/{camera}/poses_c2w"], GOLDEN[f"in/{camera}/intrinsics"]
    assert len(poses) == case["num_frames"]
    inputs = camera_inputs(
        poses, intrinsics, height=height, width=width, temporal_factor=temporal, spatial_factor=spatial
    )
    assert_golden(inputs.conditions, GOLDEN[f"out/{camera}/camera_conditions"], TOLERANCE, "conditions")
    packed = np.moveaxis(inputs.chunk_plucker, -1, 0)
    assert_golden(packed, GOLDEN[f"out/{camera}/chunk_plucker"], TOLERANCE, "chunk_plucker")


@pytest.mark.parametrize("name", [name for name in GOLDEN.names("out64/") if name.endswith(("raymats", "absmap"))])
def test_rays(name):
    camera, kind = name.split("/")[1:]
    recorded = GOLDEN[name]
    grid = recorded.shape[2:4]
    function = ray_matrices if kind == "raymats" else direction_map
    ours = function(GOLDEN[f"out/{camera}/camera_conditions"][None], *grid)
    assert ours.dtype == np.float32
    assert_golden(ours, recorded, TOLERANCE, name)
