"""A folder with damage of every kind: what can be used is, everything else is named once, and nothing stops."""

from __future__ import annotations

import os
import unicodedata

import numpy as np
import pytest

from configs.data import ImageDataConfig
from sana_jax.errors import UserError
from tests.train.data.damage import make_damaged_folder, pixels
from train.data.decoding import BadPicture, decode_picture, read_header
from train.data.records import shown
from train.data.source import open_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "pictures"
    return path, make_damaged_folder(path)


@pytest.fixture(scope="module")
def opened(folder):
    lines: list[str] = []
    config = ImageDataConfig(path=str(folder[0]), max_bad_share=0.5, missing_captions="empty")
    return open_source(config, lines.append), lines


def key_of(name: str) -> str:
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return shown(unicodedata.normalize("NFC", text if name.startswith("good.") else os.path.splitext(text)[0]))


def test_there_are_forty_kinds(folder):
    assert len(folder[1]) >= 40


def test_every_file_is_where_it_belongs(folder, opened):
    made, (source, _) = folder[1], opened
    expected = {key_of(name) for name, damage in made.items() if damage.outcome in ("used", "pixels")}
    assert {record.key for record in source.records} == expected
    problems = [problem.name for problem in source.problems]
    assert sorted(problems) == sorted(shown(name) for name, damage in made.items() if damage.outcome == "header")


def test_pixels(folder, opened):
    made, (source, _) = folder[1], opened
    by_key = {key_of(name): damage for name, damage in made.items()}
    for record in source.records:
        damage = by_key[record.key]
        if damage.outcome == "pixels":
            with pytest.raises(BadPicture) as caught:
                decode_picture(source.read(record), name=record.key, channels=3)
            assert str(caught.value).startswith(record.key)
            continue
        for channels in (1, 3):
            picture = decode_picture(source.read(record), name=record.key, channels=channels)
            assert picture.shape == (*record.size, channels), damage
            assert picture.dtype == np.uint8


@pytest.mark.parametrize("name", ["cmyk", "16bit", "sixteen", "float", "rotated", "mirrored", "animated"])
def test_the_right_pixels(folder, name):
    path = next(each for each in folder[0].iterdir() if each.name.startswith(name) and each.suffix != ".txt")
    expected = pixels().astype(float)
    if path.stem in ("16bit", "sixteen", "float"):
        expected = np.repeat(pixels(channels=1), 3, -1).astype(float)
    expected = {"rotated": np.rot90(expected, -1), "mirrored": expected[:, ::-1]}.get(path.stem, expected)
    found = decode_picture(path.read_bytes(), name=path.name, channels=3)
    assert found.shape == expected.shape
    # JPEG and palettes lose a little; a picture that stands on its head differs by far more
    assert np.abs(found - expected).mean() < 6


def test_captions(folder, opened):
    made, (source, _) = folder[1], opened
    for name, damage in made.items():
        record = next((each for each in source.records if each.key == key_of(name)), None)
        if record is not None:
            assert [caption.text for caption in record.captions] == [damage.caption or ""], name


def test_everything_is_said_once(folder, opened):
    made, (_, lines) = folder[1], opened
    assert all(line.isprintable() for line in lines)
    left_out = [line for line in lines if line.startswith("data: left out: ")]
    for name, damage in made.items():
        if damage.outcome == "header":
            assert sum(f"left out: {shown(name)} " in line for line in left_out) == 1, name
    for part in (
        "hidden or system files",
        "of kinds that are not read",
        "phone.heic",
        "other files are left out",
        "captions have no picture",
        "lonely.txt",
        "1 names belong to several pictures",
        "not UTF-8 and read as Windows-1252: caption_latin.txt",
        "read as UTF-16: caption_utf16.txt",
        "met again through links",
        "png_named.jpg is PNG",
        "rotated or mirrored",
        "several frames",
        "put on white",
        "more than 8 bits",
        "CMYK",
        "without a caption get an empty one",
    ):
        assert any(part in line for line in lines), part


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.jpg", "is empty"),
        ("text.jpg", "is not a picture"),
        ("bomb.png", "pixels"),
        ("one_pixel.png", "has 1x1 pixels; 2 or more"),
        ("loop.jpg", "can't be read"),
        ("nowhere.jpg", "is a link to nothing"),
        ("pipe.jpg", "is not a file"),
    ],
)
def test_reasons(opened, name, reason):
    problem = next(problem for problem in opened[0].problems if problem.name == name)
    assert reason in problem.reason


def test_a_bad_picture_survives_a_process_boundary():
    import pickle

    error = pickle.loads(pickle.dumps(BadPicture("a.jpg", "is empty")))
    assert (str(error), error.name, error.reason) == ("a.jpg is empty", "a.jpg", "is empty")


def test_too_many_bad_files_stop_with_one_line(folder):
    with pytest.raises(UserError) as caught:
        open_source(ImageDataConfig(path=str(folder[0]), max_bad_share=0.05), lambda line: None)
    message = str(caught.value)
    assert "--data.max-bad-share allows a share of 0.05" in message
    assert "empty.jpg is empty" in message
    assert "\n" not in message


def test_missing_captions_stop_with_the_first_names(folder):
    with pytest.raises(UserError, match=r"3 of .* have no caption: .*caption_zero.*--data.caption"):
        open_source(ImageDataConfig(path=str(folder[0]), max_bad_share=0.5), lambda line: None)


def test_pictures_that_are_too_large(tmp_path):
    from tests.train.data.damage import bomb

    (tmp_path / "bomb.png").write_bytes(bomb())
    with open(tmp_path / "bomb.png", "rb") as file, pytest.raises(BadPicture, match="most that are read"):
        read_header(file, name="bomb.png")
    with pytest.raises(BadPicture, match="most that are read"):
        decode_picture(bomb(), name="bomb.png", channels=3)
