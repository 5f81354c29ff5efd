"""Where videos may lie: nested folders, folders of frames, manifests, tars; what is said of them; what is refused."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from configs.data import ImageDataConfig, VideoDataConfig
from sana_jax.errors import UserError
from sana_jax.pipelines.resolution import VIDEO_BINS
from tests.train.data.video.clip_files import number_of, video_bytes, write_frames, write_video
from train.data.conditions import View
from train.data.source import open_source
from train.data.video.sizes import clip_sizes
from train.data.video.source import open_clips
from train.inspect_data import main as inspect_data

VIEW = View(32, 64)


def config(path, **fields) -> VideoDataConfig:
    return VideoDataConfig(path=str(path), **{"clip_frames": 5, "clip_fps": 10.0, **fields})


def opened(path, **fields):
    lines: list[str] = []
    return open_clips(config(path, **fields), lines.append), "\n".join(lines)


def first_numbers(source) -> dict[str, int]:
    """The number in the first frame of every clip."""
    return {
        record.key: number_of(source.read_clips([record], [VIEW]).clips[source.cuts[record.key].start, VIEW][0])
        for record in source.records
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos of several kinds, at several depths, one of them a folder of frames."""
    root = tmp_path_factory.mktemp("videos")
    (root / "deep" / "er").mkdir(parents=True)
    write_video(root / "a.mp4", 5, first=10)
    write_video(root / "deep" / "b.webm", 6, first=20, codec="libvpx-vp9")
    write_video(root / "deep" / "er" / "c.gif", 5, first=30, codec="gif")
    write_frames(root / "deep" / "frames", 12)
    for name in ("a", "deep/b", "deep/er/c", "deep/frames"):
        (root / f"{name}.txt").write_text(f"caption of {name}")
    Image.new("RGB", (8, 8)).save(root / "poster.jpg")
    (root / "notes.pdf").write_bytes(b"x")
    return root


def test_a_nested_folder(folder):
    source, text = opened(folder, source_fps=10.0)
    assert first_numbers(source) == {
        "a@000000": 10,
        "deep/b@000000": 20,
        "deep/er/c@000000": 30,
        "deep/frames@000000": 0,
        "deep/frames@000005": 5,
    }
    assert {record.captions[0].text for record in source.records} == {
        f"caption of {name}" for name in ("a", "deep/b", "deep/er/c", "deep/frames")
    }
    assert "1 pictures are neither videos nor in a folder of frames alone, and are left out: poster.jpg" in text
    assert "1 other files are left out: notes.pdf" in text
    assert f"data: {folder} (folder of videos): 4 videos, 32x64 to 32x64 px (height x width), 0.50 to 1.20 s" in text
    assert "data: 5 clips of 5 frames at 10 per second (0.50 s) in 4 videos" in text


def test_frames_need_a_rate_and_others_are_said(folder):
    source, text = opened(folder, max_bad_share=0.5)
    assert "data: left out: deep/frames is a folder of frames, which says no frame rate" in text
    assert len(source.videos) == 3
    _, text = opened(folder, source_fps=20.0, clip_fps=12.0)
    assert "data: 1 videos have up to 20 frames per second, of which 12 are taken" in text
    assert "data: 3 videos have as few as 10 frames per second, fewer than --data.clip-fps 12: their frames" in text


@pytest.mark.parametrize("kind", ["jsonl", "csv", "folder-of-manifest"])
def test_manifests(folder, tmp_path, kind):
    rows = [
        {"video": str(folder / "a.mp4"), "caption": "one", "key": "first"},
        {"video": str(folder / "deep" / "frames"), "caption": "two", "key": "second"},
        {"video": str(folder / "gone.mp4"), "caption": "three", "key": "third"},
    ]
    if kind == "csv":
        path = tmp_path / "list.csv"
        path.write_text("\n".join(["video,caption,key", *(",".join(row.values()) for row in rows)]))
    else:
        path = tmp_path / "metadata.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
    source, text = opened(path if kind != "folder-of-manifest" else tmp_path, source_fps=10.0, max_bad_share=0.5)
    assert first_numbers(source) == {"first@000000": 10, "second@000000": 0, "second@000005": 5}
    assert [record.captions[0].text for record in source.records] == ["one", "two", "two"]
    assert "gone.mp4 is missing" in text


