"""Buckets, captions, splits, resizing and the configuration: pure functions."""

from __future__ import annotations

import numpy as np
import pytest

from configs.data import ImageDataConfig
from sana_jax.errors import UserError
from sana_jax.pipelines.resolution import BINS
from train.data.buckets import Bucket, assign_buckets, size_table
from train.data.captions import CaptionRule, caption_ends, caption_weights, choose_caption, chosen_index, fill_caption
from train.data.decoding import covering_size, crop_offset, flip, resize_and_crop_to
from train.data.source import Caption, Record
from train.data.splits import split

# -- tables ------------------------------------------------------------------------------------------------------------


def test_a_model_is_trained_at_the_sizes_that_it_samples():
    assert size_table(32, 32) == BINS[32]
    assert size_table(32, 32, 512) == BINS[16]
    assert size_table(16, 32, 4096) == BINS[128]


def test_a_resolution_beside_the_models_own():
    with pytest.raises(UserError, match=r"multiple of 32 px: leave it out for the model's own, 256$"):
        size_table(8, 32, 250)


def test_models_without_a_table_and_squares():
    assert [each[1:] for each in size_table(8, 32)] == [(256, 256)]
    assert [each[1:] for each in size_table(8, 1)] == [(8, 8)]
    assert [each[1:] for each in size_table(8, 8, 128)] == [(128, 128)]
    assert [each[1:] for each in size_table(32, 32, 512, aspect_buckets=False)] == [(512, 512)]


@pytest.mark.parametrize("resolution", [768, 256, 96])
def test_a_resolution_without_a_table_scales_the_models_own(resolution):
    table = size_table(32, 32, resolution)
    assert (1.0, resolution, resolution) in table
    assert len(set(table)) == len(table) > 3
    for ratio, height, width in table:
        assert height % 32 == width % 32 == 0
        assert ratio == height / width
    assert 0.7 < np.mean([height * width for _, height, width in table]) / resolution**2 < 1.3


@pytest.mark.parametrize("resolution", [1000, 16, 0])
def test_a_resolution_that_does_not_fit(resolution):
    with pytest.raises(
        UserError, match=rf"--data.resolution {resolution} is not allowed; .* multiple of 32 px: choose"
    ):
        size_table(32, 32, resolution)


# -- buckets -----------------------------------------------------------------------------------------------------------

SIZES = [(100, 100)] * 8 + [(100, 110)] * 3 + [(100, 120)] * 2 + [(100, 300)] * 1 + [(120, 60)] * 6


def test_without_rare_sizes_each_picture_has_the_nearest():
    plan = assign_buckets(SIZES, BINS[16], minimum=1)
    assert sum(plan.counts) == len(SIZES)
    for size, index in zip(SIZES, plan.bucket_of):
        height, width = plan.buckets[index]
        assert height / width == pytest.approx(size[0] / size[1], rel=0.1)
    assert plan.merged == plan.repeated == ()


def test_rare_sizes_are_merged_into_the_nearest_shape():
    plan = assign_buckets(SIZES, BINS[16], minimum=4)
    assert min(plan.counts) >= 4
    assert sum(count for _, _, count in plan.merged) == sum(
        plan.buckets[now] != before
        for now, before in zip(
            plan.bucket_of, (assign_buckets([size], BINS[16], minimum=1).buckets[0] for size in SIZES)
        )
    )
    assert plan.repeated == ()
    line = next(line for line in plan.lines if "merged" in line)
    for rare, into, count in plan.merged:
        assert f"{count} of {rare} to {into}" in line


def test_rare_sizes_are_repeated():
    plan = assign_buckets(SIZES, BINS[16], minimum=4, rare="repeat")
    assert plan.merged == ()
    assert len(plan.repeated) == 3
    assert all(count < 4 and minimum == 4 for _, count, minimum in plan.repeated)
    assert "to be repeated" in " ".join(plan.lines)


def test_fewer_pictures_than_a_batch_are_repeated_in_one_size():
    plan = assign_buckets([(100, 100), (100, 200)], BINS[16], minimum=8)
    assert len(plan.buckets) == 1
    assert plan.repeated == ((plan.buckets[0], 2, 8),)


def test_enlargement_is_counted():
    plan = assign_buckets(
        [(512, 512), (600, 600), (256, 256), (500, 900)], size_table(16, 32, None, aspect_buckets=False), minimum=1
    )
    assert plan.enlarged == 2
    assert "2 pictures are smaller than their size and are enlarged, by up to 2.00" in plan.lines


