"""The four forms of intrinsics, what is refused, and what a resize and a crop do to them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sana_jax.camera import (
    field_of_view,
    intrinsics_matrices,
    intrinsics_of_field,
    plan_resize_and_crop,
    read_intrinsics,
    scale_intrinsics,
)
from sana_jax.errors import UserError

VECTOR = [100.0, 110.0, 75.0, 40.0]
SIZE = (90, 140)


def test_all_forms_are_one(capsys):
    expected = np.array([VECTOR] * 3, np.float32)
    matrix = intrinsics_matrices(np.array(VECTOR))
    np.testing.assert_array_equal(matrix, [[100, 0, 75], [0, 110, 40], [0, 0, 1]])
    for form in (VECTOR, np.array(VECTOR), matrix, expected, np.tile(matrix, (3, 1, 1))):
        read = read_intrinsics(form, 3, *SIZE)
        np.testing.assert_array_equal(read, expected)
        assert read.dtype == np.float32
    assert capsys.readouterr().out == ""
    changing = np.array([VECTOR] * 5) + np.arange(5)[:, None]
    for form in (changing, intrinsics_matrices(changing)):
        np.testing.assert_array_equal(read_intrinsics(form, 3, *SIZE), changing[:3].astype(np.float32))
        assert capsys.readouterr().out == "intrinsics: the first 3 of 5 frames are taken\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            [100.0, 100.0, 70.0],
            r"shape \(3,\); allowed is \(4,\), \(3, 3\), \(frames, 4\) or \(frames, 3, 3\)",
        ),
        (np.zeros((3, 4, 4)), r"shape \(3, 4, 4\); allowed is"),
        (np.zeros((1, 3, 3, 3)), r"shape \(1, 3, 3, 3\); allowed is"),
        (np.zeros((1, 3, 4)), r"shape \(1, 3, 4\); allowed is"),
        (5.0, r"shape \(\); allowed is"),
        (np.zeros((0, 4)), "for 0 frames, and the video has 3"),
        (np.array([VECTOR] * 2), r"shape \(2, 4\) are for 2 frames, and the video has 3"),
        (None, "no array of real numbers"),
        ("100,100,70,40", "no array of real numbers"),
        ([[1.0, 2.0], [3.0]], "no array of real numbers"),
        ([np.nan, 100.0, 70.0, 40.0], r"= nan, 100, 70, 40 \(frame 0\): allowed are finite numbers"),
        ([0.0, 100.0, 70.0, 40.0], "focal lengths are allowed above 0"),
        ([100.0, -1.0, 70.0, 40.0], "focal lengths are allowed above 0"),
        ([100.0, 100.0, 141.0, 40.0], "outside the image, which is 140 wide and 90 high.*middle is 70, 45"),
        ([100.0, 100.0, 70.0, 91.0], "the principal point is outside the image"),
        ([100.0, 100.0, 70.0, -1.0], "the principal point is outside the image"),
        ([[100.0, 3.0, 70.0], [0, 100.0, 40.0], [0, 0, 1]], "no pinhole without skew"),
        ([[100.0, 0, 0], [0, 100.0, 0], [70.0, 40.0, 1]], "no pinhole without skew"),
        ([[1.0, 0, 0.7], [0, 1.0, 0.4], [0, 0, 0.01]], "no pinhole without skew"),
        ([[np.nan, 0, 70.0], [0, 100.0, 40.0], [0, 0, 1]], "allowed are finite numbers"),
    ],
)
def test_refused(given, message):
    with pytest.raises(UserError, match=message) as refusal:
        read_intrinsics(given, 3, *SIZE)
    assert "\n" not in str(refusal.value)


def test_the_principal_point_may_lie_at_the_border():
    np.testing.assert_array_equal(read_intrinsics([100.0, 100.0, 140.0, 0.0], 1, *SIZE), [[100, 100, 140, 0]])


def test_the_frame_that_is_wrong_is_named():
    given = np.array([VECTOR] * 4)
    given[2, 2] = 1000
    with pytest.raises(UserError, match=r"\(frame 2\)"):
        read_intrinsics(given, 4, *SIZE)
    read_intrinsics(given, 2, *SIZE)  # a frame that is not taken may be anything


@pytest.mark.parametrize(
    ("degrees", "warned"), [(24.9, True), (25.1, False), (60.0, False), (119.9, False), (120.1, True)]
)
def test_field_of_view(degrees, warned, capsys):
    vector = intrinsics_of_field(degrees, *SIZE)
    assert field_of_view(vector[None], *SIZE)[0, 0] == pytest.approx(degrees, rel=1e-5)
    read_intrinsics(vector, 2, *SIZE)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == warned
    if warned:
        assert lines[0].startswith(f"intrinsics: the field of view is {degrees:.1f} x ")
        assert "(frame 0), outside 25 to 120: are fx and fy in pixels of the 90x140 image?" in lines[0]


def test_field_of_view_off_centre():
    left = 100 * np.tan(np.deg2rad(10.0))
    across = field_of_view(np.array([[100.0, 100.0, left, 45.0]]), *SIZE)[0, 0]
    assert across == pytest.approx(10 + np.rad2deg(np.arctan((140 - left) / 100)))
    with pytest.raises(UserError, match="180"):
        intrinsics_of_field(180.0, *SIZE)


def test_a_point_stays_on_its_pixel_through_resize_and_crop():
    """A bright square seen at a known place is found again where the moved intrinsics say."""
    source, target = (90, 140), (96, 64)
    picture = np.zeros((*source, 3), np.uint8)
    picture[48:54, 76:84] = 255
    seen = np.array([79.5, 50.5])  # column and row of its middle
    plan = plan_resize_and_crop(source, target)
    moved = np.asarray(plan.image(Image.fromarray(picture)), float)[..., 0]
    rows, columns = np.mgrid[: target[0], : target[1]]
    found = np.array([(columns * moved).sum(), (rows * moved).sum()]) / moved.sum()
    before = np.array([VECTOR], np.float32)
    after = plan.intrinsics(before)
    direction = (seen - before[0, 2:]) / before[0, :2]
    np.testing.assert_allclose(after[0, 2:] + direction * after[0, :2], found, atol=0.1)
    assert after.dtype == np.float32
    assert plan.cropped == pytest.approx(1 - 96 * 64 / (96 * 149))
    np.testing.assert_array_equal(before, [VECTOR])
    with pytest.raises(UserError, match="the image is 91x140, and what is done to it was planned for 90x140"):
        plan.image(Image.new("RGB", (140, 91)))
    with pytest.raises(UserError, match=r"sizes \(0, 5\)"):
        plan_resize_and_crop((0, 5), target)


def test_scaling_keeps_what_is_seen():
    before = np.array([VECTOR], np.float64)
    after = scale_intrinsics(before, SIZE, (9, 7))
    np.testing.assert_allclose(after, [[5.0, 11.0, 3.75, 4.0]])
    np.testing.assert_allclose(field_of_view(after, 9, 7), field_of_view(before, *SIZE))
