from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sana_jax.errors import UserError
from train.data.digits import load_images
from train.example_pictures import STYLES, ExampleConfig, main, write_example


def pictures(folder) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path), np.int64) for path in sorted(folder.glob("*.png"))])


def test_threes_dark_on_light_with_captions(tmp_path, capsys):
    assert main([str(tmp_path / "pictures")]) == 0
    assert "8 pictures" in capsys.readouterr().out
    found = pictures(tmp_path / "pictures")
    images, labels = load_images(tuple(range(10)))
    expected = np.round((1 - (images[labels == 3][:8, ..., 0] / 2 + 0.5)) * 255)
    np.testing.assert_array_equal(found, expected)
    texts = [path.read_text() for path in (tmp_path / "pictures").glob("*.txt")]
    assert texts == ["a handwritten three\n"] * 8


def test_all_digits_moved(tmp_path):
    config = ExampleConfig(str(tmp_path / "a"), digits=(1, 7), count=0, style="moved", caption="one {digit}")
    _, labels = load_images((1, 7))
    assert write_example(config) == len(labels)
    assert len(pictures(tmp_path / "a")) == len(labels)
    assert {path.read_text() for path in (tmp_path / "a").glob("*.txt")} == {"one one\n", "one seven\n"}


def test_styles():
    image = np.zeros((8, 8, 1), np.float32)
    image[:, 3:5] = 1
    shapes = {name: style(image, np.random.default_rng(0)).shape for name, style in STYLES.items()}
    assert shapes == {**dict.fromkeys(STYLES, (8, 8, 1)), "placed": (12, 12, 1)}
    starts = {int(np.flatnonzero(STYLES["moved"](image, np.random.default_rng(n))[0])[0]) for n in range(40)}
    assert starts == {1, 2, 3, 4, 5}


def test_copies_are_placed_differently_and_alike_again(tmp_path, capsys):
    for name in ("a", "b"):
        words = ["--style", "placed", "--digits", "3", "4", "--count", "5", "--copies", "6"]
        assert main([str(tmp_path / name), *words]) == 0
        assert f"{name}: 60 pictures of 12x12 pixels" in capsys.readouterr().out
    found = pictures(tmp_path / "a").reshape(10, 6, 12, 12)
    np.testing.assert_array_equal(found.reshape(60, 12, 12), pictures(tmp_path / "b"))
    assert all(len(np.unique(of_one, axis=0)) > 3 for of_one in found)  # of 25 places
    assert (found.sum((2, 3)) == found[:, :1].sum((2, 3))).all()  # nothing is cut off
    assert main([str(tmp_path / "one"), "--style", "placed", "--digits", "3", "4", "--count", "5"]) == 0
    np.testing.assert_array_equal(pictures(tmp_path / "one"), found[:, 0])


def test_mistakes(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="has something in it already"):
        main([str(tmp_path)])
    for words, message in (
        (["--digits", "10"], "--digits 10 is not allowed; choose one or more of 0 to 9"),
        (["--count", "-1"], "--count -1"),
        (["--style", "loud"], "loud"),
        (["--copies", "0"], "--copies 0 is not allowed; choose 1"),
        (["--copies", "2", "--style", "striped"], "--copies 2 is not allowed; choose 1, or more with --style moved"),
    ):
        with pytest.raises(UserError, match=message):
            main([str(tmp_path / "new"), *words])
    assert not (tmp_path / "new").exists()