def test_scores_choose_videos(folder, tmp_path):
    names, path = {"a": 0.4, "deep/b": "2.5", "deep/er/c": 31, "deep/frames": None}, tmp_path / "list.jsonl"
    files = {"a": "a.mp4", "deep/b": "deep/b.webm", "deep/er/c": "deep/er/c.gif", "deep/frames": "deep/frames"}
    rows = [
        {"video": str(folder / files[name]), "caption": name, "key": name, "_unimatch": score, "dover": 1}
        for name, score in names.items()
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    source, text = opened(path, source_fps=10.0, max_bad_share=0.3, filters=("unimatch=1:30", "dover=0.5:"))
    assert {record.captions[0].text for record in source.records} == {"deep/b"}
    assert "data: 2 videos do not pass --data.filters and are left out: a, deep/er/c" in text
    assert "data: left out: deep/frames has no score unimatch, which --data.filters asks for" in text
    with pytest.raises(UserError, match=r"1 of 4 files are unusable, .*deep/frames has no score unimatch"):
        opened(path, source_fps=10.0, filters=("unimatch=1:30",))
    assert len(opened(path, source_fps=10.0)[0].videos) == 4
    for filters, message in {("dover>1",): "--data.filters dover>1", ("a=1:", "a=2:"): "--data.filters a=2:"}.items():
        with pytest.raises(UserError, match=message):
            config(path, filters=filters)
    with pytest.raises(UserError, match=r"--data.filters a=1: .* without --data.path"):
        VideoDataConfig(cache="cache", filters=("a=1:",))


def test_tars(tmp_path):
    with tarfile.open(tmp_path / "shard-000.tar", "w") as tar:
        for name, content in {
            "x.mp4": video_bytes(6, first=40),
            "x.txt": b"in a tar",
            "x.json": json.dumps({"motion": 4}).encode(),
            "y.mp4": video_bytes(5, first=50),
            "y.txt": b"another",
            "y.json": json.dumps({"motion": 8}).encode(),
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    source, _ = opened(tmp_path, motion_score="motion")
    assert first_numbers(source) == {"shard-000/x@000000": 40, "shard-000/y@000000": 50}
    assert source.records[0].captions[0].text == "in a tar motion score: 4."


def test_stamps_change_with_the_content(tmp_path):
    write_video(tmp_path / "a.mp4", 5)
    write_frames(tmp_path / "f", 5)
    fields = {"source_fps": 10.0, "missing_captions": "empty"}
    before = {record.key: record.stamp for record in opened(tmp_path, **fields)[0].records}
    write_video(tmp_path / "a.mp4", 5, first=3)
    (tmp_path / "f" / "f5.png").rename(tmp_path / "f" / "f6.png")
    after = {record.key: record.stamp for record in opened(tmp_path, **fields)[0].records}
    assert sorted(before) == sorted(after) == ["a@000000", "f@000000"]
    assert all(before[key] != after[key] for key in before)


def test_pictures_are_found_beside_videos_as_before(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "p.png")
    (tmp_path / "p.txt").write_text("a picture")
    write_video(tmp_path / "a.mp4", 5)
    lines: list[str] = []
    source = open_source(ImageDataConfig(path=str(tmp_path)), lines.append)
    assert [record.key for record in source.records] == ["p"]
    assert "data: 1 other files are left out: a.mp4" in lines


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"clip_frames": 80},
            "--data.clip-frames 80 is not allowed; allowed is 4k + 1 frames; the nearest are 77 and 81",
        ),
        ({"clip_frames": 0}, "the nearest are 1 and 5"),
        ({"clip_fps": 0.0}, "--data.clip-fps 0.0 is not allowed; allowed is above 0"),
        ({"clip_stride": 0}, "--data.clip-stride 0"),
        ({"clips_per_video": 0}, "--data.clips-per-video 0"),
        ({"clip_size": (0, 8)}, "--data.clip-size 0 8"),
        ({"clip_size": (8, 8), "resolution": 8}, "allowed is none beside --data.clip-size"),
        ({"format": "huggingface"}, "--data.format huggingface is not allowed"),
        ({"conditions": ("a=scalar",)}, "--data.conditions a=scalar is not allowed; allowed is none for clips"),
        ({"joint_interval": 4}, "--data.joint-interval and --data.joint-pictures together"),
        ({"joint_interval": 1, "joint_pictures": "a"}, "0 (clips alone), or 2 or more"),
        ({"joint_caption": "a"}, "none without --data.joint-pictures"),
    ],
)
def test_settings_that_are_not_allowed(fields, says):
    with pytest.raises(UserError) as caught:
        VideoDataConfig(**fields)
    assert says in str(caught.value)


