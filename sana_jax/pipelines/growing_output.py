"""Where the frames of a video go that is made block after block: a file that grows while they come, or memory."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from kernels.typing import Float
from sana_jax.compilation import readable_bytes
from sana_jax.errors import UserError
from sana_jax.images import to_pil
from sana_jax.pipelines.base import OutputType
from sana_jax.pipelines.checks import check_common_options
from sana_jax.videos import VideoWriter, count_frames, video_kind

_ADVICE = "make room on the disk and go on with --resume (resume=True)"
_MOST_BYTES = 1 << 33  # of frames that are held in memory where there is no output_path


class GrowingOutput:
    """Takes the blocks of one video.

    Args:
        path: an mp4, or a folder for pictures; None keeps the blocks in memory.
        fps: frames per second.
        keep_frames: goes on with the file that is there, of which so many frames are kept.
        enlarge: every pixel of the file this many times.
        metadata: what is noted in the file.
        say: prints a line.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        fps: float,
        *,
        keep_frames: int = 0,
        enlarge: int = 1,
        metadata: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.path = None if path is None else pathlib.Path(path)
        self._kept: list[np.ndarray] = []
        self._enlarge = enlarge
        options = {"metadata": metadata, "keep_frames": keep_frames, "separate": True, "advice": _ADVICE, "say": say}
        self._writer = None if path is None else VideoWriter(path, fps, **options)

    @property
    def frame_count(self) -> int:
        """Frames that the file has."""
        return 0 if self._writer is None else self._writer.frame_count

    def append(self, block: np.ndarray) -> None:
        """Takes a block: frames (F, H, W, C) in [0, 1]; in memory, latents (T, h, w, C) as well."""
        if self._writer is None:
            self._kept.append(block)
            return
        if self._enlarge > 1:
            block = np.repeat(np.repeat(block, self._enlarge, axis=1), self._enlarge, axis=2)
        self._writer.append(block)

    def close(self, *, finish: bool) -> None:
        """Ends the file; with ``finish``, lays an mp4 out as an ordinary one."""
        if self._writer is not None:
            self._writer.close(finish=finish)

    def gathered(self, output_type: OutputType) -> Any:
        """All blocks of a short video, in the form that was asked for; None where they are in a file, or none came."""
        if not self._kept:
            return None
        whole = np.concatenate(self._kept)
        if output_type == "latent":
            return np.moveaxis(whole, -1, 0)[None]
        if output_type == "np":
            return whole[None]
        return [[to_pil(frame) for frame in whole]]


def frames_to_keep(path: str | os.PathLike[str], ends: Iterable[int]) -> int:
    """Frames of whole blocks that a file has for certain: the last frame of an mp4 that was cut off may be cut too.

    Args:
        path: the file or folder, which may not be there.
        ends: frames of the video up to the end of every block that is to be kept.
    """
    there = count_frames(path) - (video_kind(path) == "mp4")
    return max((end for end in ends if end <= there), default=0)


def check_output_arguments(output_path: Any, output_type: str | None, resume: bool, enlarge: int, seed: int) -> None:
    """Raises ``UserError`` for values that are not allowed, and for arguments that would not be used."""
    check_common_options("pil" if output_type is None else output_type, 1, seed)
    if output_path is not None and output_type is not None:
        raise UserError(f"output_type {output_type!r} would not be used, since output_path is given; leave one out")
    if type(enlarge) is not int or enlarge < 1:
        raise UserError(f"enlarge {enlarge!r} is not allowed; choose 1 or more")
    if output_path is None and (resume or enlarge > 1):
        unused = "resume" if resume else "enlarge"
        raise UserError(f"{unused} would not be used without output_path; name the video's file, or leave it out")


def check_frames_in_memory(frames: int, size: tuple[int, int], channels: int) -> None:
    """Raises ``UserError`` for frames that take too much memory where there is no file for them."""
    height, width = size
    needed = 4 * frames * height * width * channels
    if needed > _MOST_BYTES:
        raise UserError(
            f"{frames} frames of {height}x{width} take {readable_bytes(needed)} of memory; allowed without "
            f"output_path are {readable_bytes(_MOST_BYTES)}: give an output_path, to which frames are written as they "
            "come"
        )


def shown_in_unit_range(decoded: Float[np.ndarray, "F H W C"]) -> Float[np.ndarray, "F H W C"]:
    """Decoded frames in [-1, 1] to [0, 1]."""
    return np.clip(decoded / 2 + 0.5, 0.0, 1.0)
