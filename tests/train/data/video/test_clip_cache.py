"""Caches of clips: the right frames in every record, resumable, named by everything that changes them; joint data."""

from __future__ import annotations

import dataclasses
import signal

import numpy as np
import pytest
from PIL import Image

from sana_jax.autoencoders import LTX2VideoAutoencoder, PixelVideoAutoencoder, WanAutoencoder
from sana_jax.errors import CheckpointError, UserError
from tests.train.data.cache_cases import contents, gray_model, prepared, stop_request
from tests.train.data.video.clip_cases import SIZE, clip_config, video_model, videos
from tests.train.data.video.clip_files import number_of, numbered, write_video
from train.data import encoding, shard_filler
from train.data.cache import CHECK_FILE, LATENTS, CacheReader
from train.data.cached import CachedData
from train.data.conditions import View
from train.data.loader import BatchOrder, Loader, batch_rows
from train.data.video.joint import JointData
from train.data.video.source import open_clips
from train.precompute import with_pictures
from train.video_data import open_video_data


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return video_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return videos(tmp_path_factory.mktemp("data") / "videos")


@pytest.fixture(scope="module")
def cached(tmp_path_factory, model, data):
    config = clip_config(data, tmp_path_factory.mktemp("cached") / "cache")
    directory, lines = prepared(config, model)
    return config, directory, lines


def as_bytes(latents: np.ndarray) -> np.ndarray:
    return np.round((latents + 1) * 127.5).astype(np.uint8)


def numbers(latents: np.ndarray) -> list[int]:
    return [number_of(frame) for frame in as_bytes(latents)]


def test_every_clip_has_its_frames(cached):
    _, directory, lines = cached
    reader = CacheReader(directory)
    places = reader.places(LATENTS)
    found = {key: numbers(reader.read(place)["latents"]) for (key, _), place in places.items()}
    assert found == {
        **{f"long@{start:06d}": list(range(start, start + 5)) for start in (0, 5, 10, 15)},
        **{f"more/tall@{start:06d}": list(range(100 + start, 105 + start)) for start in (0, 5)},
    }
    samples = list(reader.samples())
    assert [sample["key"] for sample in samples] == list(found)
    assert samples[0].pop("signatures").keys() == {"center"}
    assert samples[0] == {
        "key": "long@000000",
        "size": list(SIZE),
        "captions": [["a long video", "prompt", None]],
        "group": "video long",
        "variants": ["center"],
    }
    text = "\n".join(lines)
    assert "data: left out: short is shorter than a clip: 3 frames at 10 per second (0.30 s), 5 are needed" in text
    assert "data: 1 of 3 videos are shorter than a clip and left out" in text
    covered = "which hold 94% of their 0.1 minutes"  # 30 of 32 frames
    assert f"data: 6 clips of 5 frames at 10 per second (0.50 s) in 2 videos, {covered}" in text
    assert "cache: 6 clips, " in text
    assert "decoded again, clips have a mean squared error of 0.00e+00 in [-1, 1], without any error" in text
    with Image.open(directory / CHECK_FILE) as picture:
        assert picture.height > 2 * 128


def test_the_data_set_gives_batches_of_clips(cached):
    config, directory, _ = cached
    dataset = CachedData(directory, config.data)
    assert list(dataset.buckets) == [(5, *SIZE, 3)]
    assert dataset.preview_shape == (5, *SIZE, 3)
    batch = dataset.batch(np.asarray([1, 5]))
    assert batch.latents.shape == (2, 5, *SIZE, 3)
    assert numbers(batch.latents[0]) == [5, 6, 7, 8, 9]
    assert numbers(batch.latents[1]) == [105, 106, 107, 108, 109]
    assert dataset.captions == ["a long video", "a tall video"]
    assert "6 clips from the cache" in dataset.describe()


def test_clips_of_one_video_are_on_one_side_of_the_split(cached):
    config, directory, _ = cached
    data = dataclasses.replace(config.data, validation_share=0.4)
    dataset = CachedData(directory, data)
    assert {len(dataset), len(dataset.validation)} == {4, 2}
    captions = {dataset.caption_of(index) for index in range(len(dataset))}
    assert len(captions) == 1