def test_what_is_cropped_is_counted():
    square = size_table(16, 32, None, aspect_buckets=False)
    plan = assign_buckets([(512, 512), (1024, 512), (5120, 512), (600, 602)], square, minimum=1)
    assert plan.cropped == 2
    assert "2 pictures are cropped: 70% of their area on average, 90% at most" in plan.lines
    assert not any("cropped" in line for line in assign_buckets([(600, 600)], square, minimum=1).lines)


def test_no_pictures():
    plan = assign_buckets([], BINS[16], minimum=4)
    assert plan.buckets == plan.counts == ()
    assert len(plan.bucket_of) == 0


def test_a_bucket_reads_as_height_by_width():
    assert str(Bucket(512, 256)) == "512x256"


# -- resizing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(37, 53), (53, 37), (8, 8), (1000, 3), (3, 1000), (49, 49)])
@pytest.mark.parametrize("target", [(16, 24), (24, 16), (49, 49), (7, 7)])
def test_the_target_is_always_covered(size, target):
    scaled = covering_size(size, *target)
    assert scaled[0] >= target[0]
    assert scaled[1] >= target[1]
    assert scaled[0] == target[0] or scaled[1] == target[1]
    picture = np.full((*size, 3), 77, np.uint8)
    assert np.array_equal(resize_and_crop_to(picture, *target), np.full((*target, 3), 77, np.uint8))


def test_crops():
    picture = np.arange(40, dtype=np.uint8).reshape(1, 40, 1).repeat(10, 0)
    for crop, left in (("center", 15), ((0.0, 0.0), 0), ((0.5, 1.0), 30), ((1.0, 0.25), 8)):
        assert crop_offset((10, 40), 10, 10, crop) == (0, left)
        assert np.array_equal(resize_and_crop_to(picture, 10, 10, crop), picture[:, left : left + 10])
    assert np.array_equal(flip(picture), picture[:, ::-1])
    with pytest.raises(UserError, match="crop 'left' is not allowed"):
        crop_offset((10, 40), 10, 10, "left")
    with pytest.raises(UserError, match="two fractions"):
        crop_offset((10, 40), 10, 10, (0.0, 1.1))


def test_resizing_does_not_alias():
    stripes = np.tile(np.asarray([0, 255], np.uint8), 128)[None, :, None].repeat(256, 0)
    small = resize_and_crop_to(stripes, 32, 32)
    assert np.abs(small[4:-4, 4:-4].astype(int) - 127).max() <= 4


def test_sizes_of_2048_are_resized_with_lanczos():
    """As the authors' loader of several sizes does, whose table of 4096 is resized as the small ones are."""
    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 1), np.uint8)
    bicubic, lanczos = Image.Resampling.BICUBIC, Image.Resampling.LANCZOS
    for side, method in ((1024, bicubic), (2048, lanczos), (4096, bicubic)):
        expected = np.asarray(Image.fromarray(picture[..., 0]).resize((side, side), method))
        assert np.array_equal(resize_and_crop_to(picture, side, side)[..., 0], expected)


# -- captions ----------------------------------------------------------------------------------------------------------

CAPTIONS = (Caption("a", "llava", 20.0), Caption("b", "prompt", 30.0), Caption("c", "intern"))


def shares(rule: CaptionRule, captions=CAPTIONS) -> dict[str, float]:
    chosen = [choose_caption(captions, rule, u).text for u in (np.arange(1000) + 0.5) / 1000]
    return {text: chosen.count(text) / 1000 for text in dict.fromkeys(chosen)}


def test_rules():
    assert shares(CaptionRule("first")) == {"a": 1}
    assert shares(CaptionRule("random")) == {"a": 0.333, "b": 0.334, "c": 0.333}
    assert shares(CaptionRule("proportion", weights={"llava": 1, "intern": 3})) == {"a": 0.25, "c": 0.75}
    assert shares(CaptionRule("clipscore", 10, 1.0)) == {"a": 0.4, "b": 0.6}
    assert shares(CaptionRule("clipscore", 25, 1.0)) == {"b": 1}
    assert shares(CaptionRule("clipscore", 99)) == {"b": 1}
    assert shares(CaptionRule("clipscore", 10), CAPTIONS[2:]) == {"c": 1}


def test_extreme_numbers():
    assert sum(caption_weights(CAPTIONS, CaptionRule("clipscore", 0, 1e-9))) == pytest.approx(1)
    assert choose_caption(CAPTIONS, CaptionRule("clipscore", -5, 0.1), 0.999999).text == "b"
    assert (
        choose_caption([Caption("x", score=-3.0), Caption("y", score=-1.0)], CaptionRule("clipscore", -9), 0.5).text
        == "y"
    )
    assert choose_caption(CAPTIONS, CaptionRule("random"), 1.0).text == "c"


