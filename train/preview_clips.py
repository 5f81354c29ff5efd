"""Previews of clips: a table of frames to look at, and the same clips in motion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kernels.typing import Float
from sana_jax.images import automatic_enlargement, enlarge_image, image_grid, labelled_table, to_pil
from sana_jax.videos import write_video

FRAMES_SHOWN = 6
_LARGEST_CELL = 256  # px along a side, in the table and in the GIF


def clip_table(clips: Float[np.ndarray, "N F H W P"], labels: Sequence[str]) -> Any:
    """One row for each clip with some of its frames, the first and the last among them, as a PIL image.

    Args:
        clips: in [0, 1].
        labels: of each clip.
    """
    count = clips.shape[1]
    shown = sorted(set(np.linspace(0, count - 1, min(FRAMES_SHOWN, count)).round().astype(int).tolist()))
    rows = [[_cell(clip[number]) for number in shown] for clip in clips]
    return labelled_table(rows, labels, [f"frame {number + 1}" for number in shown])


def write_moving(
    path: Path,
    clips: Float[np.ndarray, "N F H W P"],
    columns: int,
    labels: Sequence[str],
    fps: float,
    metadata: Mapping[str, Any],
    say: Callable[[str], None],
) -> list[Path]:
    """Writes all clips side by side as ``<path>.gif`` and, in colour, in full size as ``<path>.mp4``.

    Without PyAV there is no mp4, which a line says.

    Args:
        path: without an ending.
        clips: in [0, 1].
        columns: clips in a row.
        labels: of each clip.
        fps: frames per second.
        metadata: noted in the files.
        say: prints a line.
    """
    frames = [image_grid([_cell(frame) for frame in moment], columns, labels) for moment in clips.swapaxes(0, 1)]
    written = [write_video(f"{path}.gif", frames, fps, metadata=metadata, say=say)]
    if clips.shape[-1] == 1:
        return written
    rows = -(-len(clips) // columns)
    height, width = clips.shape[2:4]
    sheet = np.zeros((clips.shape[1], rows * height, columns * width, clips.shape[-1]), np.float32)
    for number, clip in enumerate(clips):
        top, left = number // columns * height, number % columns * width
        sheet[:, top : top + height, left : left + width] = clip
    try:
        import av  # noqa: F401
    except ImportError:
        say(f"preview: no {path.name}.mp4, since PyAV is not installed (pip install 'sana-jax[video]')")
        return written
    return [*written, write_video(f"{path}.mp4", sheet, fps, metadata=metadata, say=say)]


def _cell(frame: Float[np.ndarray, "H W P"]) -> Any:
    """A frame as a picture of a size to look at."""
    picture = to_pil(frame)
    factor = automatic_enlargement(*frame.shape[:2]) // 2 or 1
    if factor > 1:
        return enlarge_image(picture, factor)
    if max(picture.size) > _LARGEST_CELL:
        picture.thumbnail((_LARGEST_CELL, _LARGEST_CELL))
    return picture
