"""Clips with a camera: paths beside videos, their frames and sizes, and latents in zip files."""

from __future__ import annotations

import json
import re
import sys
import zipfile

import numpy as np
import pytest

from configs.world_data import WorldDataConfig
from sana_jax.camera import camera_inputs, relative_poses
from sana_jax.errors import UserError
from tests.train.data.video.clip_files import number_of, write_video
from train.batch import CAMERA, FRAME_VALID, PLUCKER
from train.data.conditions import View
from train.data.decoding import BadPicture
from train.data.sources.listing import FileBlob
from train.data.video.clips import read_clips
from train.data.video.containers import open_clip
from train.data.world import paths
from train.data.world.cameras import CameraShape
from train.data.world.paths import CameraPath, clip_path, frames_shown, path_between, read_path
from train.data.world.source import open_worlds
from train.data.world.zip_files import open_zip_latents
from train.data.world.zip_latents import ZipWorlds
from train.inspect_data import main as inspect

SIZE, FRAMES = (32, 64), 12
INTRINSICS = np.array([50.0, 48.0, 31.0, 17.0])
CHANNELS, LATENTS, FACTORS = 3, (4, 2, 5), (2, 8)  # T, H, W; frames and pixels per latent
CAMERA_SHAPE = CameraShape(*FACTORS, plucker=True)


def path_of(frames: int, seed: int = 0) -> np.ndarray:
    """Camera-to-world matrices that turn and move, from anywhere."""
    rng = np.random.default_rng(seed)
    start, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    start *= np.linalg.det(start)
    poses = np.tile(np.eye(4), (frames, 1, 1))
    angles = 0.05 * np.arange(frames)
    turns = np.tile(np.eye(3), (frames, 1, 1))
    turns[:, 0, 0] = turns[:, 2, 2] = np.cos(angles)
    turns[:, 0, 2], turns[:, 2, 0] = np.sin(angles), -np.sin(angles)
    poses[:, :3, :3] = start @ turns
    poses[:, :3, 3] = 0.03 * np.arange(frames)[:, None] * rng.standard_normal(3) + rng.standard_normal(3)
    return poses


# -- paths and frames --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fps", "source_fps", "expected"),
    [(10, 10, [3, 4, 5, 6]), (5, 10, [6, 8, 10, 12]), (10, 5, [1, 2, 2, 3]), (16, 24, [4, 6, 7, 9])],
)
def test_a_clip_has_the_poses_of_the_frames_it_shows(fps, source_fps, expected):
    seconds = np.arange(20) / source_fps
    assert frames_shown(3, 4, fps, seconds, source_fps).tolist() == expected


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi", "ts"])
@pytest.mark.parametrize(("fps", "source_fps"), [(8, 29.97), (10, 23.976), (16, 30)])
def test_poses_are_of_the_frames_that_are_read(suffix, fps, source_fps, tmp_path):
    """Some containers round times to milliseconds, which decides where two frames are about as near."""
    codec = {"webm": "libvpx", "avi": "mpeg4"}.get(suffix, "libx264")
    blob = FileBlob(str(write_video(tmp_path / f"a.{suffix}", 220, fps=source_fps, codec=codec, key_every=12)), "a")
    with open_clip(blob) as clip:
        seconds, header = np.asarray(clip.all_seconds()), clip.header
        np.testing.assert_array_equal(seconds, [frame.seconds for frame in clip.frames()])
    for start in (0, 17, 42):
        read = read_clips(blob, [start], [View(32, 64)], frames=13, fps=fps)
        (pixels,) = read.clips.values()
        assert frames_shown(start, 13, fps, seconds, header.fps).tolist() == [number_of(each) for each in pixels]


