"""Control pictures that are drawn of the picture itself."""

from __future__ import annotations

import numpy as np
import pytest

from train.data.conditions import (
    FILTERS,
    KINDS,
    SOFT_GAIN,
    Encoders,
    canny_edges,
    make_conditions,
    scribble,
    soft_edges,
)


@pytest.fixture(scope="module")
def square() -> np.ndarray:
    """A white square with slightly rough sides on black, and a faint one beside it."""
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[16:48, 12:44] = 255
    picture[16:48, 60:92] = 20
    return picture


@pytest.mark.parametrize("kind", FILTERS)
def test_edges_are_where_the_picture_changes(square, kind):
    edges = FILTERS[kind][0](square)
    assert edges.shape == square.shape
    assert edges.dtype == np.uint8
    assert (edges == edges[..., :1]).all()
    assert edges[16:48, 8:48].max() == 255
    assert edges[26:38, 22:34].max() == 0  # inside
    assert edges[:6].max() == edges[58:].max() == 0  # far away
    assert FILTERS[kind][0](np.full_like(square, 130)).max() == 0
    assert FILTERS[kind][0](square[..., :1]).shape == (64, 96, 1)


def test_soft_edges_are_gray_where_the_change_is_small(square):
    edges = soft_edges(square)[..., 0].astype(int)
    faint = edges[32, 55:66].max()
    assert 10 < faint < 100
    assert canny_edges(square)[16:48, 56:].max() == 0
    half = soft_edges(square // 8)[..., 0].astype(int)  # twice as steep is twice as light, below white
    quarter = soft_edges(square // 16)[..., 0].astype(int)
    assert 0 < quarter.max() < half.max() < 255
    assert half.max() == pytest.approx(2 * quarter.max(), rel=0.1)
    assert SOFT_GAIN > 1


def test_a_scribble_is_few_thick_strokes():
    picture = np.zeros((64, 64, 1), np.uint8)
    picture[8:56, 30:34] = 255  # a bar of four pixels: two edges, one stroke
    thin, strokes = canny_edges(picture)[..., 0] > 0, scribble(picture)[..., 0] > 0
    row = 32
    assert np.diff(np.flatnonzero(thin[row])).max() > 1
    assert np.diff(np.flatnonzero(strokes[row])).max() == 1
    assert 2 <= strokes[row].sum() <= 5
    assert strokes[row, 31:33].any()


def test_kinds_have_identities_of_their_own():
    encoders = Encoders(encode_pictures=lambda pictures: pictures, channels=3)
    made = make_conditions([f"a{number}={kind}" for number, kind in enumerate(FILTERS)], encoders)
    assert [condition.identity["kind"] for condition in made] == list(FILTERS)
    assert len({str(dict(condition.identity)) for condition in made}) == len(FILTERS)
    assert set(FILTERS) <= set(KINDS)
