"""Pictures as files."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sana_jax.errors import UserError
from sana_jax.images import (
    automatic_enlargement,
    enlarge_image,
    image_grid,
    labelled_table,
    save_gif,
    save_png,
    strip,
    to_pil,
)


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


def test_strip():
    images = [Image.new("L", (140, 30), value) for value in (10, 90, 200)]
    labels = ["step 1", "step 2", "step 3"]
    across, down = np.asarray(strip(images, labels)), np.asarray(strip(images, labels, vertical=True))
    assert (across == 90).sum() >= 140 * 30
    assert across.shape[1] == 3 * 148
    assert down.shape[1] == 148
    assert [np.argmax((down == value).sum(axis=1) >= 140) for value in (10, 90, 200)] == sorted(
        np.argmax((down == value).sum(axis=1) >= 140) for value in (10, 90, 200)
    )
    with pytest.raises(UserError, match="labels"):
        strip(images, labels[:2])
    with pytest.raises(UserError, match="grid"):
        strip([], [])


def test_labelled_table():
    """Pictures stand in their row and column, whatever their sizes and their labels' lengths; one place is empty."""
    rows = [[Image.new("L", (20, 10), 10), None], [Image.new("L", (30, 40), 60), Image.new("L", (8, 8), 90)]]
    long = "a long prompt of many words that does not fit into one line beside the pictures"
    table = labelled_table(rows, [long, "b\nseed 1"], ["step 1", "step 2\nguidance 4.5"])
    pixels = np.asarray(table)
    places = {}
    for value, size in {10: 200, 60: 1200, 90: 64}.items():
        block = np.zeros_like(pixels, bool)
        found = np.argwhere(pixels == value)
        top, left = np.median(found, axis=0)
        block[pixels == value] = True
        assert block.sum() >= size
        places[value] = top, left
    assert places[10][0] < places[60][0]
    assert abs(places[60][1] - places[10][1]) < 20
    assert places[90][1] > places[60][1]
    assert table.width < 900  # the long label is wrapped
    coloured = labelled_table([[Image.new("RGB", (4, 4), (1, 2, 3))]], ["r"], ["c"])
    assert (coloured.mode, coloured.getpixel((0, 0))) == ("RGB", (255, 255, 255))
    with pytest.raises(UserError, match="one label for every row"):
        labelled_table(rows, ["a"], ["1", "2"])
    with pytest.raises(UserError, match="without pictures"):
        labelled_table([[None]], ["a"], ["1"])


def test_gif(tmp_path, monkeypatch):
    frames = [Image.new("RGB", (12, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    path = save_gif(tmp_path / "new" / "moving.gif", frames, 120, comment="steps 1 2 3")
    with Image.open(path) as moving:
        assert (moving.n_frames, moving.size, moving.info["loop"]) == (3, (12, 8), 0)
        assert moving.info["comment"] == b"steps 1 2 3"
        for index, frame in enumerate(frames):
            moving.seek(index)
            assert moving.info["duration"] == 120
            np.testing.assert_array_equal(np.asarray(moving.convert("RGB")), np.asarray(frame))
    gray = save_gif(tmp_path / "gray.gif", [Image.new("L", (3, 3), value) for value in (7, 8)])
    with Image.open(gray) as moving:
        assert np.asarray(moving.convert("L")).tolist() == [[7] * 3] * 3
    before = path.read_bytes()

    def fail(self, file, **_):
        file.write(b"half")
        raise RuntimeError("disk")

    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", fail)
        with pytest.raises(RuntimeError):
            save_gif(path, frames[:1])
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["moving.gif"]
    for arguments, message in {
        (tmp_path / "x.png",): r"ends in \.gif",
        (tmp_path / "x.gif", 15): "15 milliseconds",
        (tmp_path / "x.gif", 0): "0 milliseconds",
    }.items():
        with pytest.raises(UserError, match=message):
            save_gif(arguments[0], frames, *arguments[1:])
    for bad in ([], [frames[0], Image.new("RGB", (5, 5))]):
        with pytest.raises(UserError, match="of one size"):
            save_gif(tmp_path / "x.gif", bad)
