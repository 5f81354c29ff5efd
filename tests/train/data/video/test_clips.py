"""Decoding clips: which frame is shown when, at constant and variable rates; sizes; what damage leaves over."""

from __future__ import annotations

import io
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from sana_jax.errors import UserError
from tests.train.data.video.clip_files import number_of, numbered, video_bytes, write_frames, write_video
from train.data.conditions import View
from train.data.decoding import BadPicture
from train.data.sources.frame_folders import FramesBlob, frames_in_order
from train.data.sources.listing import FileBlob, SliceBlob
from train.data.video.clips import examine, first_pixels, read_clips
from train.data.video.containers import open_clip
from train.data.video.windows import Timing, resampled_count, window_starts

VIEW = View(32, 64)


def blob(path) -> FileBlob:
    return FileBlob(str(path), path.name)


def numbers(path, starts, frames, fps, **options) -> dict[int, list[int]]:
    read = read_clips(blob(path), starts, [VIEW], frames=frames, fps=fps, **options)
    return {start: [number_of(frame) for frame in clip] for (start, _), clip in read.clips.items()}


def shown_at(times: list[float], moment: float) -> int:
    """The frame that a player shows, looked up without any of the code under test."""
    return max(number for number, time in enumerate(times) if time <= moment)


CONTAINERS = {
    "mp4": {"codec": "libx264"},
    "mkv": {"codec": "libx264"},
    "webm": {"codec": "libvpx-vp9"},
    "avi": {"codec": "mpeg4"},
    "mov": {"codec": "mpeg4"},
    "gif": {"codec": "gif"},
    "ts": {"codec": "libx264", "kind": "mpegts"},
}


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_every_frame_once_at_the_own_rate(suffix, tmp_path):
    path = write_video(tmp_path / f"a.{suffix}", 24, fps=10, **CONTAINERS[suffix])
    assert numbers(path, [0, 3, 15], 9, 10) == {s: list(range(s, s + 9)) for s in (0, 3, 15)}
    examined = examine(blob(path))
    assert examined.problem is None
    assert examined.timing.frames == 24
    assert not examined.timing.variable
    with open_clip(blob(path)) as clip:
        assert clip.header[:2] == (32, 64)
        assert clip.header.fps == pytest.approx(10)
        assert resampled_count(clip.header.seconds, 10) == 24


@pytest.mark.parametrize(("suffix", "own", "fps"), [("mkv", 30, 30), ("mp4", 30, 16), ("mkv", 25, 16), ("mp4", 10, 24)])
def test_other_rates(suffix, own, fps, tmp_path):
    path = write_video(tmp_path / f"a.{suffix}", 60, fps=own)
    count = resampled_count(60 / own, fps)
    got = numbers(path, [0, count - 29], 29, fps)
    assert sorted(got) == [0, count - 29]
    for start, found in got.items():
        late = [(start + i) / fps - number / own for i, number in enumerate(found)]
        assert min(late) >= -0.45 / max(own, fps) - 0.001
        if fps <= own:  # the nearest frame, and each at most once
            assert max(late) <= 0.55 / own + 0.001
            assert len(set(found)) == 29
        else:  # the one that is being shown
            assert max(late) <= 1 / own - 0.45 / fps + 0.001


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_variable_rate_is_sampled_by_its_times(suffix, tmp_path):
    gaps = [40, 100, 20, 300, 33, 500] * 5
    times = np.cumsum([0, *gaps[:-1]]).tolist()
    path = write_video(tmp_path / f"a.{suffix}", 30, times_ms=times)
    found = numbers(path, [0], 41, 10)[0]
    seconds = [time / 1000 for time in times]
    usual = float(np.mean(gaps)) / 1000
    for i, number in enumerate(found):
        # what is shown at that moment, or begins within half of a frame's time
        assert shown_at(seconds, i / 10) <= number <= shown_at(seconds, i / 10 + 0.5 * min(usual, 0.1))
    by_count = [round(i * len(times) / (times[-1] / 1000 * 10)) for i in range(41)]
    assert found != by_count  # the naive way gives other frames
    assert examine(blob(path)).timing.variable
    assert read_clips(blob(path), [0], [VIEW], frames=41, fps=10).variable


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_times_are_counted_from_the_first_frame(suffix, tmp_path):
    """Some files of Matroska state their end and not how long they are."""
    path = write_video(tmp_path / f"a.{suffix}", 20, fps=10, times_ms=[700 + 100 * i for i in range(20)])
    with open_clip(blob(path)) as clip:
        assert clip.header.seconds == pytest.approx(2, abs=0.11)
        assert clip.all_seconds() == pytest.approx(np.arange(20) / 10)
    assert numbers(path, [2], 9, 10) == {2: list(range(2, 11))}


