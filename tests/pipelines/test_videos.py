"""Video files: what is written can be read, a file that was cut off plays as far as it goes, mistakes are one line."""

from __future__ import annotations

import errno
import json
import re
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from sana_jax import videos
from sana_jax.errors import UserError
from sana_jax.videos import VideoWriter, check_video_path, read_video, write_video
from tests.train.data.video.clip_files import number_of, write_frames
from tests.train.data.video.clip_files import write_video as turned_video

FPS = 16


def clip(count: int = 12, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth moving picture, floats in [0, 1]."""
    t, y, x = np.meshgrid(np.arange(count) / 12, np.arange(height) / 48, np.arange(width) / 64, indexing="ij")
    return np.stack([0.5 + 0.5 * np.sin(6 * (t + y)), 0.5 + 0.5 * np.cos(5 * (x - t)), (x * y + t) / 2], -1).clip(0, 1)


def noisy(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames that cannot be compressed."""
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def test_pictures_in_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    folder = write_frames(tmp_path / "frames", 12)
    assert [number_of(frame) for frame in read_video(folder).frames] == list(range(12))


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotated_videos_are_turned(turn, tmp_path):
    path = turned_video(tmp_path / "a.mp4", 3, rotation=turn, size=(32, 64))
    lying = read_video(turned_video(tmp_path / "b.mp4", 3, size=(32, 64))).frames
    np.testing.assert_array_equal(read_video(path).frames, np.rot90(lying, turn // 90, axes=(1, 2)))


@pytest.mark.parametrize(
    ("name", "mean", "worst"),
    [("a.mp4", 0.015, 0.09), ("a.gif", 0.04, 0.4), ("a.npz", 0.002, 0.003), ("a", 0.002, 0.003)],
)
def test_what_is_written_is_read(tmp_path, name, mean, worst):
    frames = clip()
    path = write_video(tmp_path / name, frames, FPS, metadata={"prompt": "a tram", "seed": 3, "image": None})
    found, fps = read_video(path)
    assert found.dtype == np.uint8
    assert found.shape == frames.shape
    difference = np.abs(found / 255 - frames)
    assert difference.mean() < mean
    assert difference.max() < worst
    assert fps == pytest.approx(FPS, rel=0.03)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]  # nothing else is left


def test_what_an_mp4_says_of_itself(tmp_path):
    import av

    path = write_video(tmp_path / "a.mp4", clip(), FPS, metadata={"prompt": "a tram", "seed": 3})
    with av.open(str(path)) as container:
        assert json.loads(container.metadata["comment"]) == {"prompt": "a tram", "seed": "3"}
        assert container.duration == pytest.approx(12 / FPS * 1e6)
        assert container.streams.video[0].codec_context.name == "h264"
    head = path.read_bytes()[:4096]
    assert b"moov" in head  # in front, so that a browser can begin at once
    assert b"moof" not in path.read_bytes()


def test_odd_sizes_and_gray(tmp_path, capsys):
    path = write_video(tmp_path / "a.mp4", clip(3, 33, 47)[..., :1], FPS)
    assert "33x47 becomes 34x48" in capsys.readouterr().out
    found = read_video(path).frames
    assert found.shape == (3, 34, 48, 3)
    assert np.abs(found[:, :33, :47, 0] / 255 - clip(3, 33, 47)[..., 0]).mean() < 0.02
    # the same whatever they come as
    as_given = videos.as_bytes(clip(2))
    as_pictures = [videos._to_picture(frame) for frame in as_given]
    np.testing.assert_array_equal(videos.as_bytes(as_pictures), as_given)
    for frames, part in [([as_given[0], as_given[0, 1:]], r"shapes \(47, 64, 3\), \(48, 64, 3\)"), ([], "none")]:
        with pytest.raises(UserError, match=f"frames of the .*{part}; allowed is one frame or more, all of one size"):
            videos.as_bytes(frames)


def test_frames_per_second_of_numpy():
    for fps in (np.int64(16), np.float32(16), 16):
        assert type(videos.check_fps(fps)) is float
    for wrong in (True, "16", np.float64("nan"), np.int64(0)):
        with pytest.raises(UserError, match=r"choose 0\.1 to 240 frames per second"):
            videos.check_fps(wrong)


@pytest.mark.parametrize("name", ["a.mp4", "frames"])
def test_it_grows_and_can_be_read_meanwhile(tmp_path, name):
    path, frames = tmp_path / name, clip(11)
    with VideoWriter(path, FPS, metadata={"seed": 1}) as writer:
        for start, there in ((0, 3), (4, 7), (8, 10)):
            writer.append(frames[start : start + 4][: 11 - start])
            assert len(read_video(path).frames) >= there
        writer.append(frames[0])
    assert writer.frame_count == 12
    found, fps = read_video(path)
    assert len(found) == 12
    assert fps == FPS
    assert np.abs(found[:11] / 255 - frames).mean() < 0.02
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.mp4", "frames"])
def test_going_on_with_what_is_there(tmp_path, name):
    """The kept frames are the same to the bit, whether the file was ended or cut off."""
    path, frames = tmp_path / name, clip(12)
    first = VideoWriter(path, FPS)
    first.append(frames[:8])  # and no end
    before = read_video(path).frames
    with VideoWriter(path, FPS, keep_frames=6) as writer:
        writer.append(frames[6:])
        assert writer.frame_count == 12
    found, fps = read_video(path)
    assert (len(found), fps) == (12, FPS)
    np.testing.assert_array_equal(found[:6], before[:6])
    assert np.abs(found / 255 - frames).mean() < 0.02
    with pytest.raises(UserError, match="has 12 frames, of which 13 cannot be kept"):
        VideoWriter(path, FPS, keep_frames=13)
    with pytest.raises(UserError, match="has 0 frames"):
        VideoWriter(tmp_path / f"other-{name}", FPS, keep_frames=1)
    if name == "a.mp4":
        with pytest.raises(UserError, match="48x66 behind"):
            VideoWriter(path, FPS, keep_frames=2).append(clip(2, 48, 66))
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_an_error_in_the_block_leaves_what_was_written(tmp_path):
    def stopped():
        with VideoWriter(tmp_path / "a.mp4", FPS) as writer:
            writer.append(clip(5))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stopped()
    assert len(read_video(tmp_path / "a.mp4").frames) == 5


def test_a_killed_process_leaves_what_was_written(tmp_path):
    code = (
        "import os, signal, sys, numpy as np\n"
        "from sana_jax.videos import VideoWriter\n"
        f"writer = VideoWriter(sys.argv[1], {FPS})\n"
        "writer.append(np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), np.uint8))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.mp4")], check=False)
    assert done.returncode == -signal.SIGKILL
    found = read_video(tmp_path / "a.mp4").frames
    assert 19 <= len(found) <= 20


