"""Shows a camera's trajectory before anything is sampled.

``python -m sana_jax.camera w-80,jw-40,w-40 --scheme v1 --plot path.png --npy path.npy``
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from sana_jax.camera.actions import find_scheme
from sana_jax.camera.files import read_array
from sana_jax.camera.plot import draw_trajectory
from sana_jax.camera.trajectories import action_to_c2w, check_poses, snap_frames, summarize_trajectory
from sana_jax.command_line import parse
from sana_jax.errors import UserError, run_command_line
from sana_jax.files import atomic_file

if TYPE_CHECKING:
    from kernels.typing import Float

_PROG = "python -m sana_jax.camera"
_TEMPORAL_FACTOR = 8  # pixel frames per latent frame of SANA-WM's autoencoder


@dataclasses.dataclass(frozen=True)
class CameraConfig:
    """Shows the path of an action string, or of poses in a file: numbers, a picture, an array."""

    action: str | None = None
    """Keys and frames, such as w-80,dw-40,none-8. May also come first, without --action."""
    c2w: str | None = None
    """An .npy file of camera-to-world matrices (frames, 4, 4) instead of an action."""
    scheme: Literal["v1", "v2"] = "v1"
    """What keys mean: v1, diffusers 0.42.1, a and d move sideways; v2, the model's authors' newest, a and d turn. Also
    --action-scheme, its name in generate."""
    num_frames: int | None = None
    """Frames that the path must have, the image included; by default as many as it has."""
    translation_speed: float | None = None
    """Units per frame of one key, instead of the scheme's."""
    rotation_speed: float | None = None
    """Degrees per frame of one key, instead of the scheme's."""
    pitch_limit: float | None = None
    """Degrees up and down, instead of the scheme's."""
    smooth: bool | None = None
    """Whether speeds come and go smoothly, instead of as the scheme has it."""
    plot: str | None = None
    """A .png: the path from above and from the side."""
    npy: str | None = None
    """An .npy: float32 camera-to-world matrices (frames, 4, 4), which pipelines take as c2w."""


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line, prints the path's numbers and writes what is asked for.

    Raises:
        UserError: a mistake in the options or in the path.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("--") and words[0] != "-h":
        words.insert(0, "--action")
    config = parse(CameraConfig, words, prog=_PROG, aliases={"action-scheme": "scheme"})
    if (config.action is None) == (config.c2w is None):
        given = "neither is" if config.action is None else "both are"
        raise UserError(f"an action and --c2w: {given} given, and one of the two is allowed; see {_PROG} --help")
    plot = _output_path(config.plot, ".png", "plot")
    npy = _output_path(config.npy, ".npy", "npy")
    c2w, title = _action_path(config) if config.action is not None else _file_path(config)
    summary = summarize_trajectory(c2w)
    print(title)
    print(summary.describe())
    if (nearest := snap_frames(summary.frames, available=summary.frames)) != summary.frames:
        print(f"a model with 1 + {_TEMPORAL_FACTOR}k frames, as SANA-WM, would use the first {nearest}")
    if npy is not None:
        try:
            with atomic_file(npy) as file:
                np.save(file, c2w.astype(np.float32))
        except OSError as error:
            raise UserError(f"cannot write {npy} ({error.strerror or error}); choose another place") from error
        print(f"poses: {npy}, float32 {c2w.shape}")
    if plot is not None:
        from sana_jax.images import save_png

        save_png(plot, draw_trajectory(c2w, title))
        print(f"picture: {plot}")
    return 0


def _action_path(config: CameraConfig) -> tuple[Float[np.ndarray, "F 4 4"], str]:
    changed = {name: getattr(config, name) for name in ("translation_speed", "rotation_speed", "pitch_limit", "smooth")}
    try:
        scheme = find_scheme(config.scheme, **changed)
    except UserError as error:  # which begins with the name of what is wrong
        name, _, rest = str(error).partition(" ")
        raise UserError(f"--{name.replace('_', '-')} {rest}") from error
    c2w = action_to_c2w(config.action, scheme, num_frames=config.num_frames)
    pace = f"{scheme.translation_speed:g} units and {scheme.rotation_speed:g}° per frame"
    return c2w, f"{''.join(config.action.split())}   scheme {scheme.name} ({scheme.source}), {pace}"


def _file_path(config: CameraConfig) -> tuple[Float[np.ndarray, "F 4 4"], str]:
    for field in dataclasses.fields(config):
        unused = field.name in ("scheme", "translation_speed", "rotation_speed", "pitch_limit", "smooth")
        if unused and (value := getattr(config, field.name)) != field.default:
            name = field.name.replace("_", "-")
            raise UserError(f"--{name} {value} would not be used with --c2w; it is for actions: leave it out")
    path = pathlib.Path(config.c2w)
    c2w = check_poses(read_array(path, "--c2w", "poses (frames, 4, 4)"), str(path))
    if config.num_frames not in (None, len(c2w)):
        raise UserError(
            f"{path} has {len(c2w)} frames, not the {config.num_frames} that --num-frames asks for; leave it out, or "
            "give another file"
        )
    return c2w, f"{path.name}   camera-to-world matrices"


def _output_path(name: str | None, suffix: str, option: str) -> pathlib.Path | None:
    if name is None:
        return None
    path = pathlib.Path(name)
    if path.suffix.lower() != suffix:
        raise UserError(
            f"--{option} {name!r} is not allowed; its name ends in {suffix}: try {path.with_suffix(suffix)}"
        )
    if path.is_dir():
        raise UserError(f"--{option} {name} is a folder; allowed is a file's name: try {path / f'path{suffix}'}")
    return path


if __name__ == "__main__":
    run_command_line(main)
