"""Videos as files: mp4 that grows while frames come, moving GIFs, folders of pictures, arrays; and reading them.

An mp4 is written in fragments, each with its own index, so that it plays up to its last whole fragment at any time:
while it is being written, after the process was killed, after the disk was full. When it is closed it is laid out again
as an ordinary mp4 with its index in front.
"""

from __future__ import annotations

import contextlib
import fractions
import importlib
import itertools
import json
import math
import numbers
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from kernels.typing import Float, UInt8
from sana_jax.errors import UserError, counted, reason_of
from sana_jax.files import atomic_file, check_can_write, natural_order, read_json, remove_partial, write_json
from sana_jax.growing_file import GrowingFile, cut_to_whole_fragments
from sana_jax.images import save_gif, save_png

Kind = Literal["mp4", "gif", "npz", "frames"]
DEFAULT_FPS = 16.0

_SUFFIXES: dict[str, Kind] = {".mp4": "mp4", ".gif": "gif", ".npz": "npz"}
_ALLOWED = "allowed are .mp4, .gif, .npz, and a folder for single pictures (out/)"
# H.264 first; MPEG-4 plays in most players, if not in browsers.
_ENCODERS = ("libx264", "libopenh264", "mpeg4")
_X264 = {"crf": "17", "preset": "medium", "tune": "zerolatency"}  # zerolatency: no frame waits for later ones
_FRAGMENTED = {"movflags": "frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}
_BT709 = 1  # the number of BT.709 in FFmpeg's lists of primaries, transfer curves and matrices
_LIMITED_RANGE = 1
_INSTALL = "install it with pip install 'sana-jax[video]', or name a folder (out/) to have the frames as pictures"
_FRAME_NAME = "{:06d}.png"
_NOTES = "video.json"  # in a folder of frames
_MOST_BYTES = 1 << 33  # of decoded frames that are held in memory


class Video(NamedTuple):
    """What a file held: frames (T, H, W, 3) as bytes, and frames per second."""

    frames: UInt8[np.ndarray, "T H W 3"]
    fps: float


def video_kind(path: str | os.PathLike[str]) -> Kind:
    """What kind of file a name is for, by its ending; a name without one, or that ends in ``/``, is a folder of frames.

    Raises:
        UserError: another ending.
    """
    name = os.fspath(path)
    if name.endswith(("/", os.sep)) or pathlib.Path(name).is_dir() or not pathlib.Path(name).suffix:
        return "frames"
    suffix = pathlib.Path(name).suffix.lower()
    if suffix not in _SUFFIXES:
        raise UserError(
            f"output {name!r} is not allowed for a video; {_ALLOWED}: try {pathlib.Path(name).with_suffix('.mp4')}"
        )
    return _SUFFIXES[suffix]


def check_video_path(path: str | os.PathLike[str], *, progressive: bool = False, goes_on: bool = False) -> Kind:
    """What ``video_kind`` says, once a video can be written there: asked before minutes of sampling, not after.

    ``progressive``: whether it must grow while frames come, as ``VideoWriter`` does; ``goes_on``: whether a video that
    is there is to be continued.

    Raises:
        UserError: an ending that is not allowed, a folder that has something in it, a place that cannot be written to,
            or no PyAV for an mp4.
    """
    kind, place = video_kind(path), pathlib.Path(path)
    if progressive and kind in ("gif", "npz"):
        raise UserError(
            f"output {os.fspath(path)!r} is written at once, and frames come one after another here; allowed are .mp4 "
            f"and a folder (out/): try {place.with_suffix('.mp4')}"
        )
    if kind == "frames":
        if not goes_on and place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(f"output folder {place} has something in it already; name a new or an empty folder")
    elif place.is_dir():
        raise UserError(f"output {place} is a folder; allowed is a file's name: try {place / 'out.mp4'}")
    check_can_write(f"{place}/" if kind == "frames" else place, str(place))
    if kind == "mp4":
        _encoder(_pyav("writing mp4"))
    return kind


class VideoWriter:
    """Writes an mp4 or a folder of frames while the frames come: a context manager.

    ::

        with VideoWriter("out.mp4", fps=16) as writer:
            for frames in blocks:  # (T, H, W, 3)
                writer.append(frames)

    What was appended can be played at once, the last frame excepted. If the block is left by an error, the file stays,
    as far as it has come.

    Args:
        path: ends in ``.mp4``, or is a new or empty folder.
        fps: frames per second.
        metadata: what is noted in the file, such as prompt and seed; values that are None are left out.
        keep_frames: goes on with the video that is there, of which so many frames are kept, bit for bit.
        separate: encodes every ``append`` for itself, so that what becomes of frames in the file does not depend on
            those before them: a video that was gone on with is then the one that was never interrupted.
        named: what messages call the place; None for ``path``.
        advice: what to do where the disk is full.
        say: prints a line.

    Raises:
        UserError: a name or fps that is not allowed, no PyAV for an mp4, a place that cannot be written to; or fewer
            frames than are to be kept.

    Attributes:
        frame_count: frames written so far.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float = DEFAULT_FPS,
        *,
        metadata: Mapping[str, Any] | None = None,
        keep_frames: int = 0,
        separate: bool = False,
        named: str | os.PathLike[str] | None = None,
        advice: str = "make room on the disk, or name another place",
        say: Callable[[str], None] = print,
    ) -> None:
        self._named, self._advice = os.fspath(path if named is None else named), advice
        self.fps, self._separate = check_fps(fps), separate
        self.kind = check_video_path(path, progressive=True, goes_on=keep_frames > 0)
        self.path = pathlib.Path(path)
        self.frame_count = keep_frames
        self._notes = {key: value for key, value in (metadata or {}).items() if value is not None}
        self._say = say
        self._size: tuple[int, int] | None = None
        self._stream: _Mp4Stream | None = None
        if keep_frames and (there := count_frames(self.path)) < keep_frames:
            raise UserError(f"{self.path} has {there} frames, of which {keep_frames} cannot be kept; begin anew")

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.close(finish=kind is None)

    def append(self, frames: Any) -> None:
        """Writes frames behind those that are there.

        Args:
            frames: (T, H, W, 3), or one frame (H, W, 3), as bytes or as floats in [0, 1]; or a list of PIL images.

        Raises:
            UserError: frames of another size than the first, values out of range, or a disk that is full: what was
                written until then stays and can be played.
        """
        frames = as_bytes(frames)
        size = frames.shape[1:3]
        if self._size is None:
            self._open(size)
        elif size != self._size:
            raise UserError(f"frames of {size[0]}x{size[1]} pixels behind frames of {self._size[0]}x{self._size[1]}")
        if self._separate and self._stream is not None:
            self._stream.begin_anew()
        for frame in frames:
            try:
                if self._stream is None:
                    save_png(self.path / _FRAME_NAME.format(self.frame_count), _to_picture(frame))
                else:
                    self._stream.write(frame, self.frame_count)
            except (OSError, UserError) as error:
                self.close(finish=False)
                raise self._failed(f"at frame {self.frame_count}", error) from error
            self.frame_count += 1

    def _failed(self, where: str, error: Exception) -> UserError:
        """What is said of a disk that takes no more, and of the frames that are there."""
        cause = error.__cause__ or error
        count = count_frames(self.path)
        there = f"; the first {counted(count, 'frame')} can be played" if count else ""
        reason = getattr(cause, "strerror", None) or reason_of(cause)
        return UserError(f"writing {self._named} failed {where} ({reason}){there}: {self._advice}")

    def _open(self, size: tuple[int, int]) -> None:
        try:
            if self.kind == "frames":
                self.path.mkdir(parents=True, exist_ok=True)
                for name in _picture_names(self.path)[self.frame_count :]:
                    (self.path / name).unlink()
                write_json(self.path / _NOTES, {"fps": self.fps, **{k: str(v) for k, v in self._notes.items()}})
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._stream = _Mp4Stream(
                    self.path, self.fps, size, self._notes, self._say, self.frame_count, self._named
                )
        except OSError as error:
            raise UserError(f"cannot write {self._named} ({error.strerror or error}); choose another place") from error
        self._size = size

    def close(self, *, finish: bool = True) -> None:
        """Ends the file; with ``finish``, lays an mp4 out as an ordinary one. A second call does nothing.

        Raises:
            UserError: a disk that is full: what was written until then stays and can be played.
        """
        stream, self._stream = self._stream, None
        if stream is None:
            return
        try:
            stream.close()
        except OSError as error:
            if finish:
                raise self._failed("at its end", error) from error
            return
        if finish:
            _lay_out_again(self.path, self._named, self._say)


class _Mp4Stream:
    """The encoder and the fragmented file behind it."""

    def __init__(
        self,
        path: pathlib.Path,
        fps: float,
        size: tuple[int, int],
        notes: Mapping[str, Any],
        say: Callable[[str], None],
        keep_frames: int,
        named: str,
    ) -> None:
        av = self._av = _pyav("writing mp4")
        self._path, self._size = path, size
        height, width = (length + length % 2 for length in size)
        self._padding = ((0, height - size[0]), (0, width - size[1]), (0, 0))
        if (height, width) != tuple(size):
            say(
                f"{named}: {size[0]}x{size[1]} becomes {height}x{width} pixels, the border repeated, since mp4 takes "
                "even sizes"
            )
        encoder = _encoder(av)
        if encoder != _ENCODERS[0]:
            say(f"{named}: written with {encoder}, since this PyAV has no {_ENCODERS[0]}")
        place = path.with_name(f".{path.stem}.{os.getpid()}.kept.mp4") if keep_frames else path
        self._file = GrowingFile(place)
        self._container = av.open(self._file, "w", format="mp4", options=_FRAGMENTED)
        if notes:
            self._container.metadata["comment"] = json.dumps({k: str(v) for k, v in notes.items()}, ensure_ascii=False)
        rate = fractions.Fraction(fps).limit_denominator(1001)
        options = _X264 if encoder == _ENCODERS[0] else {"qscale": "2"}
        self._video = self._container.add_stream(encoder, rate=rate, options=options)
        self._encoder = self._video.codec_context
        self._codec = encoder
        self._settings = {
            **{"width": width, "height": height, "pix_fmt": "yuv420p", "framerate": rate, "time_base": 1 / rate},
            **{"gop_size": max(1, round(fps)), "max_b_frames": 0, "color_range": _LIMITED_RANGE, "options": options},
            **{"color_primaries": _BT709, "color_trc": _BT709, "colorspace": _BT709},
        }
        self._set_up(self._encoder)
        if keep_frames:
            try:
                self._keep(path, keep_frames)
                os.replace(place, path)
            finally:
                place.unlink(missing_ok=True)

    def _set_up(self, encoder: Any) -> None:
        for name, value in self._settings.items():
            setattr(encoder, name, value)

    def begin_anew(self) -> None:
        """Ends this encoder, and takes one for the frames to come that knows nothing of those before."""
        self._mux(self._encoder.encode(None) if self._encoder.is_open else [])
        self._encoder = self._av.CodecContext.create(self._codec, "w")
        self._set_up(self._encoder)
        self._encoder.flags |= self._video.codec_context.flags & int(self._av.codec.context.Flags.global_header)

    def _mux(self, packets: Any) -> None:
        for packet in packets:
            packet.stream = self._video
            self._container.mux(packet)

    def _keep(self, path: pathlib.Path, count: int) -> None:
        """Copies the first frames of an older file as they are: each needs none that come later."""
        with self._av.open(str(path)) as old:
            source = old.streams.video[0]
            size = (self._video.height, self._video.width)
            if (source.height, source.width) != size:
                raise UserError(f"frames of {size[0]}x{size[1]} behind {path} of {source.height}x{source.width} pixels")
            packets = itertools.islice(old.demux(source), count)
            if source.codec_context.name == "h264":
                # The container turns what the encoder gives into its own form, and needs these in the encoder's.
                into = self._av.bitstream.BitStreamFilterContext("h264_mp4toannexb", source)
                packets = [found for packet in packets for found in into.filter(packet)] + into.filter(None)
            for packet in packets:
                packet.stream = self._video
                self._container.mux(packet)
        self._check()

    def write(self, frame: UInt8[np.ndarray, "H W 3"], index: int) -> None:
        """One frame; raises ``OSError`` if the file takes no more."""
        picture = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(np.pad(frame, self._padding, "edge")), "rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        picture.pts = index
        picture.time_base = self._encoder.time_base
        self._mux(self._encoder.encode(picture))
        self._check()

    def close(self) -> None:
        """Ends the file; raises ``OSError`` if not all of it could be written. What is there can be played."""
        try:
            if self._file.error is None:
                self._mux(self._encoder.encode(None) if self._encoder.is_open else [])
            self._container.close()
        except self._av.error.FFmpegError as error:
            self._file.error = self._file.error or OSError(error.errno, error.strerror)
        finally:
            self._file.close()
            if self._file.error is not None:
                cut_to_whole_fragments(self._path)
        self._check()

    def _check(self) -> None:
        if self._file.error is not None:
            raise self._file.error


def write_video(
    path: str | os.PathLike[str],
    frames: Any,
    fps: float = DEFAULT_FPS,
    *,
    metadata: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> pathlib.Path:
    """Writes a whole video, as the name's ending says; it appears whole or not at all.

    Where the disk takes no more, an mp4 or a folder appears as far as it has come, in place of an older one.

    Args:
        path: ``.mp4``; ``.gif``, 256 colours in each frame; ``.npz`` with the arrays ``frames`` and ``fps``; or a
            folder, new or empty, for ``000000.png``, ``000001.png``, ...
        frames: (T, H, W, 3) as bytes or as floats in [0, 1]; or a list of PIL images.
        fps: frames per second.
        metadata: what is noted in the file; values that are None are left out.
        say: prints a line.

    Raises:
        UserError: a name, frames or fps that are not allowed, no PyAV for an mp4, or a place that cannot be written to.
    """
    fps, kind, place = check_fps(fps), check_video_path(path), pathlib.Path(path)
    frames = as_bytes(frames)
    notes = {key: str(value) for key, value in (metadata or {}).items() if value is not None}
    try:
        if kind == "gif":
            times = _gif_times(len(frames), fps, place, say)
            save_gif(place, [_to_picture(frame) for frame in frames], times, comment=notes.get("prompt"))
        elif kind == "npz":
            with atomic_file(place) as file:
                np.savez_compressed(file, frames=frames, fps=fps, metadata=json.dumps(notes))
        else:
            _write_progressively(kind, place, frames, fps, notes, say)
    except OSError as error:
        raise UserError(f"cannot write {place} ({error.strerror or error}); choose another place") from error
    return place


def _write_progressively(
    kind: Kind, named: pathlib.Path, frames: Any, fps: float, notes: Mapping[str, Any], say: Callable[[str], None]
) -> None:
    """An mp4 or a folder under a temporary name, renamed when it is whole or the disk takes no more."""
    place = named.absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.stem}.{os.getpid()}.tmp{'.mp4' if kind == 'mp4' else ''}")
    try:
        if kind == "frames":
            temporary.mkdir()
        with VideoWriter(temporary, fps, metadata=notes, named=named, say=say) as writer:
            writer.append(frames)
        os.replace(temporary, place)
    except UserError:
        if count_frames(temporary):
            os.replace(temporary, place)
        raise
    finally:
        remove_partial(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def read_video(path: str | os.PathLike[str]) -> Video:
    """All frames of a video: a file that FFmpeg can decode, a GIF, an ``.npz`` of ours, or a folder of pictures.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: no video in it, a codec that is not known, a damaged file, or one too large for memory.
    """
    place = pathlib.Path(path)
    if not place.exists():
        raise FileNotFoundError(f"video {place} is not there; name a video file or a folder of pictures")
    reader = _read_folder if place.is_dir() else {".gif": _read_gif, ".npz": _read_npz}.get(place.suffix.lower())
    try:
        frames, fps = (reader or _read_with_pyav)(place)
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:  # each kind of file fails in its own way
        raise UserError(
            f"video {place} can't be read ({reason_of(error)}); give another one, or its frames as pictures in a folder"
        ) from error
    if not len(frames):
        raise UserError(f"video {place} has no frames; give another one")
    return Video(frames, fps)


def as_bytes(frames: Any) -> UInt8[np.ndarray, "T H W 3"]:
    """Frames (T, H, W, 3 or 1), or one (H, W, 3 or 1), of bytes or of floats in [0, 1], as bytes with three channels.

    Raises:
        UserError: another shape, no frames, or values that are not in range.
    """
    if isinstance(frames, Sequence) and not isinstance(frames, np.ndarray):
        frames = [np.asarray(frame.convert("RGB") if hasattr(frame, "convert") else frame) for frame in frames]
        if len(shapes := {frame.shape for frame in frames}) != 1:
            shown = ", ".join(map(str, sorted(shapes))) or "none"
            raise UserError(f"frames of the shapes {shown}; allowed is one frame or more, all of one size: resize them")
        frames = np.stack(frames)
    array: Float[np.ndarray, "T H W C"] = np.asarray(frames)
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[-1] not in (1, 3) or 0 in array.shape:
        raise UserError(f"frames of shape {np.shape(frames)}; allowed is (T, H, W, 3) with one frame or more")
    if array.dtype != np.uint8:
        in_range = np.issubdtype(array.dtype, np.floating) and ((array >= -1e-3) & (array <= 1 + 1e-3)).all()
        if not in_range:
            raise UserError(
                f"frames of {array.dtype} are not in range; allowed are bytes, or finite floats in [0, 1]: rescale them"
            )
        array = np.round(np.clip(array, 0, 1) * 255).astype(np.uint8)
    return np.broadcast_to(array, (*array.shape[:3], 3))


def _to_picture(frame: UInt8[np.ndarray, "H W 3"]) -> Any:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(frame))


def check_fps(fps: float) -> float:
    """The frames per second as a float; raises ``UserError`` unless they are between 0.1 and 240."""
    if not (is_real(fps) and math.isfinite(fps) and 0.1 <= fps <= 240):
        raise UserError(
            f"fps {fps!r} is not allowed; choose 0.1 to 240 frames per second: SANA-Video was trained at 16"
        )
    return float(fps)


def is_real(value: Any) -> bool:
    """Whether a value is a number, of Python's or NumPy's types; booleans are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _gif_times(count: int, fps: float, path: pathlib.Path, say: Callable[[str], None]) -> list[int]:
    """Milliseconds of each frame: multiples of 10, which is all that GIF has, that keep step with the time."""
    if fps > 50:
        say(f"{path}: shown at 50 frames per second instead of {fps:g}, the most that a GIF has")
        fps = 50.0
    ends = [round(100 * index / fps) * 10 for index in range(count + 1)]
    return [after - before for before, after in itertools.pairwise(ends)]


# -- PyAV ------------------------------------------------------------------------------------------------------------


def _pyav(purpose: str) -> Any:
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise UserError(f"{purpose} needs PyAV (with FFmpeg in it), which is not installed; {_INSTALL}") from error


def _encoder(av: Any) -> str:
    found = [name for name in _ENCODERS if name in av.codecs_available]
    if not found:
        raise UserError(f"this PyAV has none of the encoders {', '.join(_ENCODERS)}; {_INSTALL}")
    return found[0]


def _lay_out_again(path: pathlib.Path, named: str, say: Callable[[str], None]) -> None:
    """The same packets as an ordinary mp4 with its index in front; where that fails, the fragmented file stays."""
    av = _pyav("writing mp4")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.layout.mp4")
    try:
        with av.open(str(path)) as old, av.open(str(temporary), "w", options={"movflags": "faststart"}) as new:
            new.metadata.update(old.metadata)
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(old.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    new.mux(packet)
        os.replace(temporary, path)
    except (OSError, av.error.FFmpegError) as error:
        say(f"{named}: left as it was written, in fragments ({error.strerror or error}); it plays all the same")
    finally:
        temporary.unlink(missing_ok=True)


def count_frames(path: str | os.PathLike[str]) -> int:
    """Frames that an mp4 or a folder of frames holds, 0 if it is not there; a file that was cut off may hold the last
    one in part.
    """
    kind, path = video_kind(path), pathlib.Path(path)
    if kind == "frames":
        return len(_picture_names(path)) if path.is_dir() else 0
    if not path.is_file():
        return 0
    av = _pyav(f"reading {path}")
    try:
        with av.open(str(path)) as container:
            return sum(packet.dts is not None for packet in container.demux(container.streams.video[0]))
    except (av.error.FFmpegError, IndexError):
        return 0


def _read_with_pyav(path: pathlib.Path) -> tuple[np.ndarray, float]:
    av = _pyav(f"reading {path}")
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise UserError(f"{path} has no video in it; give another file")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frames = _gathered((_upright(frame) for frame in container.decode(stream)), path)
        rate = stream.average_rate or stream.guessed_rate
        return frames, float(rate) if rate else DEFAULT_FPS


def _upright(frame: Any) -> np.ndarray:
    """A frame's pixels, turned as the file asks."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)


def _gathered(frames: Iterator[np.ndarray], path: pathlib.Path) -> np.ndarray:
    found: list[np.ndarray] = []
    with contextlib.closing(frames):
        for frame in frames:
            found.append(np.asarray(frame, np.uint8))
            if len(found) * frame.nbytes > _MOST_BYTES:
                raise UserError(f"{path} has more than {_MOST_BYTES >> 30} GB of frames; cut it into shorter videos")
    return np.stack(found) if found else np.zeros((0, 1, 1, 3), np.uint8)


def _read_gif(path: pathlib.Path) -> tuple[np.ndarray, float]:
    from PIL import Image, ImageSequence

    durations: list[float] = []

    def frames(image: Any) -> Iterator[np.ndarray]:
        for frame in ImageSequence.Iterator(image):
            durations.append(frame.info.get("duration", 0) or 100)
            yield np.asarray(frame.convert("RGB"))

    with Image.open(path) as image:
        found = _gathered(frames(image), path)
    return found, 1000 * len(durations) / sum(durations)


def _read_npz(path: pathlib.Path) -> tuple[np.ndarray, float]:
    with np.load(path, allow_pickle=False) as arrays:
        if "frames" not in arrays:
            raise UserError(f"{path} has the arrays {', '.join(arrays)}; a video has frames: give another file")
        return as_bytes(arrays["frames"]), float(arrays["fps"]) if "fps" in arrays else DEFAULT_FPS


def _picture_names(path: pathlib.Path) -> list[str]:
    """Names of the pictures in a folder as frames follow one another."""
    names = [name for name in os.listdir(path) if re.fullmatch(r"[^.].*\.(png|jpg|jpeg|webp)", name.lower())]
    return sorted(names, key=natural_order)


def _read_folder(path: pathlib.Path) -> tuple[np.ndarray, float]:
    from PIL import Image

    names = _picture_names(path)
    notes = read_json(path / _NOTES) if (path / _NOTES).is_file() else {}

    def frames() -> Iterator[np.ndarray]:
        for name in names:
            with Image.open(path / name) as image:
                yield np.asarray(image.convert("RGB"))

    return _gathered(frames(), path), float(notes.get("fps", DEFAULT_FPS))