def test_a_clip_behind_dropped_frames_is_not_given_the_poses_of_others(tmp_path):
    """What lies before a clip is skipped where the container allows it, and counts all the same."""
    times = [1000 * frame // 10 for frame in range(100) if not 12 <= frame < 20]
    write_video(tmp_path / "a.mkv", len(times), times_ms=times, key_every=10, size=SIZE)
    (tmp_path / "a.txt").write_text("a")
    np.savez(tmp_path / "a.npz", c2w=path_of(100), intrinsics=INTRINSICS)
    source = open_worlds(config(tmp_path, clip_frames=9, clip_fps=10.0), lambda line: None)
    last = source.records[-1]
    assert not source.read_clips([last], [View(*SIZE)]).variable
    with pytest.raises(BadPicture, match="a has a variable frame rate, so that poses can't be found"):
        source.seconds_of(last)


def test_the_camera_moves_with_the_crop():
    path = CameraPath(path_of(6), INTRINSICS)
    own = clip_path(path, np.arange(2, 6), SIZE, View(16, 16))
    np.testing.assert_allclose(own.c2w, relative_poses(path.c2w[2:]), atol=1e-6)
    # half of the size, of whose 32 columns the middle 16 stay
    np.testing.assert_allclose(own.intrinsics, np.tile([25.0, 24.0, 15.5 - 8, 8.5], (4, 1)))


@pytest.mark.parametrize("matrices", [False, True])
def test_a_path_of_latent_frames_is_filled_in(matrices):
    whole = path_of(9)
    intrinsics = np.stack([INTRINSICS + np.array([2 * frame, 0, 0, 0]) for frame in range(9)])
    every = intrinsics[::4]
    if matrices:
        every = np.stack([np.array([[f[0], 0, f[2]], [0, f[1], f[3]], [0, 0, 1]]) for f in every])
    found = path_between(CameraPath(whole[::4], every), 4)
    np.testing.assert_allclose(found.c2w, whole, atol=1e-12)
    np.testing.assert_allclose(found.intrinsics, intrinsics)


def test_cameras_of_other_axes():
    poses = path_of(3)
    given = {"poses": poses * [1, -1, -1, 1], "K": INTRINSICS}
    found = read_path(given, "a", SIZE, WorldDataConfig(axes="opengl"))
    np.testing.assert_allclose(found.c2w, poses)
    with pytest.raises(BadPicture, match=r"a has poses and no intrinsics; .* --data.field-of-view"):
        read_path({"npy": poses}, "a", SIZE, WorldDataConfig())
    wide = read_path({"npy": poses}, "a", SIZE, WorldDataConfig(field_of_view=90.0))
    np.testing.assert_allclose(wide.intrinsics, [32, 32, 32, 16])


# -- videos ------------------------------------------------------------------------------------------------------------


def save_videos(folder, count: int) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        write_video(folder / f"{number}.mp4", FRAMES, first=20 * number)
        (folder / f"{number}.txt").write_text(f"a street {number}")
        np.savez(folder / f"{number}.npz", c2w=path_of(FRAMES, number), intrinsics=INTRINSICS)


def config(path, **changes) -> WorldDataConfig:
    given = {"clip_frames": 5, "clip_fps": 10.0, "clip_size": (16, 32), **changes}
    return WorldDataConfig(path=str(path), **given)


def test_bad_paths_are_named_and_left_out(tmp_path):
    save_videos(tmp_path, 6)
    bent, holes = path_of(FRAMES), path_of(FRAMES)
    bent[2, :3, :3] *= 1.1
    holes[3, 0, 3] = np.nan
    np.savez(tmp_path / "0.npz", c2w=bent, intrinsics=INTRINSICS)
    np.savez(tmp_path / "1.npz", c2w=holes, intrinsics=INTRINSICS)
    np.savez(tmp_path / "2.npz", c2w=path_of(FRAMES - 4), intrinsics=INTRINSICS)
    np.savez(tmp_path / "3.npz", c2w=path_of(FRAMES - 1), intrinsics=INTRINSICS)
    (tmp_path / "4.npz").unlink()
    said: list[str] = []
    source = open_worlds(config(tmp_path, max_bad_share=0.7), said.append)
    assert [record.key for record in source.records] == ["3@000000", "3@000005", "5@000000", "5@000005"]
    lines = "\n".join(said)
    for expected in (
        r"left out: 0 has a camera that can't be used: c2w of 0 is not rigid in 1 frames: in frame 2",
        r"left out: 1 has a camera that can't be used: c2w of 1 holds NaN",
        r"left out: 2 has 8 poses for 12 frames",
        r"left out: 4 has no camera",
        r"1 videos have one pose more or fewer than frames, such as 3",
    ):
        assert re.search(expected, lines), lines
    with pytest.raises(UserError, match=r"4 of 6 files are unusable, --data.max-bad-share allows a share of 0.1"):
        open_worlds(config(tmp_path), said.append)


def test_a_manifest_names_the_paths(tmp_path):
    save_videos(tmp_path / "videos", 1)
    (tmp_path / "videos" / "0.npz").rename(tmp_path / "camera.npz")
    rows = [{"video": "videos/0.mp4", "caption": "a street", "poses": "camera.npz"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_worlds(config(tmp_path / "metadata.jsonl"), lambda line: None)
    assert len(source.records) == 2
    np.testing.assert_allclose(source.path_of(source.records[1]).c2w, path_of(FRAMES))


def test_inspecting_cameras(tmp_path, capsys):
    save_videos(tmp_path, 2)
    options = ["--clips", "--cameras", "--clip-frames", "5", "--clip-fps", "10", "--no-check-pixels"]
    inspect([str(tmp_path), *options])
    out = capsys.readouterr().out
    assert re.search(r"cameras: 2; paths of .* units, longest step", out), out
    assert re.search(r"turned by 31.5 .*degrees, and span 65.* degrees across", out), out
    with pytest.raises(UserError, match="--axes is not read without --cameras"):
        inspect([str(tmp_path), "--clips", "--axes", "opengl"])


def test_no_camera_can_be_used(tmp_path, capsys):
    save_videos(tmp_path, 2)
    for name in ("0", "1"):
        (tmp_path / f"{name}.npz").unlink()
    with pytest.raises(UserError, match=r"has no video that can be used, 2 files are unusable"):
        inspect([str(tmp_path), "--clips", "--cameras", "--clip-frames", "5", "--no-check-pixels"])
    assert "left out: 1 has no camera" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"has no video that can be used, 2 files are unusable"):
        open_worlds(config(tmp_path, max_bad_share=1.0), lambda line: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": True}, "--data.flip True is not allowed"),
        ({"crop": "random"}, "--data.crop random is not allowed; allowed is center"),
        ({"field_of_view": 200.0}, "--data.field-of-view 200.0"),
        ({"filters": ("dover>1",), "format": "zip_latents"}, "--data.filters dover>1 is not allowed"),
        *(
            ({name: value, "format": "zip_latents"}, f"--data.{name.replace('_', '-')} {value} is not allowed")
            for name, value in {
                **{"clip_stride": 8, "pose_column": "p", "aspect_buckets": False, "rare_buckets": "repeat"},
                **{"minimum_size": 8, "latent_dtype": "float32"},
            }.items()
        ),
        ({"resolution": 512, "format": "zip_latents"}, "--data.resolution 512 is not allowed"),
        ({"short_clips": "pad"}, "--data.short-clips pad"),
        ({"clip_frames": 6}, "--data.clip-frames 6"),
    ],
)
def test_options_that_are_refused(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        WorldDataConfig(**changes)


# -- zip files ---------------------------------------------------------------------------------------------------------


class Prompts:
    """Stands for encoded prompts."""

    def encode(self, texts):
        return np.asarray([[[float(len(text))]] for text in texts]), np.ones((len(texts), 1), np.int32)


def save_zips(folder) -> dict[str, np.ndarray]:
    """Three samples in two files: poses of pixel frames beside latents, of latent frames in metadata, and too short."""
    rng = np.random.default_rng(0)
    latents = {name: rng.standard_normal((CHANNELS, *LATENTS)).astype(np.float32) for name in ("a", "b", "c")}
    latents["c"] = latents["c"][:, :2]
    folder.mkdir(exist_ok=True)
    small = INTRINSICS / 2  # in pixels of the latents' own video, of 16 x 40
    arrays = {"a": {"c2w": path_of(7), "intrinsics": small}, "b": {}, "c": {"c2w": path_of(3), "K": small}}
    for file, names in (("one", ("a",)), ("two", ("b", "c"))):
        with zipfile.ZipFile(folder / f"{file}.zip", "w") as archive:
            for name in names:
                with archive.open(f"deep/{name}.npz", "w") as member:
                    np.savez(member, z=latents[name], **arrays[name])
    camera = {"c2w": path_of(4).tolist(), "intrinsics": INTRINSICS.tolist(), "height": 32, "width": 80}
    (folder / "one.json").write_text(json.dumps({"a": {"prompt": "a street", "dover": 0.7}}))
    (folder / "two.json").write_text(json.dumps([{"key": "b", **camera}, {"key": "c", "prompt": "a lake"}]))
    (folder / "two_caption.json").write_text(json.dumps({"b": "a house"}))
    (folder / "two_dover.json").write_text(json.dumps({"b": {"score": 0.4}, "c": {"score": 0.9}}))
    return latents


def zipped(folder, *, frames: int = 4, **changes) -> tuple[ZipWorlds, str]:
    data = WorldDataConfig(path=str(folder), format="zip_latents", **changes)
    said: list[str] = []
    samples = open_zip_latents(data, CHANNELS, frames, CAMERA_SHAPE, said.append)
    return ZipWorlds(samples, data, CAMERA_SHAPE, frames, Prompts()), "\n".join(said)


def test_latents_of_zip_files(tmp_path):
    latents = save_zips(tmp_path)
    worlds, said = zipped(tmp_path)
    assert "1 of 3 samples have fewer than 4 latent frames and are left out" in said
    assert worlds.captions == ["a street", "a house"]
    assert {shape: len(own) for shape, own in worlds.buckets.items()} == {(*LATENTS, CHANNELS): 2}
    batch = worlds.batch(np.array([1, 0]))
    np.testing.assert_array_equal(batch.latents, np.moveaxis(np.stack([latents["b"], latents["a"]]), 1, -1))
    assert set(batch.conditions) == {CAMERA, PLUCKER}
    shapes = {name: array.shape[1:] for name, array in batch.conditions.items()}
    assert shapes == worlds.condition_shapes((*LATENTS, CHANNELS))
    options = {"height": 16, "width": 40, "temporal_factor": 2, "spatial_factor": 8}
    direct = camera_inputs(path_of(7), np.tile(INTRINSICS / 2, (7, 1)), **options)
    np.testing.assert_allclose(batch.conditions[CAMERA][1], direct.conditions, atol=1e-6)
    np.testing.assert_allclose(batch.conditions[PLUCKER][1], direct.chunk_plucker, atol=1e-6)
    filled = camera_inputs(path_of(4).repeat(2, 0)[:7], np.tile(INTRINSICS / 2, (7, 1)), **options)  # even frames
    np.testing.assert_allclose(batch.conditions[CAMERA][0], filled.conditions, atol=1e-6)


def test_scores_choose_samples(tmp_path):
    save_zips(tmp_path)
    worlds, said = zipped(tmp_path, filters=("dover=0.5:",))
    assert "1 of 3 samples do not pass --data.filters" in said
    assert worlds.captions == ["a street"]
    with pytest.raises(UserError, match=r"3 of 3 files are unusable.*one/deep/a has no score unimatch"):
        zipped(tmp_path, filters=("unimatch=1:30",))


def test_short_clips_are_filled_up(tmp_path):
    latents = save_zips(tmp_path)
    worlds, said = zipped(tmp_path, frames=3, short_clips="pad")
    assert "2 samples have more than 3 latent frames, of which the first 3 are taken" in said
    assert "1 samples are filled up to 3 latent frames" in said
    batch = worlds.batch(np.arange(3))
    assert batch.conditions[FRAME_VALID].tolist() == [[True] * 3, [True] * 3, [True, True, False]]
    assert not batch.latents[2, 2].any()
    np.testing.assert_array_equal(batch.latents[0], np.moveaxis(latents["a"], 0, -1)[:3])
    np.testing.assert_array_equal(batch.conditions[CAMERA][2, 2], batch.conditions[CAMERA][2, 1])


def save_bad_zips(folder, method: int) -> None:
    """One good sample, and one with each fault of a camera beside its latents, or of its own."""
    poses, latents = path_of(7), np.zeros((CHANNELS, *LATENTS), np.float32)
    bent = poses.copy()
    bent[2, :3, :3] *= 1.1
    good = {"z": latents, "c2w": poses, "intrinsics": INTRINSICS / 2}
    cases = {
        "good": good,
        "narrow": {**good, "intrinsics": INTRINSICS / 2 * [9, 9, 1, 1]},
        "bent": {**good, "c2w": bent},
        "few": {**good, "c2w": poses[:5]},
        "outside": {**good, "intrinsics": INTRINSICS * 9},
        "none": {"z": latents},
        "half": {"z": latents, "c2w": poses},
    }
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "all.zip", "w", method) as archive:
        for name, arrays in cases.items():
            with archive.open(f"{name}.npz", "w") as member:
                np.savez(member, **arrays)
        archive.writestr("torn.npz", b"PK nothing")
    (folder / "all.json").write_text(json.dumps({name: {"prompt": "a street"} for name in (*cases, "torn")}))


BAD = {
    "bent": "has a camera that can't be used: c2w of all/bent is not rigid in 1 frames: in frame 2",
    "few": "has 5 poses for 4 latent frames; allowed are as many, or 7",
    "outside": "the principal point is outside the image",
    "none": "has no camera",
    "half": "has poses and no intrinsics",
    "torn": "can't be read",
}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_bad_samples_of_zip_files_are_named_before_training(tmp_path, capsys, method):
    """Stopped, left out and counted, or reported by inspect_data: as other damage is. None when it is first read."""
    save_bad_zips(tmp_path, method)
    with pytest.raises(UserError, match=r"6 of 8 files are unusable, --data.max-bad-share allows a share of 0.1"):
        zipped(tmp_path)
    worlds, said = zipped(tmp_path, max_bad_share=0.8)
    assert [sample.key for sample in worlds.samples] == ["all/good", "all/narrow"]
    for name, reason in BAD.items():
        assert any(f"left out: all/{name}" in line and reason in line for line in said.splitlines()), said
    assert "1 cameras are unusual, such as: intrinsics: the field of view is" in said
    worlds.batch(np.arange(2))
    inspect([str(tmp_path), "--temporal-factor", "2", "--spatial-factor", "8", "--clip-frames", "5"])
    out = capsys.readouterr().out
    for name, reason in BAD.items():
        assert any(f"unusable: all/{name}" in line and reason in line for line in out.splitlines()), out
    for line in ("usable: 2 of 8", "latents 3 x 4x2x5: 2", "training would stop: 6 of 8 files are unusable"):
        assert line in out, out


@pytest.mark.parametrize("metadata", [("poses", "K"), ("camera_to_world", "intrinsics"), ("poses",), ("K",)])
def test_the_camera_that_is_checked_is_trained_on(tmp_path, metadata):
    """Metadata's, also where the file has another one under a name that comes first; what it lacks is the file's."""
    camera = {"poses": path_of(7), "camera_to_world": path_of(7), "K": INTRINSICS / 2, "intrinsics": INTRINSICS / 2}
    own = {name: camera[name].tolist() for name in metadata}
    beside = {"c2w": path_of(7), "K": INTRINSICS / 2}
    if any(name in own for name in ("poses", "camera_to_world")):
        beside["c2w"] = path_of(7) * 1.1  # not rigid
    if any(name in own for name in ("K", "intrinsics")):
        beside |= {"intrinsics": INTRINSICS * 9}  # outside the picture
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive, archive.open("a.npz", "w") as member:
        np.savez(member, z=np.zeros((CHANNELS, *LATENTS), np.float32), **beside)
    (tmp_path / "all.json").write_text(json.dumps({"a": {"prompt": "a street", **own}}))
    options = {"height": 16, "width": 40, "temporal_factor": 2, "spatial_factor": 8}
    expected = camera_inputs(path_of(7), np.tile(INTRINSICS / 2, (7, 1)), **options)
    batch = zipped(tmp_path)[0].batch(np.array([0]))
    np.testing.assert_allclose(batch.conditions[CAMERA][0], expected.conditions, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "captions", "said"),
    [
        (
            {"missing_captions": "skip", "max_bad_share": 0.0},
            ["a street"],
            "1 of 3 samples have no caption and are left",
        ),
        (
            {"missing_captions": "empty", "max_bad_share": 0.0},
            ["a street"],
            "1 of 3 samples have no caption and get an",
        ),
        (
            {"max_bad_share": 0.5},
            ["a street"],
            "left out: two/deep/b has no caption; write one into the metadata, or choose",
        ),
        (
            {"caption": "one {dover} of {caption}", "max_bad_share": 0.5},
            ["one 0.7 of a street"],
            "two/deep/b has no caption",
        ),
        ({"caption": "a clip", "missing_captions": "skip"}, ["a clip"], "are left out"),
    ],
)
def test_samples_of_zip_files_without_a_caption(tmp_path, options, captions, said):
    save_zips(tmp_path)
    (tmp_path / "two_caption.json").unlink()
    worlds, lines = zipped(tmp_path, **options)
    assert said in lines
    assert worlds.captions == captions
    kept = options.get("missing_captions") == "empty" or options.get("caption") == "a clip"
    assert [sample.key for sample in worlds.samples] == ["one/deep/a"] + ["two/deep/b"] * kept


