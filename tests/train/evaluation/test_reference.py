"""Folders of pictures and files of features; records."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from sana_jax.errors import UserError
from train.evaluation.distances import fit_gaussian
from train.evaluation.features import FeatureFunction, load_features, pixel_features
from train.evaluation.record import append_record, make_record
from train.evaluation.reference import (
    FolderPictures,
    Reference,
    captions_beside,
    load_reference,
    read_features,
    save_features,
)

FUNCTION = FeatureFunction("pixels 4x4 RGB", lambda pictures: pixel_features(pictures, 4))


def photograph(seed: int, size=(40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for index in range(12):
        photograph(index, (20 + index, 30)).save(folder / ("deep" if index % 2 else "") / f"{index:02d}.png")
    return folder


def test_a_folder_of_any_nesting_and_sizes(folder, capsys):
    Image.new("L", (8, 8), 100).save(folder / "zz tiny.png")
    photograph(3).convert("CMYK").save(folder / "zz.JPG")
    photograph(4).save(folder / "zz.tif")  # every kind that training reads
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    pictures = list(FolderPictures(folder))
    assert len(pictures) == 15
    assert {picture.mode for picture in pictures} == {"RGB"}
    reference = load_reference(str(folder), FUNCTION, ())
    assert reference.features.shape == (15, 48)
    np.testing.assert_allclose(reference.features, pixel_features(pictures, 4), rtol=1e-6)
    np.testing.assert_allclose(reference.gaussian.mean, reference.features.mean(axis=0), rtol=1e-5)


def test_pictures_that_cannot_be_read(folder, capsys):
    (folder / "bad.png").write_bytes(b"no picture")
    assert len(list(FolderPictures(folder))) == 12
    out = capsys.readouterr().out
    assert "skipped" in out
    assert "bad.png" in out
    assert "1 of 13 pictures" in out
    (folder / "worse.webp").write_bytes(b"no picture")
    with pytest.raises(UserError, match="2 of 14 pictures"):
        list(FolderPictures(folder))
    (folder.parent / "empty").mkdir()
    with pytest.raises(UserError, match="has no pictures"):
        FolderPictures(folder.parent / "empty")


def test_captions(folder):
    assert captions_beside(folder) == []
    for path in FolderPictures(folder).paths:
        path.with_suffix(".txt").write_text(f" caption of {path.stem}\n")
    found = captions_beside(folder)
    assert len(found) == 12
    assert found == [f"caption of {path.stem}" for path in FolderPictures(folder).paths]


def test_files_of_features(tmp_path, capsys):
    features = np.random.default_rng(0).standard_normal((9, 48)).astype(np.float32)
    reference = Reference("photos", 9, features, fit_gaussian(features))
    save_features(tmp_path / "a.npz", reference, FUNCTION)
    found = read_features(tmp_path / "a.npz", FUNCTION)
    np.testing.assert_array_equal(found.features, features)
    np.testing.assert_array_equal(found.gaussian.covariance, reference.gaussian.covariance)
    assert found.count == 9
    assert capsys.readouterr().out == ""
    # as others write them: without the function's name
    np.savez(tmp_path / "b.npz", mu=reference.gaussian.mean, sigma=reference.gaussian.covariance)
    found = read_features(tmp_path / "b.npz", FUNCTION)
    assert (found.count, found.features) == (None, None)
    np.testing.assert_array_equal(found.gaussian.mean, reference.gaussian.mean)
    assert "does not say which function" in capsys.readouterr().out
    np.save(tmp_path / "c.npy", features)
    found = read_features(tmp_path / "c.npy", FUNCTION)
    np.testing.assert_array_equal(found.gaussian.mean, features.astype(np.float64).mean(axis=0))

    with pytest.raises(UserError, match="choose the same"):
        read_features(tmp_path / "a.npz", load_features("pixels:8"))
    (tmp_path / "d.npz").write_bytes(b"PK damaged")
    with pytest.raises(UserError, match="is damaged"):
        read_features(tmp_path / "d.npz", FUNCTION)
    np.save(tmp_path / "e.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match="is damaged"):
        read_features(tmp_path / "e.npy", FUNCTION)
    np.savez(tmp_path / "f.npz", other=features)
    with pytest.raises(UserError, match="has other"):
        read_features(tmp_path / "f.npz", FUNCTION)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_features_in_parts_and_by_name():
    pictures = [photograph(seed) for seed in range(70)]
    calls = []

    def compute(part):
        calls.append(len(part))
        return pixel_features(part, 2)

    found = FeatureFunction("two", compute)(iter(pictures))
    assert calls == [64, 6]
    np.testing.assert_array_equal(found, pixel_features(pictures, 2))
    assert load_features("pixels").name == "pixels 32x32 RGB"
    with pytest.raises(UserError, match="features 'inception' are not allowed; choose pixels"):
        load_features("inception")
    with pytest.raises(UserError, match="no pictures"):
        FUNCTION([])


def test_pixels_of_a_gray_picture_are_its_own():
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    found = pixel_features([Image.fromarray(pixels)], 8).reshape(8, 8, 3)
    np.testing.assert_allclose(found, np.repeat(pixels[..., None], 3, -1) / 255, rtol=1e-6)


def test_records_are_added_line_by_line(tmp_path):
    path = tmp_path / "new" / "evaluations.jsonl"
    append_record(path, make_record("fid", 1.5, {"by": {3: 0.5}, "none": float("nan")}, {"seed": 0, "lora": None}))
    with path.open("a") as file:
        file.write('{"metric": "by hand"}')  # without a line's end
    append_record(path, {"metric": "kid"})
    first, hand, last = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["value"], first["seed"], first["details"]) == (1.5, 0, {"by": {"3": 0.5}, "none": None})
    assert "lora" not in first
    assert {"jax", "python", "sana_jax"} <= first["versions"].keys()
    assert (hand["metric"], last["metric"]) == ("by hand", "kid")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        append_record(tmp_path / "file" / "x.jsonl", {})
