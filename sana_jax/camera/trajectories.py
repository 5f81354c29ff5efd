"""Paths of a camera: poses from motions, relative poses, and checks of poses that are given.

A pose is a 4x4 camera-to-world matrix [R | t; 0 0 0 1]. Its axes are OpenCV's: x right, y down, z forward; the columns
of R are the camera's axes in the world, t is where it stands. Everything is computed in float64 on the host.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from sana_jax.camera.actions import MOTION_AXES, ActionScheme, find_scheme, parse_action
from sana_jax.errors import UserError, reason_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kernels.typing import Float

_RIGID_TOLERANCE = 1e-3  # of RᵀR − I: poses in text files have four digits and more
_LONGEST_STEP = 1.0  # units from frame to frame; the schemes' keys go 0.025 and 0.05
_FORWARD, _RIGHT, _YAW, _PITCH = range(len(MOTION_AXES))


def keys_to_motion(held: Sequence[frozenset[str]], scheme: str | ActionScheme = "v1") -> Float[np.ndarray, "N 4"]:
    """What held keys do in every frame, after smoothing and within the limit of pitch.

    Args:
        held: keys per frame, see ``parse_action``.
        scheme: what they mean.

    Returns:
        float64 (forward, right, yaw, pitch) per frame: units along the camera's horizontal axes, radians to the right
        and upwards.

    Raises:
        UserError: an unknown scheme.
    """
    return _motion(held, find_scheme(scheme))[0]


def _motion(held: Sequence[frozenset[str]], scheme: ActionScheme) -> tuple[np.ndarray, np.ndarray]:
    """The motion, and which of its frames the limit of pitch has changed."""
    rotation = np.deg2rad(scheme.rotation_speed)
    speeds = np.array([scheme.translation_speed, scheme.translation_speed, rotation, rotation])
    wanted = np.zeros((len(held), 4))
    for frame, keys in enumerate(held):
        for key in sorted(keys):
            axis, sign = scheme.axis_and_sign(key)
            wanted[frame, axis] += sign * speeds[axis]
    motion = _smooth(wanted, held, scheme) if scheme.smoothing is not None else wanted
    allowed = _limit_pitch(motion[:, _PITCH], scheme)
    limited = np.flatnonzero(np.abs(allowed - motion[:, _PITCH]) > 1e-9)
    motion[:, _PITCH] = allowed
    return motion, limited


def _smooth(wanted: np.ndarray, held: Sequence[frozenset[str]], scheme: ActionScheme) -> np.ndarray:
    motion, speed, before = np.zeros_like(wanted), np.zeros(4), frozenset()
    for frame, keys in enumerate(held):
        if keys - before:
            speed = wanted[frame]
        else:
            share = np.where(wanted[frame] != 0, scheme.smoothing.share(True), scheme.smoothing.share(False))
            speed = speed + share * (wanted[frame] - speed)
        motion[frame], before = speed, keys
    return motion


def _limit_pitch(steps: np.ndarray, scheme: ActionScheme) -> np.ndarray:
    limit, pitch, allowed = np.deg2rad(scheme.pitch_limit), 0.0, np.zeros_like(steps)
    for frame, step in enumerate(steps):
        reached = float(np.clip(pitch + step, -limit, limit))
        if not scheme.clamps_pitch and reached != pitch + step:
            reached = pitch
        # where nothing is cut off the step itself stays, without the rounding of the difference
        allowed[frame] = step if reached == pitch + step else reached - pitch
        pitch = reached
    return allowed


def integrate_motion(motion: Float[np.ndarray, "N 4"], *, heading_epsilon: float = 0.0) -> Float[np.ndarray, "N+1 4 4"]:
    """Poses of a camera that starts at the identity and moves by ``motion`` on the way to every further frame.

    Yaw turns about the world's vertical axis, pitch about the camera's own horizontal one: R ← R_y(yaw)·R·R_x(pitch),
    so that R = R_y(sum of yaw)·R_x(sum of pitch). The camera turns first and then moves in the horizontal plane along
    its new heading.

    Args:
        motion: (forward, right, yaw, pitch) per frame, see ``keys_to_motion``.
        heading_epsilon: is added to the length of the horizontal axes when they are normalised.

    Returns:
        float32 camera-to-world matrices.

    Raises:
        UserError: another shape, or values that are not finite.
    """
    motion = np.asarray(motion, np.float64)
    if motion.ndim != 2 or motion.shape[1] != 4:
        raise UserError(f"motion of shape {motion.shape}; allowed is (frames, 4): forward, right, yaw, pitch")
    if not np.isfinite(motion).all():
        raise UserError("motion holds values that are not finite; allowed are finite numbers: look at how it was made")
    yaw, pitch = np.cumsum(motion[:, _YAW]), np.cumsum(motion[:, _PITCH])
    sin_yaw, cos_yaw, sin_pitch, cos_pitch = np.sin(yaw), np.cos(yaw), np.sin(pitch), np.cos(pitch)
    zero = np.zeros_like(yaw)
    heading = np.stack([sin_yaw, zero, cos_yaw], axis=-1)
    right = np.stack([cos_yaw, zero, -sin_yaw], axis=-1)
    poses = np.tile(np.eye(4), (len(motion) + 1, 1, 1))
    poses[1:, :3, 0] = right
    poses[1:, :3, 1] = np.stack([sin_yaw * sin_pitch, cos_pitch, cos_yaw * sin_pitch], axis=-1)
    poses[1:, :3, 2] = np.stack([sin_yaw * cos_pitch, -sin_pitch, cos_yaw * cos_pitch], axis=-1)
    horizontal = np.abs(cos_pitch)
    forward = motion[:, _FORWARD] * horizontal / np.maximum(horizontal + heading_epsilon, np.finfo(float).tiny)
    steps = heading * forward[:, None] + right * (motion[:, _RIGHT] / (1.0 + heading_epsilon))[:, None]
    poses[1:, :3, 3] = np.cumsum(steps, axis=0)
    return poses.astype(np.float32)


def action_to_c2w(
    action: str,
    scheme: str | ActionScheme = "v1",
    *,
    num_frames: int | None = None,
    translation_speed: float | None = None,
    rotation_speed: float | None = None,
    pitch_limit: float | None = None,
    smooth: bool | None = None,
    say: Callable[[str], None] = print,
) -> Float[np.ndarray, "F 4 4"]:
    """The poses of an action string: one more than it holds keys for, since frame 0 is the image.

    Says one line for keys that cancel each other out, and one where the limit of pitch acts.

    Args:
        action: see ``parse_action``.
        scheme: ``v1``, ``v2`` or a scheme of your own.
        num_frames: F that the string must make; None takes any.
        translation_speed: units per frame instead of the scheme's.
        rotation_speed: degrees per frame instead of the scheme's.
        pitch_limit: degrees instead of the scheme's.
        smooth: whether speeds are smoothed, instead of as the scheme does.
        say: prints a line.

    Returns:
        float32 camera-to-world matrices; the first is the identity.

    Raises:
        UserError: a malformed string, another number of frames than asked for, an unknown scheme, or a number that is
            not allowed.
    """
    scheme = find_scheme(
        scheme,
        translation_speed=translation_speed,
        rotation_speed=rotation_speed,
        pitch_limit=pitch_limit,
        smooth=smooth,
    )
    held = parse_action(action, scheme, num_frames=num_frames)
    motion, limited = _motion(held, scheme)
    for notice in _notices(held, limited, scheme):
        say(notice)
    return integrate_motion(motion, heading_epsilon=scheme.heading_epsilon)


def _notices(held: Sequence[frozenset[str]], limited: np.ndarray, scheme: ActionScheme) -> list[str]:
    notices = []
    for frame, keys in enumerate(held, start=1):
        by_axis: dict[int, list[str]] = {}
        for key in sorted(keys):
            by_axis.setdefault(scheme.axis_and_sign(key)[0], []).append(key)
        if pairs := [pair for pair in by_axis.values() if len(pair) > 1]:
            named = ", ".join(" and ".join(pair) for pair in pairs)
            notices.append(
                f"action: opposite keys held together cancel each other out, {named}, first in frame {frame}"
            )
            break
    if len(limited):
        notices.append(
            f"action: the limit of pitch, {scheme.pitch_limit:g} degrees, holds the camera back in {len(limited)} "
            f"frames, first in frame {limited[0] + 1}"
        )
    return notices


def invert_poses(poses: Float[np.ndarray, "*N 4 4"]) -> Float[np.ndarray, "*N 4 4"]:
    """Inverses of rigid 4x4 matrices in closed form, [Rᵀ | −Rᵀt]; the dtype stays."""
    inverse = np.zeros_like(poses)
    rotation = np.swapaxes(poses[..., :3, :3], -1, -2)
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3] = -np.einsum("...ij,...j->...i", rotation, poses[..., :3, 3])
    inverse[..., 3, 3] = 1.0
    return inverse


def relative_poses(c2w: Float[np.ndarray, "F 4 4"]) -> Float[np.ndarray, "F 4 4"]:
    """Poses as the first camera sees them, inverse(first)·pose, float32; the first is the identity exactly."""
    c2w = np.asarray(c2w, np.float64)
    relative = invert_poses(c2w[:1]) @ c2w
    relative[0] = np.eye(4)
    return relative.astype(np.float32)


def opengl_to_opencv(c2w: Float[np.ndarray, "F 4 4"]) -> Float[np.ndarray, "F 4 4"]:
    """Poses of cameras that look along −z with y up (OpenGL, Blender, NeRF) for cameras that look along z with y down.

    The world stays as it is; only the camera's own axes are named anew.
    """
    return np.asarray(c2w) * np.array([1, -1, -1, 1], np.asarray(c2w).dtype)


def check_poses(
    c2w: Float[np.ndarray, "F 4 4"], name: str = "c2w", say: Callable[[str], None] = print
) -> Float[np.ndarray, "F 4 4"]:
    """Poses that are given, if they are (F, 4, 4), finite and rigid; says one line where steps are very long.

    Args:
        c2w: camera-to-world matrices with OpenCV's axes (see ``opengl_to_opencv``); the first may be any.
        name: what messages call it.
        say: prints a line.

    Returns:
        The same, float64 where it was given so, else float32.

    Raises:
        UserError: anything else, with the first frame that is wrong.
    """
    try:
        given = np.asarray(c2w)
        if given.dtype.kind not in "fiu":
            raise TypeError(f"dtype {given.dtype}")
        poses = given.astype(np.float64)
    except Exception as error:  # each kind of object fails in its own way: torch's tensors with gradients, texts
        raise UserError(
            f"{name} is no array of real numbers ({reason_of(error)}); give camera-to-world matrices (frames, 4, 4)"
        ) from error
    if poses.ndim != 3 or poses.shape[1:] != (4, 4) or not len(poses):
        raise UserError(f"{name} of shape {poses.shape}; allowed is (frames, 4, 4): {_shape_advice(poses.shape)}")
    if len(wrong := np.flatnonzero(~np.isfinite(poses).all((1, 2)))):
        raise UserError(
            f"{name} holds NaN or infinity in {len(wrong)} frames, first in frame {wrong[0]}; allowed are finite "
            "numbers: fill the gaps, or cut the path before them"
        )
    last_row = np.abs(poses[:, 3] - [0, 0, 0, 1]).max(1)
    if len(wrong := np.flatnonzero(last_row > 1e-6)):
        raise UserError(
            f"{name}: the last row of frame {wrong[0]} is {poses[wrong[0], 3].tolist()}; allowed is 0 0 0 1: are the "
            "matrices transposed?"
        )
    _check_rotations(poses[:, :3, :3], name)
    steps = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)
    if len(steps) and steps.max() > _LONGEST_STEP:
        say(
            f"{name}: the camera moves {steps.max():.3g} units to frame {int(steps.argmax()) + 1}; action strings move "
            "0.025 to 0.05 per frame: are the units metres?"
        )
    return poses if given.dtype == np.float64 else poses.astype(np.float32)


def _shape_advice(shape: tuple[int, ...]) -> str:
    if len(shape) == 3 and shape[1:] == (3, 4):
        return "add the row 0 0 0 1 to every matrix, after making sure that they lead from the camera to the world"
    if shape == (4, 4):
        return "one pose is c2w[None]; a path has one for every frame"
    if len(shape) == 4:
        return "give the path of one video"
    return "give one camera-to-world matrix for every frame"


def _check_rotations(rotations: np.ndarray, name: str) -> None:
    off = np.abs(np.swapaxes(rotations, -1, -2) @ rotations - np.eye(3)).max((1, 2))
    if len(wrong := np.flatnonzero(off > _RIGID_TOLERANCE)):
        first = int(wrong[0])
        raise UserError(
            f"{name} is not rigid in {len(wrong)} frames: in frame {first} RᵀR is {off[first]:.2g} away from the "
            f"identity; allowed is {_RIGID_TOLERANCE:g}: take scale and shear out of the matrices"
        )
    if len(wrong := np.flatnonzero(np.linalg.det(rotations) < 0)):
        raise UserError(
            f"{name} holds reflections in {len(wrong)} frames, first in frame {wrong[0]}; allowed are rotations, of "
            "determinant 1: bring the axes to x right, y down, z forward"
        )


@dataclasses.dataclass(frozen=True)
class TrajectorySummary:
    """A path in numbers.

    Attributes:
        frames: F.
        path_length: units.
        longest_step: units, from one frame to the next.
        yaw: degrees from the first frame to the last, positive to the right; full turns count.
        turned: degrees of yaw, left and right added up.
        pitch: degrees from the first frame to the last, positive upwards.
        lowest_pitch: degrees against the horizon, positive upwards.
        highest_pitch: the same.
    """

    frames: int
    path_length: float
    longest_step: float
    yaw: float
    turned: float
    pitch: float
    lowest_pitch: float
    highest_pitch: float

    def describe(self) -> str:
        """The numbers in one line."""
        turned = "" if abs(self.turned - abs(self.yaw)) < 0.05 else f" ({self.turned:.1f}° in all)"
        nods = self.highest_pitch - self.lowest_pitch - abs(self.pitch) >= 0.05
        pitches = f" (from {_degrees(self.lowest_pitch)} to {_degrees(self.highest_pitch)})" if nods else ""
        return (
            f"{self.frames} frames, path {self.path_length:.3f} units, yaw {_degrees(self.yaw)}{turned}, "
            f"pitch {_degrees(self.pitch)}{pitches}"
        )


def _degrees(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}°"  # + 0.0 makes zero of minus zero


def yaw_and_pitch(c2w: Float[np.ndarray, "F 4 4"]) -> tuple[Float[np.ndarray, "F"], Float[np.ndarray, "F"]]:
    """Degrees of heading, to the right of the world's z and over full turns, and of pitch, upwards."""
    forward = np.asarray(c2w, np.float64)[:, :3, 2]
    heading = np.arctan2(forward[:, 0], forward[:, 2])
    vertical = np.hypot(forward[:, 0], forward[:, 2]) < 1e-4  # has no heading: keeps the last one
    for frame in np.flatnonzero(vertical):
        heading[frame] = heading[frame - 1] if frame else 0.0
    return np.rad2deg(np.unwrap(heading)), np.rad2deg(np.arcsin(np.clip(-forward[:, 1], -1.0, 1.0)))