def test_a_second_time_decodes_nothing_and_new_videos_are_added(model, data, tmp_path, monkeypatch):
    path = videos(tmp_path / "videos")
    config = clip_config(path, tmp_path / "cache")
    directory, _ = prepared(config, model)
    before = contents(directory)
    _, lines = prepared(config, model)
    assert any("6 clips, 6 of them there" in line for line in lines)
    assert contents(directory) == before
    write_video(path / "new.mp4", 5, first=50)
    (path / "new.txt").write_text("a video")
    _, lines = prepared(config, model)
    assert any("7 clips, 6 of them there" in line for line in lines)
    reader = CacheReader(directory)
    assert numbers(reader.read(reader.places(LATENTS)["new@000000", "center"])["latents"]) == [50, 51, 52, 53, 54]
    write_video(path / "long.mp4", 20, first=7)
    _, lines = prepared(config, model)
    assert any("4 clips have changed" in line for line in lines)
    (path / "new.mp4").unlink()
    _, lines = prepared(config, model)
    assert any("1 clips in it are no longer in the data and are dropped: new@000000" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"clip_frames": 9}, "clips.frames is 5 there, 9 here"),
        ({"clip_fps": 5.0}, "clips.fps is 10.0 there, 5.0 here"),
        ({"clip_stride": 2}, 'clips.windows is "every 5 frames, all" there'),
        ({"clips_per_video": 1}, 'clips.windows is "every 5 frames, all" there'),
        ({"clip_size": (16, 16)}, 'pictures.sizes is "16x32" there, "16x16" here'),
    ],
)
def test_what_changes_the_clips_is_another_cache(cached, model, change, field):
    config = cached[0]
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, **change))
    with pytest.raises(CheckpointError) as caught:
        prepared(other, model)
    assert field in str(caught.value)


def test_mirror_images_and_crops(model, data, tmp_path):
    config = clip_config(data, tmp_path / "cache", flip=True, clips_per_video=1)
    directory, _ = prepared(config, model)
    reader = CacheReader(directory)
    places = reader.places(LATENTS)
    assert sorted({key for key, _ in places}) == ["long@000007", "more/tall@000003"]
    plain, mirrored = (reader.read(places["long@000007", name])["latents"] for name in ("center", "center mirrored"))
    np.testing.assert_array_equal(plain[:, :, ::-1], mirrored)


def test_sizes_by_shape(model, data, tmp_path):
    config = clip_config(data, tmp_path / "cache", clip_size=None, resolution=16, batch_size=1)
    directory, _ = prepared(config, model)
    assert list(CachedData(directory, config.data).buckets) == [(5, 16, 16, 3)]
    config = clip_config(data, tmp_path / "other", clip_size=(15, 16))
    with pytest.raises(UserError, match=r"--data.clip-size 15 16 is not allowed; this model needs multiples of 2 px"):
        prepared(config, model)


def test_motion_scores_are_in_captions(model, tmp_path):
    path = videos(tmp_path / "videos")
    directory, _ = prepared(clip_config(path, tmp_path / "fixed", motion_score="5"), model)
    assert CachedData(directory, clip_config(path, None).data).captions[0] == "a long video motion score: 5."
    rows = ["video,caption,motion", "long.mp4,a long video,7.96", "more/tall.mkv,a tall video,5"]
    (path / "metadata.csv").write_text("\n".join(rows))
    config = clip_config(path, tmp_path / "column", motion_score="motion")
    directory, _ = prepared(config, model)
    captions = CachedData(directory, config.data).captions
    assert captions == ["a long video motion score: 7.", "a tall video motion score: 5."]
    (path / "metadata.csv").write_text("\n".join([*rows[:2], "more/tall.mkv,a tall video,"]))
    with pytest.raises(UserError, match="1 of 2 videos have no number of that name: more/tall"):
        prepared(config, model)


@pytest.mark.parametrize(
    ("family", "latent_shape"), [(WanAutoencoder, (3, 4, 8, 4)), (LTX2VideoAutoencoder, (3, 2, 4, 8))]
)
def test_latents_of_a_network_are_those_of_the_clips(model, data, tmp_path, monkeypatch, family, latent_shape):
    from tests.parity import ltx2_vae_oracle, wan_oracle

    monkeypatch.setattr("sana_jax.autoencoders.blockwise.compile_ahead", wan_oracle.quick_compile)
    wan = family is WanAutoencoder
    published = wan_oracle.torch_model("two levels") if wan else ltx2_vae_oracle.torch_model("one stage")
    published.save_pretrained(tmp_path / "model" / "vae")
    autoencoder = family.from_directory(tmp_path / "model" / "vae", say=lambda line: None)
    model = dataclasses.replace(model, path=tmp_path / "model", autoencoder=autoencoder)
    config = clip_config(data, tmp_path / "cache", clips_per_video=1, clip_size=(8, 16), latent_dtype="float32")
    directory, lines = prepared(config, model)
    assert any(line.startswith("decoded again, clips have a mean squared error of") for line in lines)
    dataset = CachedData(directory, config.data)
    assert list(dataset.buckets) == [latent_shape]
    source = open_clips(config.data, lines.append)
    clips = [source.read_clips([record], [View(8, 16)]).clips for record in source.records]
    videos = np.stack([next(iter(each.values())) for each in clips]).astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(dataset.batch(np.arange(2)).latents, autoencoder.encode(videos), rtol=1e-4, atol=1e-4)
    fields = dataset.identity.fields
    assert fields["clips.frames"] == 5
    assert fields["autoencoder.class"] == family.class_name
    assert fields["autoencoder.pixels_at_once"] == autoencoder.largest_at_once


