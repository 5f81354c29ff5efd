"""A run goes on with the samples that it began with, whatever has become of the data since."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from sana_jax.errors import CheckpointError
from tests.train.data.cache_cases import gray_model, gray_pictures, prepared, run_config
from train.data import CachedData, Loader
from train.data.pinned import DATA, pinned, write_pins
from train.precompute import already_prepared


@pytest.fixture(scope="module")
def gray(tmp_path_factory):
    return gray_model(tmp_path_factory.mktemp("gray"))


@pytest.fixture
def begun(gray, tmp_path):
    """The configuration of a run on six pictures that has a checkpoint, and its data."""
    config = run_config(gray_pictures(tmp_path / "pictures", 6), tmp_path / "cache", flip=True, validation_share=0.3)
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"))
    prepared(config, gray)
    data = CachedData(tmp_path / "cache", config.data)
    (tmp_path / "run").mkdir()
    write_pins(data, tmp_path / "run")
    assert pinned(config.run_dir, DATA) is None  # it would begin anew
    (tmp_path / "run" / "checkpoints" / "4").mkdir(parents=True)
    return config, data


def reopened(config) -> CachedData:
    return CachedData(config.data.cache, config.data, pins=pinned(config.run_dir, DATA))


def test_a_picture_more_one_fewer_and_one_that_has_changed(begun, gray, tmp_path):
    config, data = begun
    loader = Loader(data, seed=0, batch_size=4, rows=(0, 4))
    position = loader.position()
    expected = [next(loader) for _ in range(5)]
    gray_pictures(tmp_path / "pictures", 3, first=6)
    (tmp_path / "pictures" / "p000.png").unlink()
    Image.new("L", (8, 8), 7).save(tmp_path / "pictures" / "p001.png")
    (tmp_path / "pictures" / "p002.txt").write_text("a red one")
    prepared(config, gray)
    with pytest.raises(CheckpointError, match="data position belongs to"):
        Loader(CachedData(config.data.cache, config.data), seed=0, batch_size=4, rows=(0, 4)).restore(position)
    again = Loader(reopened(config), seed=0, batch_size=4, rows=(0, 4))
    again.restore(position)
    for batch in expected:
        for one, other in zip(batch[:3], next(again)[:3]):
            np.testing.assert_array_equal(one, other)
    held_out = [each.validation.batch(np.arange(len(each.validation))).latents for each in (data, reopened(config))]
    np.testing.assert_array_equal(*held_out)
    before = (tmp_path / "run" / DATA).read_bytes()
    write_pins(reopened(config), tmp_path / "run")
    assert (tmp_path / "run" / DATA).read_bytes() == before


def test_the_data_is_not_looked_at_where_the_cache_has_all(begun, gray, tmp_path):
    config, _ = begun
    pins = pinned(config.run_dir, DATA)
    shutil.rmtree(tmp_path / "pictures")
    lines: list[str] = []
    assert already_prepared(config, gray, pins, lines.append) == tmp_path / "cache"
    assert "goes on with the samples that it began with" in lines[0]
    asks = dataclasses.replace(config, preview=dataclasses.replace(config.preview, prompts=("a red two",)))
    assert already_prepared(asks, gray, pins, lines.append) is None
    crops = dataclasses.replace(config, data=dataclasses.replace(config.data, crop="random"))
    assert already_prepared(crops, gray, pins, lines.append) is None
    assert already_prepared(config, gray, None, lines.append) is None
    assert len(lines) == 1
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, cache=str(tmp_path / "gone")))
    assert already_prepared(moved, gray, pins, lines.append) is None
    assert f"there is none at {tmp_path / 'gone'}: it is made anew" in lines[1]


def test_a_cache_that_was_made_again_of_other_pictures(begun, gray, tmp_path):
    config, _ = begun
    shutil.rmtree(tmp_path / "cache")
    Image.new("L", (8, 8), 7).save(tmp_path / "pictures" / "p003.png")
    prepared(config, gray)
    with pytest.raises(CheckpointError, match=r"the run began with p003 as it was then .*start a new run"):
        reopened(config)


@pytest.mark.parametrize("line", ["{", '{"key": "a"}', "[]"])
def test_a_damaged_list(begun, line):
    config, _ = begun
    path = pinned(config.run_dir, DATA)
    path.write_text(f"{path.read_text().splitlines()[0]}\n{line}\n")
    with pytest.raises(CheckpointError, match=r"data\.jsonl is damaged in line 2"):
        reopened(config)
