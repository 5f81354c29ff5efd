"""Moving digits: what the captions say is what can be measured; the held-out pictures are held out."""

from __future__ import annotations

import numpy as np
import pytest

from configs.data import MovingDigitsDataConfig
from sana_jax.errors import UserError
from train.data.digits import NAMES, load_images
from train.data.loader import Loader
from train.data.video.moving_digits import BLACK, DIRECTIONS, MovingDigitsData, move
from train.evaluate_moving_digits import first_frames
from train.evaluation.moving_digits import centres, describe, direction, measure, recognised_digit


@pytest.fixture(scope="module", params=[(12, 4, 1), (16, 8, 2)], ids=["12px", "16px"])
def data(request):
    canvas, directions, speed = request.param
    return MovingDigitsData(MovingDigitsDataConfig(canvas=canvas, directions=directions, speed=speed))


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_real_clips_are_measured_as_what_they_are(data, part):
    part = data if part == "train" else data.validation
    indices = np.arange(0, len(part), 37)
    choices = np.random.default_rng(0).random((len(indices), 2))
    clips = [part.clip(index) for index in indices]
    digits, names = np.asarray([clip.digit for clip in clips]), [clip.direction for clip in clips]
    figures = measure(part.videos(indices, choices), digits, names, part.directions)
    assert figures.clips == len(indices)
    assert figures.direction == 1.0
    assert figures.recognised >= 0.985  # the reader knows all of them, whichever part they are of
    assert figures.both >= 0.985
    assert max(figures.recognised_by_frame) - min(figures.recognised_by_frame) == 0  # wherever a digit is
    assert any("100.0%" in line for line in describe(figures))


def test_a_reader_that_has_not_seen_the_pictures_reads_them_too():
    from sklearn.svm import SVC

    from train.evaluation.moving_digits import located

    images, labels = load_images(tuple(range(10)))
    videos = np.stack([move(image, "up left", (n % 12, n % 7), 2, 12) for n, image in enumerate(images)])
    cut = located(videos[:, 1])
    reader = SVC(gamma=0.001).fit(cut[::2], labels[::2])
    assert (reader.predict(cut[1::2]) == labels[1::2]).mean() > 0.95


def test_wrong_clips_are_measured_as_wrong(data):
    indices = np.arange(0, len(data), 101)
    clips = [data.clip(index) for index in indices]
    digits, names = np.asarray([clip.digit for clip in clips]), [clip.direction for clip in clips]
    videos = data.videos(indices)
    assert measure(videos[:, ::-1], digits, names, data.directions).direction == 0.0
    assert measure(videos, (digits + 1) % 10, names, data.directions).recognised < 0.05
    still = np.repeat(videos[:, :1], 9, 1)
    assert measure(still, digits, names, data.directions).direction == 0.0
    noise = np.random.default_rng(0).uniform(-1, 1, videos.shape)
    figures = measure(noise, digits, names, data.directions)
    assert figures.recognised < 0.3
    assert direction(np.full((9, 12, 12, 1), BLACK)) is None


def test_noise_and_changed_brightness_do_not_hide_a_digit(data):
    indices = np.arange(0, len(data), 53)
    clips = [data.clip(index) for index in indices]
    videos = data.videos(indices)
    videos = videos + np.random.default_rng(1).normal(0, 0.1, videos.shape)
    digits, names = np.asarray([clip.digit for clip in clips]), [clip.direction for clip in clips]
    figures = measure(videos, digits, names, data.directions)
    assert figures.recognised > 0.97
    assert figures.direction == 1.0


def test_digits_move_as_their_direction_says():
    image = load_images((7,))[0][0]
    for name, (down, right) in DIRECTIONS.items():
        clip = move(image, name, (3, 4), 30, 12)
        assert clip.shape == (30, 12, 12, 1)
        np.testing.assert_array_equal(np.roll(clip[0], (down, right), (0, 1)), clip[1])
        np.testing.assert_array_equal(clip[0], clip[12])  # around the canvas once
        shift = np.diff(centres(clip)[:2], axis=0)[0]
        np.testing.assert_allclose((shift + 6) % 12 - 6, (down, right), atol=1e-6)
        assert direction(clip, tuple(DIRECTIONS)) == name
        assert set(recognised_digit(clip)) == {7}