def test_far_clips_are_those_of_a_whole_decoding(tmp_path):
    path = write_video(tmp_path / "a.mp4", 120, fps=10, key_every=7)
    assert numbers(path, [90, 101], 5, 10) == {90: list(range(90, 95)), 101: list(range(101, 106))}
    path = write_video(tmp_path / "one_key.mkv", 120, fps=10, key_every=1000)
    assert numbers(path, [100], 5, 10) == {100: list(range(100, 105))}


def test_frames_in_a_folder(tmp_path):
    folder = write_frames(tmp_path / "clip", 12)
    names = frames_in_order([each.name for each in folder.iterdir()])
    assert names[:3] == ("f1.png", "f2.png", "f3.png")
    frames = FramesBlob(str(folder), "clip", names)
    read = read_clips(frames, [0, 2], [VIEW], frames=5, fps=5, source_fps=10)
    assert [number_of(frame) for frame in read.clips[0, VIEW]] == [0, 2, 4, 6, 8]
    np.testing.assert_array_equal(read.clips[0, VIEW][1], numbered(2))
    assert read.problem == "is cut off: it ends after 1.20 s of the 1.20 s that it says"  # the second is too long
    with pytest.raises(BadPicture, match="says no frame rate; give it with"):
        read_clips(frames, [0], [VIEW], frames=5, fps=5)
    (folder / "f4.png").write_bytes(b"no picture")
    assert "has the frame clip/f4.png is not a picture" in examine(frames, 10).problem


def test_inside_a_tar(tmp_path):
    data = video_bytes(10)
    path = tmp_path / "a.tar"
    path.write_bytes(b"x" * 100 + data + b"y" * 50)
    read = read_clips(SliceBlob(str(path), 100, len(data), "a.tar/a.mp4"), [0], [VIEW], frames=9, fps=10)
    assert [number_of(frame) for frame in read.clips[0, VIEW]] == list(range(9))


def test_sizes_crops_and_mirror_images(tmp_path):
    path = write_video(tmp_path / "a.mp4", 5, size=(64, 128))
    views = [View(16, 16), View(16, 16, (0.0, 0.0)), View(16, 16, mirrored=True), View(32, 64)]
    read = read_clips(blob(path), [0], views, frames=5, fps=10)
    assert [read.clips[0, view].shape for view in views] == [(5, 16, 16, 3)] * 3 + [(5, 32, 64, 3)]
    whole = read.clips[0, views[3]]
    middle, mirrored = read.clips[0, views[0]], read.clips[0, views[2]]
    np.testing.assert_array_equal(middle[:, :, ::-1], mirrored)
    assert np.abs(middle.astype(int) - whole[:, ::2, 16:48:2]).mean() < 12
    assert np.abs(read.clips[0, views[1]].astype(int) - whole[:, ::2, 0:32:2]).mean() < 12
    gray = read_clips(blob(path), [0], views[:1], frames=5, fps=10, channels=1).clips[0, views[0]]
    assert gray.shape == (5, 16, 16, 1)


@pytest.mark.parametrize("turn", [90, -90, 180])
def test_rotated_videos_are_turned(turn, tmp_path):
    path = write_video(tmp_path / "a.mp4", 3, size=(32, 64), rotation=turn)
    with open_clip(blob(path)) as clip:
        assert "rotated as they ask" in clip.header.oddities
        height, width = clip.header[:2]
        assert (height, width) == ((32, 64) if turn == 180 else (64, 32))
        pixels = clip.pixels(next(clip.frames()))
    assert pixels.shape == (height, width, 3)
    with av.open(str(path)) as container:  # PyAV counts turns against the clock
        quarter = next(container.decode(video=0)).rotation // 90
    plain = numbered(0, 32, 64)
    assert np.abs(pixels.astype(int) - np.rot90(plain, quarter)).mean() < 12


def test_pixels_that_are_not_square(tmp_path):
    path = write_video(tmp_path / "a.mp4", 3, size=(32, 32), aspect=Fraction(2, 1))
    with open_clip(blob(path)) as clip:
        assert clip.header[:2] == (32, 64)
        assert clip.pixels(next(clip.frames())).shape == (32, 64, 3)


# -- damage ------------------------------------------------------------------------------------------------------------


def test_a_file_that_is_cut_off_gives_the_frames_so_far(tmp_path):
    for name, options in {"a.mp4": {"options": {"movflags": "faststart"}}, "a.mkv": {}}.items():
        path = write_video(tmp_path / name, 100, key_every=10, **options)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
        read = read_clips(blob(path), [0, 9, 45, 91], [VIEW], frames=9, fps=10)
        assert sorted(start for start, _ in read.clips) == [0, 9]
        assert [number_of(frame) for frame in read.clips[9, VIEW]] == list(range(9, 18))
        assert " after " in read.problem
        examined = examine(blob(path))
        assert " after " in examined.problem
        assert 20 < examined.timing.frames < 95


