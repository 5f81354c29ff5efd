"""Pictures as files."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sana_jax.errors import UserError
from sana_jax.images import automatic_enlargement, enlarge_image, image_grid, save_png, to_pil


def test_modes_rounding_and_clamping():
    gray = to_pil(np.array([[[0.0], [1.0]], [[-3.0], [0.5]]], np.float32))
    assert gray.mode == "L"
    np.testing.assert_array_equal(np.asarray(gray), [[0, 255], [0, 128]])
    colour = to_pil(np.full((2, 3, 3), 2.0))
    assert (colour.mode, colour.size) == ("RGB", (3, 2))
    with pytest.raises(UserError, match="not finite"):
        to_pil(np.full((2, 2, 1), np.nan))
    with pytest.raises(UserError, match="shape"):
        to_pil(np.zeros((2, 2, 2)))


def test_png_with_metadata_and_enlargement(tmp_path):
    pixels = np.arange(6, dtype=np.float32).reshape(2, 3, 1) / 5
    path = save_png(
        tmp_path / "new" / "out.png", pixels, enlarge=3, metadata={"prompt": "sieben – 七", "seed": 4, "none": None}
    )
    with Image.open(path) as image:
        assert image.text == {"prompt": "sieben – 七", "seed": "4"}
        assert (image.mode, image.size) == ("L", (9, 6))
        np.testing.assert_array_equal(np.asarray(image)[::3, ::3], np.round(pixels[..., 0] * 255))
        np.testing.assert_array_equal(np.asarray(image)[1::3, 2::3], np.round(pixels[..., 0] * 255))
    assert [entry.name for entry in path.parent.iterdir()] == ["out.png"]


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = save_png(tmp_path / "out.png", np.zeros((2, 2, 1)))
    before = path.read_bytes()

    def fail(self, file, **_):
        file.write(b"half")
        raise RuntimeError("disk")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(RuntimeError):
        save_png(path, np.ones((2, 2, 1)))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.png"]


def test_names_that_are_not_allowed(tmp_path):
    with pytest.raises(UserError, match=r"ends in \.png: try .*out\.png"):
        save_png(tmp_path / "out.jpg", np.zeros((2, 2, 1)))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        save_png(tmp_path / "folder.png", np.zeros((2, 2, 1)))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_png(tmp_path / "file" / "out.png", np.zeros((2, 2, 1)))


def test_automatic_enlargement():
    assert [automatic_enlargement(*size) for size in ((8, 8), (64, 200), (128, 128), (1024, 1024), (100, 30))] == [
        16, 2, 1, 1, 5,
    ]  # fmt: skip
    with pytest.raises(UserError, match="enlarge 0"):
        enlarge_image(Image.new("L", (2, 2)), 0)


def test_grid_places_every_picture():
    images = [Image.new("L", (10, 8), value) for value in (10, 20, 30, 40, 50)]
    sheet = image_grid(images, columns=3, margin=2)
    assert (sheet.mode, sheet.size) == ("L", (3 * 14, 2 * 12))
    pixels = np.asarray(sheet)
    for index, value in enumerate((10, 20, 30, 40, 50)):
        assert pixels[12 * (index // 3) + 6, 14 * (index % 3) + 7] == value
    assert pixels[18, 35] == 255  # the place of a sixth
    assert image_grid(images).size == image_grid(images, 3).size


def test_grid_labels_widen_cells():
    images = [Image.new("RGB", (8, 8), (0, 0, 255))] * 2
    plain, labelled = image_grid(images, 2), image_grid(images, 2, ["a handwritten seven", "b"])
    assert labelled.mode == "RGB"
    assert labelled.width > plain.width + 100
    assert labelled.height > plain.height
    text = np.asarray(labelled)[20:].astype(int)
    assert (text.sum(axis=-1) < 200).sum() > 50
    with pytest.raises(UserError, match="labels"):
        image_grid(images, 2, ["a"])
    with pytest.raises(UserError, match="grid"):
        image_grid([])
    with pytest.raises(UserError, match="sizes"):
        image_grid([images[0], Image.new("RGB", (9, 8))])
    with pytest.raises(UserError, match="columns 0"):
        image_grid(images, 0)
