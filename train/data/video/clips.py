"""From a video to clips: frames at a given rate, scaled and cut, as 8-bit pixels; and what is wrong with a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kernels.typing import UInt8
from train.data.conditions import View
from train.data.decoding import BadPicture, flip, resize_and_crop_to
from train.data.sources.listing import Blob
from train.data.video.containers import ClipFile, DamagedError, FrameFolder, open_clip
from train.data.video.windows import Timing, resampled_count, tolerance


@dataclass
class ClipsRead:
    """What came of a video.

    Attributes:
        clips: by (first frame, view): (F, h, w, C). Those that lie behind a damage are missing.
        problem: what is wrong with the video, as in "is damaged after 1.20 s (...)"; None: nothing.
        variable: whether the frame rate of what was decoded is variable.
    """

    clips: dict[tuple[int, View], UInt8[np.ndarray, "F h w C"]] = field(default_factory=dict)
    problem: str | None = None
    variable: bool = False


@dataclass(frozen=True)
class Examined:
    """A video that was decoded from beginning to end.

    Attributes:
        timing: of its frames.
        seconds: how long it really is.
        problem: what is wrong with it; None: nothing.
    """

    timing: Timing
    seconds: float
    problem: str | None


def read_clips(
    blob: Blob,
    starts: Sequence[int],
    views: Sequence[View],
    *,
    frames: int,
    fps: float,
    source_fps: float | None = None,
    channels: int = 3,
) -> ClipsRead:
    """Decodes some clips of a video.

    Frame i of the video at ``fps`` is the one that it shows i/fps seconds after its first, or the next one where that
    begins less than about half a frame later (of the video or at ``fps``, whichever is shorter). At constant rates of
    ``fps`` and more that is the nearest frame; it is right for variable rates and for rounded times too. A damaged
    video gives the clips before its damage.

    Args:
        blob: where the video lies.
        starts: first frames of the clips, at ``fps``.
        views: how each clip is scaled, cut and mirrored; every clip is given in each.
        frames: F.
        fps: frames per second of the clips.
        source_fps: of the video, where it does not say so itself.
        channels: 1 for gray, 3 for RGB.

    Raises:
        BadPicture: it can't be used as a video at all.
        UserError: PyAV is not installed.
    """
    result = ClipsRead()
    wanted = sorted({start + frame for start in starts for frame in range(frames)})
    users = {number: [start for start in starts if start <= number < start + frames] for number in wanted}
    filled: dict[tuple[int, View], int] = dict.fromkeys([(s, v) for s in starts for v in views], 0)
    arrays = {(s, v): np.empty((frames, v.height, v.width, channels), np.uint8) for s, v in filled}
    with open_clip(blob, source_fps) as clip:
        seconds: list[float] = []
        try:
            for number, pixels in _at_rate(clip, wanted, fps, seconds):
                for view in views:
                    part = _part(pixels, view, channels)
                    for start in users[number]:
                        arrays[start, view][number - start] = part
                        filled[start, view] += 1
        except DamagedError as error:
            result.problem = _after(str(error), seconds)
        else:
            if any(count < frames for count in filled.values()):
                result.problem = _ends_early(clip, seconds)
        result.variable = Timing.of(seconds).variable
    result.clips = {name: array for name, array in arrays.items() if filled[name] == frames}
    return result


def _at_rate(clip: ClipFile | FrameFolder, wanted: Sequence[int], fps: float, seconds: list[float]):
    """(number, pixels) of the wanted frames of a video at ``fps``, as far as it goes.

    Args:
        clip: the video.
        wanted: numbers in rising order.
        fps: of the numbers.
        seconds: times of the frames that were decoded are added here.

    Raises:
        DamagedError: the video can't be decoded any further; what was shown before it has been given.
    """
    late = tolerance(clip.frame_seconds, fps)
    waiting = list(reversed(wanted))
    shown = pixels = None
    for frame in clip.frames(wanted[0] / fps if wanted else 0.0):
        seconds.append(frame.seconds)
        while waiting and waiting[-1] / fps + late < frame.seconds:
            if shown is None:  # the video begins later than its first time
                shown = frame
            if pixels is None:
                pixels = clip.pixels(shown)
            yield waiting.pop(), pixels
        if not waiting:
            return
        shown, pixels = frame, None
    if shown is None:
        return
    count = resampled_count(shown.seconds + shown.duration, fps)
    while waiting and waiting[-1] < count:
        if pixels is None:
            pixels = clip.pixels(shown)
        yield waiting.pop(), pixels


def examine(blob: Blob, source_fps: float | None = None) -> Examined:
    """Decodes a whole video, keeping nothing of it.

    Raises:
        BadPicture: it can't be used as a video at all.
        UserError: PyAV is not installed.
    """
    with open_clip(blob, source_fps) as clip:
        seconds: list[float] = []
        end, problem = 0.0, None
        try:
            for frame in clip.frames():
                seconds.append(frame.seconds)
                end = frame.seconds + frame.duration
                if isinstance(clip, FrameFolder):  # what decoding a file has found already
                    clip.pixels(frame)
        except DamagedError as error:
            problem = _after(str(error), seconds)
        else:
            if end < clip.header.seconds - 1.5 * clip.frame_seconds and end < 0.95 * clip.header.seconds:
                problem = _ends_early(clip, seconds)
        return Examined(Timing.of(seconds), end, problem)


def _part(pixels: UInt8[np.ndarray, "H W 3"], view: View, channels: int) -> UInt8[np.ndarray, "h w C"]:
    part = resize_and_crop_to(pixels, view.height, view.width, view.crop)
    if channels == 1:
        from PIL import Image

        part = np.asarray(Image.fromarray(part).convert("L"))[..., None]
    return flip(part) if view.mirrored else part


def _after(reason: str, seconds: Sequence[float]) -> str:
    return f"{reason} after {seconds[-1]:.2f} s" if seconds else reason


def _ends_early(clip: ClipFile | FrameFolder, seconds: Sequence[float]) -> str:
    end = seconds[-1] + clip.frame_seconds if seconds else 0.0
    return f"is cut off: it ends after {end:.2f} s of the {clip.header.seconds:.2f} s that it says"


def first_pixels(blob: Blob, places: Sequence[float], source_fps: float | None = None) -> list[np.ndarray]:
    """The frames at some shares of a video's length, for looking at: (H, W, 3) each; fewer where it is damaged.

    Raises:
        BadPicture: it can't be used as a video at all.
    """
    found: list[np.ndarray] = []
    with open_clip(blob, source_fps) as clip:
        last = max(clip.header.seconds - clip.frame_seconds, 0.0)
        for place in places:
            shown = None
            try:
                for frame in clip.frames(place * last):
                    if shown is not None and frame.seconds > place * last + 0.5 * clip.frame_seconds:
                        break
                    shown = frame
                if shown is not None:
                    found.append(clip.pixels(shown))
            except DamagedError:
                break
    if not found:
        raise BadPicture(blob.name, "has no frame that can be decoded")
    return found
