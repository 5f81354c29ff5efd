"""Video files and folders of frames as one thing: a header, and frames with their times. PyAV reads the files."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, NamedTuple

import numpy as np

from kernels.typing import UInt8
from sana_jax.errors import UserError, reason_of
from train.data.decoding import MOST_PIXELS, SHORTEST_SIDE, BadPicture, decode_picture, read_header
from train.data.sources.frame_folders import FramesBlob
from train.data.sources.listing import Blob

# Playlists and other containers that name further files or web addresses are not read.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,flv,asf,ogg"
_SLOWEST, _FASTEST = 1e-3, 1000.0  # frames per second: a rate above them is a time base, one below a damage
_LONGEST = 48 * 3600.0  # seconds: what says more is damaged
_SEEK_FROM = 4.0  # seconds: nearer to the beginning, everything is decoded
_INDEXED = ("mov", "matroska")  # that know where each key frame lies
_HDR = (16, 18)  # PQ and HLG, as FFmpeg numbers transfer functions


class ClipHeader(NamedTuple):
    """What a video says of itself, and its first frame.

    Attributes:
        height: as shown: after rotation, with square pixels.
        width: as shown.
        fps: frames per second on average.
        seconds: how long it is.
        codec: FFmpeg's name; "frames" of a folder of pictures.
        oddities: what is done to it, such as "rotated as they ask".
    """

    height: int
    width: int
    fps: float
    seconds: float
    codec: str
    oddities: tuple[str, ...] = ()


class TimedFrame(NamedTuple):
    """A frame of a video.

    Attributes:
        seconds: since the first frame.
        duration: how long it is shown, as far as the video says; else the usual time.
        content: PyAV's frame, or a picture's file.
    """

    seconds: float
    duration: float
    content: Any


class DamagedError(Exception):
    """A video can't be decoded any further; the reason is as in "is cut off"."""


