"""What was encoded is encoded anew when any file that it is made of has changed, and not otherwise."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.train.data.cache_cases import gray_model, gray_pictures, prepared, run_config
from train.data import CachedData
from train.data.cache import CacheWriter
from train.data.stamps import stamp


@pytest.fixture(scope="module")
def gray(tmp_path_factory):
    return gray_model(tmp_path_factory.mktemp("gray"))


def picture(path: Path, number: int) -> None:
    """Two pictures with the same header and the same size in bytes."""
    pixels = np.zeros((80, 80), np.uint8)
    pixels[40, 40] = number
    Image.fromarray(pixels).save(path, "BMP")


def control(path: Path, number: int) -> None:
    Image.new("L", (8, 8), number).save(path)


def vector(path: Path, number: int) -> None:
    np.save(path, np.full(5, number, np.float32))


def latents(path: Path, number: int) -> None:
    np.savez(path, z=np.full((1, 8, 8), number, np.float32))


@pytest.mark.parametrize(
    ("write", "name", "column", "condition"),
    [
        (picture, "p000.png", "", ()),
        (control, "edges.png", "control", ("control=picture",)),
        (vector, "object.npy", "object", ("object=vector",)),
        (latents, "p000.npz", "", ()),
    ],
)
def test_a_file_that_is_written_anew_is_read_anew(gray, tmp_path, write, name, column, condition):
    folder, features = tmp_path / "pictures", name.endswith(".npz")
    folder.mkdir()
    if not features:
        gray_pictures(folder, 1)
    (folder / "p000.txt").write_text("a one")
    write(folder / name, 1)
    if column:
        row = f'{{"file_name": "p000.png", "text": "a one", "{column}": "{name}"}}'
        (folder / "metadata.jsonl").write_text(row)
    options = {"format": "features"} if features else {"conditions": condition}
    config = run_config(folder, tmp_path / "cache", **options)
    times = os.stat(folder / name)
    for number, changes in ((1, False), (2, True), (2, False)):
        write(folder / name, number)
        os.utime(folder / name, ns=(times.st_atime_ns, times.st_mtime_ns))
        _, lines = prepared(config, gray)
        assert any("1 pictures have changed" in line for line in lines) == changes, lines


def test_until_it_is_finished_again_a_cache_is_what_its_list_says(gray, tmp_path, monkeypatch):
    folder = gray_pictures(tmp_path / "pictures", 3)
    config = run_config(folder, tmp_path / "cache")
    prepared(config, gray)
    before = CachedData(tmp_path / "cache", config.data).batch(np.arange(3))
    picture(folder / "p001.png", 7)
    (folder / "p001.txt").write_text("a red nine")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write_samples", killed)
        with pytest.raises(KeyboardInterrupt):
            prepared(config, gray)
    # the new picture is there, its new caption is not yet the picture's
    for one, other in zip(before[:3], CachedData(tmp_path / "cache", config.data).batch(np.arange(3))[:3]):
        np.testing.assert_array_equal(one, other)
    prepared(config, gray)
    after = CachedData(tmp_path / "cache", config.data).batch(np.arange(3))
    assert np.abs(after.latents[1] - before.latents[1]).max() > 0
    assert np.abs(after.prompt_embeds[1] - before.prompt_embeds[1]).max() > 0


def test_stamps_of_large_files():
    data = bytearray(np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes())
    stamps = {stamp(io.BytesIO(data))}
    for place in (0, len(data) - 1, len(data) // 7 * 3):
        data[place] ^= 1
        stamps.add(stamp(io.BytesIO(data)))
    stamps |= {stamp(io.BytesIO(data[:-1])), stamp(io.BytesIO(data), "more")}
    assert len(stamps) >= 5
    assert stamp(io.BytesIO(data)) == stamp(io.BytesIO(bytes(data)))