def summarize_trajectory(c2w: Float[np.ndarray, "F 4 4"]) -> TrajectorySummary:
    """A path in numbers; see ``TrajectorySummary``."""
    yaw, pitch = yaw_and_pitch(c2w)
    steps = np.linalg.norm(np.diff(np.asarray(c2w, np.float64)[:, :3, 3], axis=0), axis=1)
    return TrajectorySummary(
        frames=len(c2w),
        path_length=float(steps.sum()),
        longest_step=float(steps.max(initial=0.0)),
        yaw=float(yaw[-1] - yaw[0]),
        turned=float(np.abs(np.diff(yaw)).sum()),
        pitch=float(pitch[-1] - pitch[0]),
        lowest_pitch=float(pitch.min()),
        highest_pitch=float(pitch.max()),
    )


def snap_frames(num_frames: int, *, available: int | None = None, temporal_factor: int = 8) -> int:
    """The number of frames nearest to ``num_frames`` that an autoencoder takes, 1 + temporal_factor·k; ties go up.

    Args:
        num_frames: that are asked for, 1 or more.
        available: poses that there are; the result is not above it unless ``num_frames`` is.
        temporal_factor: pixel frames per latent frame.

    Raises:
        UserError: a number below 1.
    """
    if num_frames < 1 or temporal_factor < 1:
        raise UserError(f"num_frames {num_frames} is not allowed; choose 1 or more, best 1 + {temporal_factor}k")
    below = num_frames - (num_frames - 1) % temporal_factor
    nearest = below if 2 * (num_frames - below) < temporal_factor else below + temporal_factor
    return below if available is not None and nearest > available else nearest