def require_pyav() -> Any:
    """PyAV's module.

    Raises:
        UserError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"videos are read with PyAV, which is not installed ({error}): pip install av, or pip install "
            "'sana-jax[video]'"
        ) from error
    _quiet(av)
    return av


@functools.cache
def _quiet(av: Any) -> None:
    """What FFmpeg complains about is found as an error anyway, or is harmless."""
    av.logging.set_level(None)


class ClipFile:
    """An open video. Made by ``open_clip``.

    Attributes:
        header: see ``ClipHeader``.
    """

    def __init__(self, name: str, file: IO[bytes], source_fps: float | None):
        self._name, self._file, self._container = name, file, None
        # the first frame and those after it, while nothing has been read since
        self._fresh: tuple[Any, Iterator[Any]] | None = None
        self._open()
        container, stream = self._container, self._stream
        # AVI has no times, and what is made up for frames that are reordered is wrong
        self._counted = container.format.name == "avi"
        self._rate = _rate(stream) or source_fps
        self._ticks = float(stream.time_base)
        self._start = stream.start_time
        first = self._first_frame()
        if self._rate is None and (self._counted or first.pts is None):
            raise BadPicture(name, "says neither times nor a frame rate; give its rate with --data.source-fps")
        self.header = self._header(first)

    def _open(self) -> None:
        """Opens the file, or opens it again, at its beginning.

        Raises:
            BadPicture: it is no video that can be decoded.
        """
        av = require_pyav()
        self.close()
        self._file.seek(0)
        try:
            self._container = av.open(self._file, options={"format_whitelist": _CONTAINERS}, metadata_errors="replace")
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise BadPicture(
                self._name, f"is not a video of a known kind, or is cut off or damaged ({_reason(error)})"
            ) from error
        self._stream = _stream(self._name, self._container)

    def close(self) -> None:
        """Lets go of the file."""
        self._fresh = None
        if self._container is not None:
            self._container.close()
            self._container = None

    def _first_frame(self) -> Any:
        frames = self._raw_frames()
        try:
            frame = next(frames)
        except StopIteration:
            raise BadPicture(self._name, "has no frame that can be decoded") from None
        except DamagedError as error:
            raise BadPicture(self._name, f"has no frame that can be decoded ({error})") from error
        self._fresh = frame, frames
        if self._start is None:
            self._start = frame.pts
        return frame

    def _header(self, first: Any) -> ClipHeader:
        oddities = []
        height, width = self._coded_size = first.height, first.width
        if _alpha(first) and (first.to_ndarray(format="rgba")[..., 3] < 255).any():
            oddities.append("transparent: put on white")
        # what a first frame alone can't tell is asked of the stream
        ratio = float(self._stream.sample_aspect_ratio or 1)
        if ratio > 0 and abs(ratio - 1) > 1e-3:
            width = max(1, round(width * ratio))
            oddities.append("of pixels that are not square: brought to square ones")
        if first.rotation % 360:
            oddities.append("rotated as they ask")
            if first.rotation % 180:
                height, width = width, height
        if first.interlaced_frame:
            oddities.append("interlaced: both halves of a frame are taken as one")
        if int(getattr(first, "color_trc", 0) or 0) in _HDR:
            oddities.append("of high dynamic range: taken as if they were not, and look pale")
        if min(height, width) < SHORTEST_SIDE or height * width > MOST_PIXELS:
            raise BadPicture(self._name, f"has {height}x{width} pixels; {SHORTEST_SIDE} to {MOST_PIXELS} are read")
        seconds = self._seconds()
        if not seconds <= _LONGEST:
            seconds = self._by_packets()
        if not 0 <= seconds <= _LONGEST:
            raise BadPicture(self._name, f"says that it lasts {seconds:.3g} s; {_LONGEST:g} are the most that are read")
        usual = self._rate or (self._stream.frames or 1) / max(seconds, 1e-3)
        return ClipHeader(height, width, usual, seconds or 1 / usual, self._codec, tuple(oddities))

    @property
    def _codec(self) -> str:
        return self._stream.codec_context.name

    def _seconds(self) -> float:
        """How long the stream is: what it says, what the container says of it alone, else by its packets."""
        stream, container = self._stream, self._container
        if self._counted:
            return stream.frames / self._rate if stream.frames else self._by_packets()
        if stream.duration:
            return float(stream.duration * stream.time_base)
        if container.format.name.startswith("matroska") and (self._start or 0) * self._ticks * (self._rate or 25) > 0.5:
            return self._by_packets()  # what it states counts from 0 in some files, from the first frame in others
        stated = _clock(stream.metadata.get("DURATION", ""))
        if stated is None and len(container.streams) == 1 and container.duration:
            stated = container.duration / 1e6
        return self._by_packets() if stated is None else stated

    def _by_packets(self) -> float:
        """Reads the whole file, without decoding it."""
        count, end = 0, 0.0
        for packet in self._packets():
            count += 1
            if packet.pts is not None:
                end = max(end, (packet.pts - (self._start or 0) + (packet.duration or 0)) * self._ticks)
        return count / self._rate if self._counted or not end else end

    def _packets(self) -> Iterator[Any]:
        """The packets of the whole file, from its beginning to its end or to where it is damaged."""
        self._open()
        with suppress(Exception):  # what is damaged is found by decoding
            for packet in self._container.demux(self._stream):
                if packet.size:
                    yield packet

    def all_seconds(self) -> list[float]:
        """The times that ``frames`` gives the frames of the whole file, which is read for it and not decoded."""
        shown = [packet for packet in self._packets() if not packet.is_discard and not self._is_hidden(packet)]
        if self._counted or any(packet.pts is None for packet in shown):
            return [number / self.header.fps for number in range(len(shown))]
        return sorted({(packet.pts - self._start) * self._ticks for packet in shown})

    def _is_hidden(self, packet: Any) -> bool:
        """Whether a packet holds what other frames are made from and none that is shown, as VP8 has them."""
        return self._codec == "vp8" and not bytes(packet)[0] & 0x10

    @property
    def frame_seconds(self) -> float:
        """How long a frame is usually shown."""
        return 1.0 / self.header.fps

    def frames(self, first_seconds: float = 0.0) -> Iterator[TimedFrame]:
        """Frames in the order of their times, from one that is shown at ``first_seconds`` or before it.

        Raises:
            DamagedError: the file can't be decoded any further.
        """
        last = -math.inf
        for number, frame in enumerate(self._frames_from(first_seconds)):
            if self._counted or frame.pts is None:
                seconds = number / self.header.fps
            else:
                seconds = (frame.pts - self._start) * self._ticks
            if seconds <= last:
                if seconds == last:
                    continue  # shown for no time at all
                raise DamagedError(f"has frames whose times go back from {last:.2f} s to {seconds:.2f} s")
            last = seconds
            duration = (frame.duration or 0) * self._ticks
            yield TimedFrame(seconds, duration if duration > 0 else self.frame_seconds, frame)

    def _frames_from(self, seconds: float) -> Iterator[Any]:
        """All frames, or those from a key frame at or before a time where that is sure to work."""
        if seconds >= _SEEK_FROM and self._container.format.name.startswith(_INDEXED) and self._seek(seconds):
            yield from self._raw_frames()
            return
        if self._fresh is None:
            try:
                self._open()
            except BadPicture as error:
                raise DamagedError(error.reason) from error
        else:
            (frame, frames), self._fresh = self._fresh, None
            yield frame
            yield from frames
            return
        yield from self._raw_frames()

    def _seek(self, seconds: float) -> bool:
        """Goes to the last key frame that is shown at a time or before it; False where that fails."""
        self._fresh = None
        place = int((self._start or 0) + seconds / self._ticks)
        try:
            self._container.seek(place, stream=self._stream, backward=True)
            frame = next(self._raw_frames(), None)
            if frame is None or frame.pts is None or frame.pts > place:
                return False
            self._container.seek(place, stream=self._stream, backward=True)
        except (OSError, ValueError, DamagedError):
            return False
        return True

    def _raw_frames(self) -> Iterator[Any]:
        av = require_pyav()
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                frames = packet.decode()
            except av.error.EOFError:
                return
            except (av.error.FFmpegError, OSError, ValueError) as error:
                raise DamagedError(f"is damaged ({_reason(error)})") from error
            for frame in frames:
                if frame.is_corrupt:
                    raise DamagedError("is damaged (a frame is not whole)")
                yield frame

    def pixels(self, frame: TimedFrame) -> UInt8[np.ndarray, "H W 3"]:
        """A frame's pixels as shown.

        Raises:
            DamagedError: it can't be converted, or is of another size than the first one.
        """
        content, (height, width) = frame.content, self.header[:2]
        if (content.height, content.width) != self._coded_size:
            raise DamagedError(f"changes its size to {content.height}x{content.width}")
        try:
            pixels = content.to_ndarray(format="rgba" if _alpha(content) else "rgb24")
        except (OSError, ValueError) as error:
            raise DamagedError(f"has a frame that can't be converted ({_reason(error)})") from error
        if pixels.shape[-1] == 4:
            from PIL import Image

            white = Image.new("RGBA", pixels.shape[1::-1], "white")
            pixels = np.asarray(Image.alpha_composite(white, Image.fromarray(pixels)).convert("RGB"))
        turns = round(content.rotation / 90) % 4
        if turns:
            pixels = np.rot90(pixels, turns)
        if pixels.shape[:2] != (height, width):
            from PIL import Image

            pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
        return np.ascontiguousarray(pixels)


class FrameFolder:
    """A folder of frames, with the interface of ``ClipFile``; times are those of ``source_fps``."""

    def __init__(self, blob: FramesBlob, source_fps: float | None):
        if source_fps is None:
            raise BadPicture(
                blob.name, "is a folder of frames, which says no frame rate; give it with --data.source-fps"
            )
        self._blob = blob
        with blob.open() as file:
            first = read_header(file, name=blob.frame(0).name)
        seconds = len(blob.frames) / source_fps
        self.header = ClipHeader(first.height, first.width, source_fps, seconds, "frames", first.oddities)

    @property
    def frame_seconds(self) -> float:
        """How long a frame is shown."""
        return 1.0 / self.header.fps

    def frames(self, first_seconds: float = 0.0) -> Iterator[TimedFrame]:
        """See ``ClipFile``."""
        first = max(0, int(first_seconds * self.header.fps) - 1)
        for number in range(first, len(self._blob.frames)):
            yield TimedFrame(number / self.header.fps, self.frame_seconds, self._blob.frame(number))

    def all_seconds(self) -> list[float]:
        """See ``ClipFile``."""
        return [number / self.header.fps for number in range(len(self._blob.frames))]

    def pixels(self, frame: TimedFrame) -> UInt8[np.ndarray, "H W 3"]:
        """See ``ClipFile``."""
        try:
            with frame.content.open() as file:
                pixels = decode_picture(file.read(), name=frame.content.name, channels=3)
        except BadPicture as error:
            raise DamagedError(f"has the frame {error}") from error
        if pixels.shape[:2] != self.header[:2]:
            raise DamagedError(f"has frames of several sizes ({frame.content.name} is {_size(pixels.shape)})")
        return pixels


@contextmanager
def open_clip(blob: Blob, source_fps: float | None = None) -> Iterator[ClipFile | FrameFolder]:
    """Opens a video and decodes its first frame.

    Args:
        blob: where it lies.
        source_fps: frames per second where it does not say so.

    Raises:
        BadPicture: it can't be used as a video, and why.
        UserError: PyAV is not installed.
    """
    if isinstance(blob, FramesBlob):
        yield FrameFolder(blob, source_fps)
        return
    av = require_pyav()
    with blob.open() as file:
        if not file.read(1):
            raise BadPicture(blob.name, "is empty")
        clip = None
        try:
            try:
                clip = ClipFile(blob.name, file, source_fps)
            except (av.error.FFmpegError, OSError) as error:
                raise BadPicture(blob.name, f"can't be decoded ({_reason(error)})") from error
            yield clip
        finally:
            if clip is not None:
                clip.close()


def _alpha(frame: Any) -> bool:
    """Whether a frame's pixels may be transparent."""
    return any(component.is_alpha for component in frame.format.components)


def _stream(name: str, container: Any) -> Any:
    streams = [each for each in container.streams if each.type == "video"]
    pictures = [each for each in streams if each.disposition & each.disposition.attached_pic]
    streams = [each for each in streams if each not in pictures]
    if not streams:
        kinds = ", ".join(sorted({str(each.type) for each in container.streams})) or "none"
        raise BadPicture(name, f"has no video stream (its streams: {kinds})")
    stream = streams[0]
    if stream.codec_context is None:
        raise BadPicture(name, "is coded in a way that can't be decoded here (no decoder for it)")
    return stream


def _rate(stream: Any) -> float | None:
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate):
        if rate and _SLOWEST <= float(rate) <= _FASTEST:
            return float(rate)
    return None


def _clock(text: str) -> float | None:
    """Seconds of 00:00:01.000000000."""
    try:
        hours, minutes, seconds = text.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return None


def _reason(error: BaseException) -> str:
    return reason_of(getattr(error, "strerror", None) or error, 100)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]}"