def test_a_full_disk_leaves_what_was_written(tmp_path):
    """The limit of a file's size stands in for the disk's: the write that crosses it is cut off in its middle."""
    path, frames = tmp_path / "a.mp4", noisy(40)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = VideoWriter(path, FPS)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
        with pytest.raises(UserError) as caught:
            writer.append(frames)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert "\n" not in message
    assert "failed at frame" in message
    assert "make room on the disk" in message
    found = read_video(path).frames
    assert 3 < len(found) <= writer.frame_count < 40
    whole = read_video(write_video(tmp_path / "whole.mp4", frames, FPS)).frames
    np.testing.assert_array_equal(found, whole[: len(found)])
    writer.close()


@pytest.mark.parametrize("name", ["a.mp4", "a"])
def test_a_full_disk_leaves_what_was_written_of_a_whole_video(tmp_path, name, monkeypatch):
    """At the name that was asked for, with a count that is true; a picture that takes no more room is left out."""
    frames, stop = noisy(40), 6
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = videos.save_png

    def full(path, *rest):
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000 if path.stem < f"{stop:06d}" else 100, hard))
        return save(path, *rest)

    monkeypatch.setattr(videos, "save_png", full)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
        with pytest.raises(UserError) as caught:
            write_video(tmp_path / name, frames, FPS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    found = read_video(tmp_path / name).frames
    assert 3 < len(found) < 40
    assert name != "a" or len(found) == stop
    assert re.fullmatch(
        rf"writing {tmp_path / name} failed at frame \d+ \(File too large\); the first {len(found)} frames can be "
        r"played: make room on the disk, or name another place",
        str(caught.value),
    )


@pytest.mark.parametrize("name", ["a.mp4", "a.npz", "a.gif", "a"])
def test_a_whole_video_appears_whole_or_not_at_all(tmp_path, name, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # not one frame
        with pytest.raises(
            UserError, match=rf"(cannot write|writing) {re.escape(str(tmp_path / name))}\b.*File too large"
        ):
            write_video(tmp_path / name, noisy(12), FPS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"old"


def test_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for action in (lambda: check_video_path(tmp_path / "a.mp4"), lambda: write_video(tmp_path / "a.mp4", clip(), FPS)):
        with pytest.raises(UserError, match=r"needs PyAV.*pip install 'sana-jax\[video\]'.*folder"):
            action()
    write_video(tmp_path / "frames", clip(2), FPS)
    write_video(tmp_path / "a.gif", clip(2), FPS)
    assert len(read_video(tmp_path / "frames").frames) == 2


def test_another_encoder_is_said(tmp_path, monkeypatch, capsys):
    import av

    monkeypatch.setattr(videos, "_ENCODERS", ("libnone", "mpeg4"))
    write_video(tmp_path / "a.mp4", clip(4), FPS)
    assert "written with mpeg4, since this PyAV has no libnone" in capsys.readouterr().out
    assert len(read_video(tmp_path / "a.mp4").frames) == 4
    monkeypatch.setattr(videos, "_ENCODERS", ("libnone",))
    with pytest.raises(UserError, match="none of the encoders libnone"):
        check_video_path(tmp_path / "a.mp4")
    assert av.codecs_available


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("a.avi", {}, (".mp4, .gif, .npz", "a.mp4")),
        ("a.gif", {"progressive": True}, ("written at once", "a.mp4")),
        ("full", {}, ("has something in it",)),
        ("nowhere/file.txt/a.mp4", {}, ("cannot write", "file.txt")),
        (
            "/proc/a.gif",
            {},
            ("cannot write /proc/a.gif (", "that can be written to"),
        ),  # not for an administrator either
        ("/proc/a", {}, ("cannot write /proc/a (", "that can be written to")),
    ],
)
def test_names_that_are_not_allowed(tmp_path, name, options, parts):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.png").touch()
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "file.txt").touch()
    with pytest.raises(UserError) as caught:
        check_video_path(tmp_path / name, **options)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("frames", "fps", "part"),
    [
        (clip(2) * 255, FPS, "not in range"),
        (np.full((2, 8, 8, 3), np.nan), FPS, "not in range"),
        (np.zeros((2, 8, 8, 4)), FPS, r"shape \(2, 8, 8, 4\)"),
        (np.zeros((0, 8, 8, 3)), FPS, "shape"),
        (clip(2), 0, "fps 0"),
        (clip(2), float("nan"), "fps nan"),
    ],
)
def test_frames_that_are_not_allowed(tmp_path, frames, fps, part):
    with pytest.raises(UserError, match=part):
        write_video(tmp_path / "a.mp4", frames, fps)
    assert not list(tmp_path.iterdir())


