"""The camera of SANA-WM: action strings, trajectories, intrinsics, rays. NumPy on the host; no weights, no JAX.

Poses are camera-to-world 4x4 matrices with OpenCV's axes: x right, y down, z forward. Intrinsics are (F, 4): fx, fy,
cx, cy in pixels.
"""

from __future__ import annotations

from sana_jax.camera.actions import MOTION_AXES, SCHEMES, ActionScheme, Smoothing, find_scheme, parse_action
from sana_jax.camera.files import read_array
from sana_jax.camera.intrinsics import (
    ResizeAndCrop,
    field_of_view,
    intrinsics_matrices,
    intrinsics_of_field,
    plan_resize_and_crop,
    read_intrinsics,
    scale_intrinsics,
)
from sana_jax.camera.plot import draw_trajectory
from sana_jax.camera.rays import (
    CameraInputs,
    camera_directions,
    camera_inputs,
    direction_map,
    plucker_map,
    ray_matrices,
    split_conditions,
)
from sana_jax.camera.trajectories import (
    TrajectorySummary,
    action_to_c2w,
    check_poses,
    integrate_motion,
    invert_poses,
    keys_to_motion,
    opengl_to_opencv,
    relative_poses,
    snap_frames,
    summarize_trajectory,
    yaw_and_pitch,
)

__all__ = [
    "MOTION_AXES",
    "SCHEMES",
    "ActionScheme",
    "CameraInputs",
    "ResizeAndCrop",
    "Smoothing",
    "TrajectorySummary",
    "action_to_c2w",
    "camera_directions",
    "camera_inputs",
    "check_poses",
    "direction_map",
    "draw_trajectory",
    "field_of_view",
    "find_scheme",
    "integrate_motion",
    "intrinsics_matrices",
    "intrinsics_of_field",
    "invert_poses",
    "keys_to_motion",
    "opengl_to_opencv",
    "parse_action",
    "plan_resize_and_crop",
    "plucker_map",
    "ray_matrices",
    "read_array",
    "read_intrinsics",
    "relative_poses",
    "scale_intrinsics",
    "snap_frames",
    "split_conditions",
    "summarize_trajectory",
    "yaw_and_pitch",
]
