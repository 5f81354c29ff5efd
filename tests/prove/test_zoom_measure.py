"""The measure of zoom that proofs rely on, on real crops whose zoom is known. Fast: runs with every test run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.prove.zoom import OBJECTS, crop, measured_zoom, rank_correlation, thumbnail, write_manifest

ZOOMS = np.random.default_rng(0).uniform(0, 1, 40)


def pictures(thing, size: int) -> np.ndarray:
    return np.stack([np.asarray(crop(thing, zoom, size), np.float64) for zoom in ZOOMS])


@pytest.mark.parametrize("thing", OBJECTS, ids=lambda thing: thing.name)
@pytest.mark.parametrize("size", [16, 32])
def test_real_crops(thing, size):
    clean = pictures(thing, size)
    found, agreement = measured_zoom(clean, thing)
    assert rank_correlation(ZOOMS, found) >= 0.995
    assert np.abs(found - ZOOMS).max() <= 0.03
    assert agreement.min() >= 0.98
    # as samples are: noisy, of another contrast and brightness
    rough = 0.7 * clean + 30 + 20 * np.random.default_rng(1).standard_normal(clean.shape)
    found, _ = measured_zoom(rough, thing)
    assert rank_correlation(ZOOMS, found) >= 0.97


def test_what_is_no_picture_of_the_object_does_not_follow():
    thing, other = OBJECTS[0], OBJECTS[-1]
    noise = np.random.default_rng(2).standard_normal((40, 16, 16, 3))
    for strange in (noise, pictures(other, 16)):
        found, agreement = measured_zoom(strange, thing)
        assert agreement.mean() < 0.6
        assert abs(rank_correlation(ZOOMS, found)) < 0.9
    same = np.repeat(pictures(thing, 16)[:1], 40, axis=0)
    assert rank_correlation(ZOOMS, measured_zoom(same, thing)[0]) == 0


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [1, 1, 2, 2]) == pytest.approx(0.894427, abs=1e-6)


def test_manifest(tmp_path):
    path = write_manifest(tmp_path, size=16, zooms=(0.0, 0.5, 1.0), objects=OBJECTS[:2])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 6
    assert set(rows[0]) == {"image", "text", "object", "thumbnail", "zoom", "group"}
    assert {row["group"] for row in rows} == {"china0", "china1"}
    for row in rows:
        with Image.open(tmp_path / row["image"]) as image:
            assert image.size == (16, 16)
        assert (tmp_path / row["object"]).is_file()
    assert len({tuple(thumbnail(thing)) for thing in OBJECTS}) == len(OBJECTS)
    found = [measured_zoom(np.asarray(Image.open(tmp_path / row["image"]))[None], OBJECTS[0])[0][0] for row in rows[:3]]
    np.testing.assert_allclose(found, [0.0, 0.5, 1.0], atol=0.02)