@pytest.mark.parametrize("count", [1, 2, 9, 40])
def test_a_caption_of_weight_0_is_never_chosen(count):
    """Nor where rounding lets the shares add up to a little less than 1: then the last that has a weight is."""
    random = np.random.default_rng(count)
    for _ in range(50):
        weights = random.random(count) * (random.random(count) < 0.5)
        weights[random.integers(count)] = 0.1
        captions = [Caption(str(index), str(index)) for index in range(count)]
        ends = caption_ends(captions, CaptionRule("proportion", weights=dict(zip(map(str, range(count)), weights))))
        for u in (0.0, *ends, np.nextafter(1, 0), 1.0):
            assert weights[chosen_index(ends, u)] > 0
        short = [end * (1 - 2**-52) for end in ends]
        assert chosen_index(short, np.nextafter(1, 0)) == np.flatnonzero(weights)[-1]


def test_captions_that_cant_be_chosen():
    with pytest.raises(UserError, match="no caption to choose from"):
        choose_caption([], CaptionRule(), 0.5)
    with pytest.raises(UserError, match=r"kind llava, prompt, intern, .* gives a weight to other alone"):
        choose_caption(CAPTIONS, CaptionRule("proportion", weights={"other": 1.0}), 0.5)


def test_templates():
    assert fill_caption("a {name} of {count}", {"name": "dog", "count": 3}) == "a dog of 3"
    assert fill_caption("{caption}!", {}, "own") == "own!"
    assert fill_caption("{{braces}}", {}) == "{braces}"


# -- splits ------------------------------------------------------------------------------------------------------------


def records(count: int, groups: int | None = None) -> list[Record]:
    return [Record(f"r{index}", (8, 8), (), None if groups is None else f"g{index % groups}") for index in range(count)]


@pytest.mark.parametrize("groups", [None, 40, 2])
def test_no_group_is_on_both_sides(groups):
    data = records(200, groups)
    training, validation = split(data, 0.2, seed=3)
    assert sorted(training + validation) == list(range(200))
    assert training
    assert validation
    names = [{data[index].group or data[index].key for index in side} for side in (training, validation)]
    assert not names[0] & names[1]
    assert (training, validation) == split(data, 0.2, seed=3)


def test_a_side_stays_when_data_is_added():
    data = records(300, 100)
    before, after = (set(split(data[:count], 0.25)[1]) for count in (200, 300))
    assert before == {index for index in after if index < 200}
    assert split(data, 0.25, seed=1) != split(data, 0.25, seed=2)
    assert 15 <= len({data[index].group for index in after}) <= 35


def test_shares_at_the_ends():
    assert split(records(5), 0.0) == ([0, 1, 2, 3, 4], [])
    assert len(split(records(5), 1e-9)[1]) == 1
    assert len(split(records(5), 1 - 1e-9)[0]) == 1
    with pytest.raises(UserError, match="all 5 pictures belong to one group"):
        split(records(5, 1), 0.5)
    with pytest.raises(UserError, match="share 1 is not allowed"):
        split(records(5), 1)


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"crops": 3}, "--data.crops 3 is not allowed; allowed is 1 where"),
        ({"crops": 0}, "--data.crops 0"),
        ({"clip_temperature": 0.0}, "--data.clip-temperature 0.0"),
        ({"max_bad_share": 1.5}, "--data.max-bad-share 1.5"),
        ({"validation_share": 1.0}, "--data.validation-share 1.0"),
        ({"minimum_size": -1}, "--data.minimum-size -1"),
        ({"resolution": 0}, "--data.resolution 0"),
        ({"proportions": ("prompt=1",)}, "--data.proportions prompt=1"),
        ({"caption_choice": "proportion"}, r"--data.proportions \(none\)"),
        ({"caption_choice": "proportion", "proportions": ("prompt",)}, "--data.proportions prompt "),
        ({"caption_choice": "proportion", "proportions": ("a=1", "a=2")}, "--data.proportions a=2"),
        ({"caption_choice": "proportion", "proportions": ("a=0",)}, "one weight above 0"),
        ({"caption_choice": "proportion", "proportions": ("a=nan",)}, "--data.proportions a=nan"),
        ({"conditions": ("control",)}, "--data.conditions control is not allowed; allowed is name=kind"),
    ],
)
def test_settings_that_are_not_allowed(options, says):
    with pytest.raises(UserError, match=says):
        ImageDataConfig(**options)


def test_a_rule_is_what_the_configuration_says():
    config = ImageDataConfig(caption_choice="proportion", proportions=("a=1", "b=0.5"))
    assert CaptionRule.of(config) == CaptionRule("proportion", 25.0, 0.1, {"a": 1.0, "b": 0.5})