def test_frames_of_another_size_behind(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", FPS) as writer:
        writer.append(clip(2))
        with pytest.raises(UserError, match="48x66 pixels behind frames of 48x64"):
            writer.append(clip(2, 48, 66))


def test_files_that_are_no_videos(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "other.npz").touch()
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "b.npz", pictures=np.zeros(3))
    for name, part in {"text.mp4": "can't be read", "other.npz": "can't be read", "b.npz": "arrays pictures"}.items():
        with pytest.raises(UserError, match=part):
            read_video(tmp_path / name)
    with pytest.raises(UserError, match="no frames"):
        read_video(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        read_video(tmp_path / "nowhere.mp4")


def test_a_codec_that_is_not_known(tmp_path):
    """The sample's type in the file's index is one that FFmpeg does not have."""
    path = write_video(tmp_path / "a.mp4", clip(3), FPS)
    data = path.read_bytes()
    assert data.count(b"avc1") >= 1
    path.write_bytes(data.replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"))
    with pytest.raises(UserError, match=r"can't be read|no video|no frames") as caught:
        read_video(path)
    assert "\n" not in str(caught.value)


def test_a_place_that_fails_at_the_end(tmp_path, monkeypatch, capsys):
    """Laying the file out again is a comfort: where the disk has no room for it, the fragments stay."""
    writer = VideoWriter(tmp_path / "a.mp4", FPS)
    writer.append(clip(4))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(videos.os, "replace", full)
    writer.close()
    assert "left as it was written, in fragments (No space left on device)" in capsys.readouterr().out
    assert len(read_video(tmp_path / "a.mp4").frames) == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]