def test_a_file_with_damage_inside_gives_the_frames_before_it(tmp_path):
    path = write_video(tmp_path / "a.mp4", 100, size=(64, 128), key_every=10)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    path.write_bytes(data)
    read = read_clips(blob(path), [0, 91], [VIEW], frames=9, fps=10)
    assert [start for start, _ in read.clips] == [0]
    assert read.problem.startswith("is damaged (")
    assert " after " in read.problem


def _no_decoder() -> bytes:
    return video_bytes(5).replace(b"avc1", b"zzzz")


def _sound_alone() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"no video at all", "is not a video of a known kind, or is cut off or damaged (Invalid data"),
        (video_bytes(30)[:-400], "is not a video of a known kind, or is cut off"),  # its index is at its end
        (b"#EXTM3U\n#EXTINF:10,\nhttp://localhost:1/x.ts\n", "is not a video of a known kind"),
        (_no_decoder(), "is coded in a way that can't be decoded here"),
        (_sound_alone(), "has no video stream (its streams: audio)"),
    ],
)
def test_what_is_no_video(content, says, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(BadPicture) as caught:
        read_clips(blob(path), [0], [VIEW], frames=5, fps=10)
    assert str(caught.value).startswith(f"a.mp4 {says}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["mp4", "matroska", "avi", "gif", "mpegts"])
def test_whatever_is_damaged_never_ends_in_anything_but_a_reason(kind, tmp_path):
    codec = {"avi": "mpeg4", "gif": "gif"}.get(kind, "libx264")
    whole, rng = video_bytes(30, kind=kind, codec=codec, key_every=5), np.random.default_rng(7)
    path, outcomes = tmp_path / "a.mp4", set()
    for number in range(24):
        data = bytearray(whole)
        place = int(rng.integers(len(data)))
        if number % 3 == 0:
            del data[place:]
        elif number % 3 == 1:
            data[place : place + 40] = bytes(rng.integers(0, 256, len(data[place : place + 40]), np.uint8))
        else:
            del data[place : place + int(rng.integers(1, 200))]
        path.write_bytes(data)
        try:
            read = read_clips(blob(path), [0, 25], [VIEW], frames=5, fps=10)
            examine(blob(path))
        except BadPicture as bad:
            outcomes.add("bad" if bad.reason.isprintable() else bad.reason)
            continue
        assert all(clip.shape == (5, 32, 64, 3) for clip in read.clips.values())
        assert (read.problem is None) == (len(read.clips) == 2)
        outcomes.add("whole" if read.problem is None else "damaged")
    assert outcomes <= {"whole", "damaged", "bad"}
    assert len(outcomes) > 1


def test_transparent_parts_are_white(tmp_path):
    frames = [Image.new("RGBA", (16, 16), (255, 0, 0, 0)) for _ in range(3)]
    for number, frame in enumerate(frames):
        frame.paste((0, 0, 255, 255), (0, 0, 8 + number, 8))
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100, disposal=2)
    with open_clip(blob(tmp_path / "a.gif")) as clip:
        assert "transparent: put on white" in clip.header.oddities
        pixels = clip.pixels(next(clip.frames()))
    assert pixels[12, 12].tolist() == [255, 255, 255]
    assert pixels[2, 2].tolist() == [0, 0, 255]


def test_a_header_that_says_weeks_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mkv", 2, times_ms=[0, 3 * 24 * 3600 * 1000])
    with pytest.raises(BadPicture, match="says that it lasts"):
        read_clips(blob(path), [0], [VIEW], frames=1, fps=10)


def test_without_pyav(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="videos are read with PyAV, which is not installed"):
        examine(blob(path))


# -- windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "frames", "stride", "most", "starts"),
    [
        (80, 81, None, None, ()),
        (81, 81, None, None, (0,)),
        (250, 81, None, None, (0, 81, 162)),
        (100, 81, 9, None, (0, 9, 18)),
        (250, 81, None, 1, (84,)),
        (250, 81, None, 2, (0, 169)),
        (250, 81, None, 9, (0, 81, 162)),
    ],
)
def test_windows(count, frames, stride, most, starts):
    assert window_starts(count, frames, stride, most) == starts


def test_rounded_times_are_no_variable_rate():
    assert not Timing.of([round(i / 30, 3) for i in range(90)]).variable
    assert not Timing.of([round(i / 60, 3) for i in range(90)]).variable
    assert Timing.of([0, 0.03, 0.06, 0.2]).variable


def test_frames_for_looking_at(tmp_path):
    path = write_video(tmp_path / "a.mp4", 101, fps=10)
    assert [number_of(frame) for frame in first_pixels(blob(path), (0, 0.5, 1))] == [0, 50, 100]