def test_inspecting_says_which_samples_have_no_caption(tmp_path, capsys):
    save_zips(tmp_path)
    (tmp_path / "two_caption.json").unlink()
    inspect([str(tmp_path), "--temporal-factor=2", "--spatial-factor=8", "--missing-captions=skip"])
    assert "note: 1 samples have no caption and are left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="--aspect-buckets False is not allowed; allowed is True with --format zip"):
        inspect([str(tmp_path), "--format", "zip_latents", "--no-aspect-buckets"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'{"prompt": "a str', "all/a has a a.json that can't be read (Unterminated string"),
        ("a.json", b"[1]", "all/a has a a.json that holds a list; metadata is an object"),
        ("all.json", b"3", "all.json holds a int; samples are an object or a list of objects"),
        ("all.json", b"[1]", "all.json holds a list whose entry 0 names no sample by key, name, id, file_name"),
        ("all.json", b'{"a": {"prompt"', "all.json can't be read"),
        ("all_dover.json", b"no", "all_dover.json can't be read"),
    ],
)
def test_damaged_metadata_is_named_and_counted(tmp_path, name, content, said):
    """It is no sample without a caption, which may be trained on."""
    for shard in ("all", "other"):
        with zipfile.ZipFile(tmp_path / f"{shard}.zip", "w") as archive:
            with archive.open("a.npz", "w") as member:
                arrays = {"c2w": path_of(7), "intrinsics": INTRINSICS / 2}
                np.savez(member, z=np.zeros((CHANNELS, *LATENTS), np.float32), **arrays)
            if (shard, name) == ("all", "a.json"):
                archive.writestr(name, content)
    if name != "a.json":
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"1 of 2 files are unusable.*{re.escape(said)}"):
        zipped(tmp_path, missing_captions="empty")
    worlds, lines = zipped(tmp_path, missing_captions="empty", max_bad_share=0.5)
    assert [sample.key for sample in worlds.samples] == ["other/a"]
    assert said in lines
    assert "left out: " in lines


def test_looking_at_cameras_leaves_the_programs_output_alone(tmp_path, monkeypatch):
    outputs, check = [], paths.check_poses
    monkeypatch.setattr(paths, "check_poses", lambda *given: outputs.append(sys.stdout) or check(*given))
    save_zips(tmp_path)
    zipped(tmp_path)
    paths.check_path(CameraPath(path_of(6), INTRINSICS), "a", SIZE)
    assert len(outputs) == 3
    assert all(output is sys.stdout for output in outputs)


@pytest.mark.parametrize("wrong", ["channels", "damaged"])
def test_zip_files_that_are_refused(tmp_path, wrong):
    save_zips(tmp_path)
    if wrong == "channels":
        data = WorldDataConfig(path=str(tmp_path), format="zip_latents")
        with pytest.raises(UserError, match=r"has latents of shape \(3, 4, 2, 5\); they are \(7, T, H, W\)"):
            open_zip_latents(data, 7, 4, CAMERA_SHAPE, lambda line: None)
    else:
        (tmp_path / "one.zip").write_bytes(b"nothing")
        with pytest.raises(UserError, match=r"one.zip can't be read"):
            zipped(tmp_path, max_bad_share=0.0)