def test_places_without_videos(tmp_path):
    with pytest.raises(UserError, match=r"has no video that can be used.*name a folder with \.mp4"):
        opened(tmp_path)
    np.savez(tmp_path / "a.npz", z=np.zeros(3))
    with pytest.raises(UserError, match="is of the format features, which has no videos"):
        opened(tmp_path)
    write_video(tmp_path / "a.mp4", 5)
    with pytest.raises(UserError, match=r"1 of 1 videos have no caption: a; .*\(a.txt for a.mp4\)"):
        opened(tmp_path)


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_sizes_are_the_models():
    assert clip_sizes(VideoDataConfig(), 30, 8, 2) == VIDEO_BINS[30]
    assert clip_sizes(VideoDataConfig(), 22, 32, 1) == VIDEO_BINS[22]
    assert [each[1:] for each in clip_sizes(VideoDataConfig(clip_size=(224, 224)), 30, 8, 2)] == [(224, 224)]
    assert [each[1:] for each in clip_sizes(VideoDataConfig(aspect_buckets=False), 30, 8, 2)] == [(624, 624)]
    scaled = clip_sizes(VideoDataConfig(resolution=320), 30, 8, 2)
    assert (320, 320) in [each[1:] for each in scaled]
    assert all(height % 16 == width % 16 == 0 for _, height, width in scaled)
    assert all(abs(height * width / 320**2 - 1) < 0.15 for _, height, width in scaled)


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_report(folder, tmp_path, capsys):
    root = tmp_path / "videos"
    root.mkdir()
    write_video(root / "a.mp4", 60, fps=30)
    write_video(root / "odd.mkv", 30, times_ms=np.cumsum([40, 100, 20, 300, 90] * 6).tolist())
    write_video(root / "short.mp4", 5)
    write_video(root / "cut.mkv", 100, key_every=5)
    whole = (root / "cut.mkv").read_bytes()
    (root / "cut.mkv").write_bytes(whole[: len(whole) * 6 // 10])
    (root / "bad.mp4").write_bytes(b"nothing")
    (root / "a.txt").write_text("a caption of four")
    sheet = tmp_path / "sheet.png"
    command = [str(root), "--clip-frames", "17", "--clip-fps", "10", "--contact-sheet", str(sheet)]
    assert inspect_data(command) == 1
    text = capsys.readouterr().out
    for line in (
        f"{root}: folder of videos",
        "usable: 4 of 5",
        "duration: 0.50 to 10.00, median 2.",
        "variable frame rate: odd: 20 to 300 ms from frame to frame",
        "with a variable frame rate: 1 of 4; frames are taken by their times",
        "coded as: h264 4",
        "clips of 17 frames at 10 per second (1.70 s): 8 in 3 of 4 videos, 1 to 5 of each",
        "left out: short is shorter than a clip: 5 frames at 10 per second (0.50 s), 17 are needed",
        "captions: 1, 1 different",
        "without a caption: 3: cut, odd, short",
        "training would stop: 2 of 5 files are unusable, --max-bad-share allows a share of 0.1",
        "training would stop: 3 of 4 videos have no caption",
        f"contact sheet: {sheet}",
    ):
        assert f"\n{line}" in f"\n{text}", line
    assert text.count("unusable: bad.mp4 is not a video") == 1
    assert text.count("damaged: cut.mkv is cut off: it ends after") == 1
    with Image.open(sheet) as picture:
        assert picture.width > 3 * 160
    assert inspect_data([str(root), "--no-check-pixels"]) == 1
    text = capsys.readouterr().out
    assert "\ndamaged: " not in text
    assert "training would stop: --clip-frames 81 at --clip-fps 16: all 4 videos" not in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--clip-frames", "80"], "--clip-frames 80 is not allowed"),
        (["--clip-frames", "5", "--no-clips"], "unknown option --clip-frames"),
        (["--cache", "x"], "unknown option --cache; it is for training"),
        (["--joint-pictures", "x"], "pictures beside clips are inspected by themselves"),
    ],
)
def test_the_reports_mistakes(folder, words, says):
    with pytest.raises(UserError) as caught:
        inspect_data([str(folder), *([] if "--no-clips" in words else ["--clips"]), *words])
    assert says in str(caught.value)


def test_clips_of_a_video_that_is_named_twice_are_of_one_group(tmp_path):
    for index in range(3):
        write_video(tmp_path / f"{index}.mp4", 5, first=10 * index)
    rows = [{"video": f"{index}.mp4", "text": text} for index in (0, 1, 2) for text in ("a", "b")[: 2 - index // 2]]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, _ = opened(tmp_path / "all.jsonl")
    groups = [record.group for record in source.records]
    assert groups[0] == groups[1] != groups[2] == groups[3]
    assert groups[4] == "video 2"
