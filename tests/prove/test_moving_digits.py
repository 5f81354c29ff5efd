"""The small SANA-Video really learns: digits are read as asked for and move where asked, from texts and from images."""

from __future__ import annotations

import pytest

from tests.prove import moving_digits

pytestmark = [pytest.mark.prove, pytest.mark.timeout(3600)]
MOST_SECONDS = 1800
LEAST_RECOGNISED, LEAST_DIRECTION = 0.85, 0.90
HALF_A_STEP = 0.5 / 255  # of the bytes that a picture is given in


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return moving_digits.teacher(tmp_path_factory)


def test_takes_at_most_half_an_hour(teacher):
    assert teacher.seconds <= MOST_SECONDS


def test_text_to_video(teacher, tmp_path):
    found = moving_digits.figures(teacher.run, tmp_path / "figures.json")
    assert found["clips"] == 160
    assert found["recognised"] >= LEAST_RECOGNISED
    assert found["direction"] >= LEAST_DIRECTION


def test_image_to_video_keeps_the_first_frame(teacher, tmp_path):
    found = moving_digits.figures(teacher.run, tmp_path / "figures.json", "--from-images")
    assert found["first_frame"] <= HALF_A_STEP + 1e-6
    assert found["recognised"] >= LEAST_RECOGNISED
    assert found["direction"] >= LEAST_DIRECTION