class _Network(PixelVideoAutoencoder):
    """Takes 1 + 8k frames."""

    temporal_factor = 8


def test_frames_that_the_autoencoder_does_not_take(model, data, tmp_path):
    model = dataclasses.replace(model, autoencoder=_Network(3))
    with pytest.raises(UserError, match=r"5 frames; a video has .* the nearest are 1 or 9"):
        prepared(clip_config(data, tmp_path / "cache"), model)


def test_what_was_stopped_goes_on_to_the_same_records(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_MOST_CLIPS", 2)
    whole, _ = prepared(clip_config(data, tmp_path / "whole"), model)
    config, stop = clip_config(data, tmp_path / "cache"), stop_request()
    written = shard_filler.ShardFiller.batch_ends

    def stop_after_two(filler):
        stop.count = getattr(stop, "count", 0) + 1
        if stop.count == 5:  # after the prompts and the first batch of clips
            stop.signal = signal.SIGTERM
        written(filler)

    monkeypatch.setattr(shard_filler.ShardFiller, "batch_ends", stop_after_two)
    directory, lines = prepared(config, model, stop=stop)
    assert directory is None
    assert "stopped by SIGTERM; what was finished is kept" in lines[-1]
    monkeypatch.setattr(shard_filler.ShardFiller, "batch_ends", written)
    directory, lines = prepared(config, model)
    there = int(next(line for line in lines if "of them there" in line).split("6 clips, ")[1].split()[0])
    assert 0 < there < 6
    assert contents(directory) == contents(whole)


# -- damage ------------------------------------------------------------------------------------------------------------


def test_a_damaged_video_is_named_once_and_gives_the_clips_before_its_damage(model, tmp_path):
    path = videos(tmp_path / "videos")
    write_video(path / "cut.mkv", 100, key_every=5)
    whole = (path / "cut.mkv").read_bytes()
    (path / "cut.mkv").write_bytes(whole[: len(whole) * 6 // 10])
    (path / "cut.txt").write_text("a video")
    (path / "none.mp4").write_bytes(b"nothing")
    config = clip_config(path, tmp_path / "cache", max_bad_share=0.4)
    directory, lines = prepared(config, model)
    named = [line for line in lines if "left out: cut" in line]
    assert len(named) == 1
    assert "cut is cut off: it ends after" in named[0]
    keys = {key for key, _ in CacheReader(directory).places(LATENTS)}
    kept = sorted(key for key in keys if key.startswith("cut@"))
    assert 4 <= len(kept) < 20
    assert kept == [f"cut@{5 * place:06d}" for place in range(len(kept))]
    assert f"left out: {20 - len(kept)} clips of 1 videos, each named above" in lines
    assert sum("none.mp4 is not a video" in line for line in lines) == 1
    with pytest.raises(UserError, match=r"2 of 5 files are unusable, --data.max-bad-share allows a share of 0.3"):
        prepared(clip_config(path, tmp_path / "strict", max_bad_share=0.3), model)


def test_variable_rates_are_named(model, tmp_path):
    path = videos(tmp_path / "videos")
    write_video(path / "odd.mp4", 30, times_ms=np.cumsum([40, 200, 20, 90, 150] * 6).tolist())
    (path / "odd.txt").write_text("a video")
    _, lines = prepared(clip_config(path, tmp_path / "cache"), model)
    assert "1 videos have a variable frame rate; frames are taken by their times: odd" in lines


def test_all_too_short(model, data, tmp_path):
    with pytest.raises(UserError) as caught:
        prepared(clip_config(data, tmp_path / "cache", clip_frames=81), model)
    assert "--data.clip-frames 81 at --data.clip-fps 10: all 3 videos of" in str(caught.value)
    assert "the longest has 20 frames at that rate: choose 17 frames or fewer" in str(caught.value)


def test_a_model_of_pictures_is_refused(data, tmp_path):
    with pytest.raises(UserError, match="is for pictures, and the data is videos"):
        prepared(clip_config(data, tmp_path / "cache"), gray_model(tmp_path / "gray"))


# -- joint with pictures -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joint(tmp_path_factory, model, data):
    directory = tmp_path_factory.mktemp("joint")
    (directory / "pictures").mkdir()
    for number in range(3):
        Image.fromarray(numbered(200 + number)).save(directory / "pictures" / f"{number}.png")
    config = clip_config(
        data,
        directory / "clips",
        joint_interval=3,
        joint_pictures=str(directory / "pictures"),
        joint_caption="a picture",
        joint_cache=str(directory / "beside"),
        motion_score="5",
    )
    return config, open_video_data(config, model, lambda line: None, None)


def test_pictures_are_clips_of_one_frame(joint, model):
    config, dataset = joint
    assert isinstance(dataset, JointData)
    assert list(dataset.buckets) == [(5, *SIZE, 3), (1, *SIZE, 3)]
    assert [len(own) for own in dataset.buckets.values()] == [6, 3]
    batch = dataset.batch(np.asarray([7, 8]))
    assert batch.latents.shape == (2, 1, *SIZE, 3)
    assert [numbers(latents) for latents in batch.latents] == [[201], [202]]
    assert dataset.captions[0] == "a long video motion score: 5."
    np.testing.assert_array_equal(batch.prompt_embeds[0], dataset.pictures.encode(["a picture"])[0][0])
    with pytest.raises(ValueError, match="clips and pictures"):
        dataset.batch(np.asarray([0, 8]))
    assert [part.data.path for part in with_pictures(config)] == [config.data.path, config.data.joint_pictures]
    assert CacheReader(config.data.joint_cache).identity.fields["clips.frames"] == 1


def test_every_third_batch_has_pictures_and_the_order_is_that_of_each_alone(joint):
    _, dataset = joint
    order = dataset.order(seed=3, batch_size=4)
    alone = BatchOrder(dataset.clips.buckets, 3, 4)
    plans = [order.plan(number) for number in range(30)]
    assert [bool((plan.indices >= 6).any()) for plan in plans] == [False, False, True] * 10
    of_clips = [plan for plan in plans if plan.indices.max() < 6]
    for number, plan in enumerate(of_clips):
        np.testing.assert_array_equal(plan.indices, alone.plan(number).indices)
        np.testing.assert_array_equal(plan.choices, alone.plan(number).choices)
    pictures = np.concatenate([plan.indices for plan in plans[2::3]])
    counts = np.bincount(pictures - 6)
    assert counts.max() - counts.min() <= 1  # every picture once in an epoch


def test_it_resumes_exactly(joint):
    _, dataset = joint
    rows = (0, 4)
    whole = Loader(dataset, seed=1, batch_size=4, rows=rows)
    first = [next(whole).latents for _ in range(4)]
    position = whole.position()
    rest = [next(whole).latents for _ in range(5)]
    assert [latents.shape[1] for latents in (*first, *rest)] == [5, 5, 1] * 3
    again = Loader(dataset, seed=1, batch_size=4, rows=rows)
    again.restore(position)
    for latents in rest:
        np.testing.assert_array_equal(next(again).latents, latents)


def test_batches_of_pictures_may_be_larger(joint):
    _, dataset = joint
    larger = JointData(dataset.clips, dataset.pictures, 3, pictures_at_once=8)
    clips, pictures = larger.buckets
    assert [batch_rows(larger, shape, 4) for shape in (clips, pictures)] == [4, 8]
    assert batch_rows(dataset, pictures, 4) == batch_rows(dataset.clips, clips, 4) == 4
    whole, parts = Loader(larger, seed=1, batch_size=4, rows=(0, 4)), []
    for rows in ((0, 1), (1, 4)):  # of two processes
        parts.append(Loader(larger, seed=1, batch_size=4, rows=rows))
    for number, wanted in enumerate([4, 4, 8] * 2):
        latents = next(whole).latents
        assert len(latents) == wanted
        own = [next(part).latents for part in parts]
        assert [len(rows) for rows in own] == [wanted // 4, wanted - wanted // 4]
        np.testing.assert_array_equal(latents, np.concatenate(own))
        assert latents.shape[1] == (1 if number % 3 == 2 else 5)
    assert "one step in 3 has 8 pictures as clips of one frame" in larger.describe()


def test_joint_data_needs_both_of_one_model(joint, cached):
    config, directory, _ = cached
    clips = CachedData(directory, config.data)
    with pytest.raises(UserError, match="clips need two frames or more, pictures one"):
        JointData(clips, clips, 2)
    with pytest.raises(UserError, match="choose 2 or more"):
        JointData(clips, joint[1].pictures, 1)
