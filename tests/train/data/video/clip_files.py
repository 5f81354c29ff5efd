"""Video files for tests: every frame has its own number in it, as bars, so that what was decoded can be told."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

_BARS = 8
_FORMATS = {"gif": "rgb8"}


def numbered(number: int, height: int = 32, width: int = 64) -> np.ndarray:
    """A picture whose upper half has eight bars, black or white: the number in binary; the lower half is blue."""
    picture = np.zeros((height, width, 3), np.uint8)
    bits = [(number >> bit) & 1 for bit in range(_BARS)]
    picture[: height // 2] = np.repeat(np.asarray(bits, np.uint8) * 255, width // _BARS)[None, :, None]
    picture[height // 2 :, :, 2] = 200
    return picture


def number_of(pixels: np.ndarray) -> int:
    """The number in a picture, whatever size it was brought to."""
    gray = pixels[: max(1, pixels.shape[0] // 3)].astype(float).mean((0, 2))
    middles = (np.arange(_BARS) + 0.5) * pixels.shape[1] / _BARS
    return sum(int(gray[int(place)] > 127) << bit for bit, place in enumerate(middles))


def write_video(
    path: Path | io.BytesIO,
    count: int,
    *,
    fps: float = 10,
    times_ms: Sequence[int] | None = None,
    codec: str = "libx264",
    size: tuple[int, int] = (32, 64),
    kind: str | None = None,
    first: int = 0,
    rotation: int = 0,
    aspect: Fraction | None = None,
    key_every: int | None = None,
    options: dict[str, str] | None = None,
) -> Path | io.BytesIO:
    """A video of numbered frames.

    Args:
        path: where to.
        count: frames.
        fps: of a constant rate.
        times_ms: the times of frames, of a variable one.
        codec: FFmpeg's name.
        size: (height, width).
        kind: container; None: by the name's ending.
        first: the first frame's number.
        rotation: degrees that a player should turn it by.
        aspect: of a pixel.
        key_every: frames from one key frame to the next.
        options: of the container.
    """
    target: Any = path if isinstance(path, io.BytesIO) else str(path)
    with av.open(target, "w", format=kind, options=options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = size
        stream.pix_fmt = _FORMATS.get(codec, "yuv420p")
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if key_every is not None:
            stream.codec_context.gop_size = key_every
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(first + number, *size), format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def video_bytes(count: int, kind: str = "mp4", **options: Any) -> bytes:
    """A video as bytes."""
    return write_video(io.BytesIO(), count, kind=kind, **options).getvalue()


def write_frames(folder: Path, count: int, size: tuple[int, int] = (32, 64)) -> Path:
    """A folder of frames f1.png, f2.png, ..., f10.png, ... whose order by letters is another."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(numbered(number, *size)).save(folder / f"f{number + 1}.png")
    return folder