def test_the_split_is_by_picture(data):
    train, held_out = data._pictures[0], data.validation._pictures[0]
    assert len(train) + len(held_out) == 1797
    assert len(held_out) == round(0.2 * 1797)
    together, everything = np.concatenate([train, held_out]), load_images(tuple(range(10)))[0]
    assert {image.tobytes() for image in together} == {image.tobytes() for image in everything}
    assert data.validation.validation is None
    other = MovingDigitsData(MovingDigitsDataConfig(seed=1))
    assert not np.array_equal(other._pictures[0], MovingDigitsData(MovingDigitsDataConfig())._pictures[0])


def test_a_sample_is_a_function_of_seed_and_index(data):
    again = MovingDigitsData(data.config)
    indices = np.asarray([5, 17, 5])
    np.testing.assert_array_equal(data.videos(indices), again.videos(indices))
    np.testing.assert_array_equal(data.videos(indices)[0], data.videos(indices)[2])
    canvas, speed = data.config.canvas, data.config.speed
    # right: from every step's column, in the middle row
    assert data.clip(0).direction == "right"
    wanted = {((canvas - 8) // 2, column) for column in range(0, canvas, speed)}
    assert {data.clip(0, place).start for place in np.linspace(0, 0.999, 50)} == wanted
    # without a place, where seed and index say
    assert {data.clip(index).start for index in range(0, 300 * len(data.directions), len(data.directions))} == wanted


def test_batches_and_captions(data):
    config = data.config
    batch = data.batch(np.asarray([0, len(data) - 1]), np.full((2, 2), 0.5))
    assert batch.latents.shape == (2, config.frames, config.canvas, config.canvas, 1)
    assert batch.latents.dtype == np.float32
    assert np.abs(batch.latents).max() == 1.0
    for row, index in enumerate((0, len(data) - 1)):
        clip = data.clip(index)
        assert data.caption_of(index) == f"a {NAMES[clip.digit]} moving {clip.direction}"
        embeds, mask = data.encode([data.caption_of(index)])
        np.testing.assert_array_equal(batch.prompt_embeds[row], embeds[0])
        np.testing.assert_array_equal(batch.prompt_attention_mask[row], mask[0])
        assert data.meaning_of(data.caption_of(index)) == (clip.digit, clip.direction)
    assert len(data.captions) == len(set(data.captions)) == 10 * config.directions
    assert len({data.meaning_of(caption)[1] for caption in data.captions[:4]}) == 4
    loader = Loader(data, seed=0, batch_size=8, rows=(0, 8))
    assert next(loader).latents.shape == (8, *data.preview_shape)
    assert "handwritten digits (scikit-learn) moving in" in data.describe()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digits": ()}, "the data would be empty"),
        ({"caption": "a {digit}"}, "must have {digit} and {direction}"),
        ({"caption": "{digit} {direction} {colour}"}, "no other braces"),
        ({"caption": "a b c d e f {digit} {direction}"}, "--data.max-words"),
        ({"frames": 1}, "--data.frames 1"),
        ({"canvas": 9}, "--data.canvas 9"),
        ({"speed": 6}, "--data.speed 6 is not allowed; allowed is 1 to 5"),
        ({"held_out": 1.0}, "--data.held-out"),
    ],
)
def test_settings_that_give_no_data(change, message):
    with pytest.raises(UserError, match=message):
        MovingDigitsData(MovingDigitsDataConfig(**change))


def test_clips_from_pictures_need_one_of_every_digit():
    """A hundredth of the pictures has no seven."""
    few, some = (MovingDigitsData(MovingDigitsDataConfig(held_out=share)) for share in (0.01, 0.02))
    with pytest.raises(UserError, match=r"needs a picture for 'a seven moving .*', and of the 1\.0% "):
        first_frames(few, few.captions)
    assert first_frames(some, some.captions).shape == (40, 12, 12, 1)
