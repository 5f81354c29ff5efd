"""What ``python -m train.inspect_data`` reports, what it writes, and how it fails."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from sana_jax.errors import UserError
from tests.train.data.damage import encoded, make_damaged_folder, pixels
from train.inspect_data import main


def report(capsys, *arguments: object) -> str:
    """What is printed; its exit status is 1 where it says that training would stop, and 0 elsewhere."""
    status = main([str(each) for each in arguments])
    text = capsys.readouterr().out
    assert status == ("training would stop" in text)
    return text


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "pictures"
    return path, make_damaged_folder(path)


@pytest.fixture
def photos(tmp_path):
    path = tmp_path / "photos"
    path.mkdir()
    rows = []
    for index in range(12):
        (path / f"{index}.png").write_bytes(encoded(pixels(30, 30 if index < 10 else 90, seed=index), "PNG"))
        rows.append(
            {
                "file_name": f"{index}.png",
                "captions": ["short", f"a longer one, number {index}"][: 1 + index % 2],
                "zoom": index / 10,
                "object": f"thing {index // 4}",
                "bright": index > 5,
            }
        )
    (path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_a_damaged_folder(capsys, damaged):
    path, made = damaged
    text = report(capsys, path)
    used = sum(damage.outcome == "used" for damage in made.values())
    bad = [name for name, damage in made.items() if damage.outcome in ("header", "pixels")]
    assert f"usable: {used} of {used + len(bad)}" in text
    for name in bad:
        assert text.count(f"\nunusable: {name} ") == 1
    assert "same name: good.jpg, good.png, good.webp" in text
    assert "without a caption: 3: caption_blank, caption_folder, caption_zero" in text
    assert f"training would stop: {len(bad)} of {used + len(bad)} files are unusable, --max-bad-share" in text
    assert "training would stop: 3 of " in text
    assert "--data." not in text


def test_headers_alone(capsys, damaged):
    text = report(capsys, damaged[0], "--no-check-pixels", "--missing-captions", "empty", "--max-bad-share", 1)
    assert "truncated.jpg" not in text
    assert "unusable: empty.jpg is empty" in text
    assert "training would stop" not in text


def test_numbers(capsys, photos):
    text = report(capsys, photos, "--resolution", 512, "--batch-size", 4, "--group-column", "object")
    for line in (
        f"{photos}: manifest metadata.jsonl",
        "usable: 12 of 12",
        "height: 30 to 30, median 30 px",
        "width: 30 to 90, median 30 px",
        "height / width: 0.33 to 1.00, median 1.00",
        "    512x512      10 ##############################",
        "    288x864       2 ######  rare: fewer than --batch-size 4",
        "rare sizes merged into their neighbours: 2 of 288x864 to 512x512",
        "captions: 18, 7 different",
        "words in a caption: 1 to 5, median 1",
        "pictures with several captions: 6; kinds: caption 18",
        "column zoom: numbers from 0 to 1.1",
        "column object: texts, 3 different, such as 'thing 0'",
        "column bright: 6 true, 6 false",
        "groups: 3, of 4 to 4 pictures",
    ):
        assert f"{line}\n" in text


def test_choices_and_conditions(capsys, photos):
    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().split("\n")]
    for row in rows:
        row["captions"] = {"prompt": "a", "llava": "b"}
    (photos / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    choice = ["--caption-choice", "proportion", "--proportions"]
    text = report(capsys, photos, *choice, "prompt=1", "llava=3", "--conditions", "zoom=scalar", "edge=canny", "--flip")
    assert "captions by --caption-choice proportion: prompt 25%, llava 75%\n" in text
    assert "condition zoom=scalar: 12 of 12 samples have zoom\n" in text
    assert "condition edge=canny: 12 of 12 samples have a picture that it is drawn from\n" in text
    assert "variants of each picture: 2" in text
    assert "training would stop" not in text
    text = report(capsys, photos, *choice, "prompt=1", "--conditions", "bright=picture", "far=vector")
    assert "condition far=vector: 0 of 12 samples have far\n" in text
    assert "training would stop: 12 of 12 files are unusable" in text
    assert "0 has no far" in text
    text = report(capsys, photos, *choice, "other=1")
    assert "training would stop: a picture has captions of kind prompt, llava" in text


def test_inputs_of_conditions_that_cannot_be_read(capsys, photos):
    """They are named, as training names them, and end what they would end there."""
    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().split("\n")]
    good = rows[0]["file_name"]

    def written(**changes) -> list[str]:
        table = [{**row, "edges": good, "far": [0.5, 1.0]} for row in rows]
        table[1] |= changes
        (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
        text = report(capsys, photos, "--max-bad-share", "0", "--conditions", "edges=picture", "far=vector")
        return [line for line in text.splitlines() if line.startswith(("left out: ", "training would stop: "))]

    assert written() == []
    (photos / "notes.txt").write_text("no picture")
    for changes, reason in (
        ({"edges": "gone.png"}, "gone.png is missing"),
        ({"edges": "notes.txt"}, "left out: 1 (edges) is not a picture of a known format"),
        ({"far": [[1.0, 2.0], [3.0, 4.0]]}, "has far of shape (2, 2); a vector is needed"),
        ({"far": None}, "has no far"),
    ):
        left_out, stop = written(**changes)
        assert left_out.startswith("left out: ")
        assert left_out.endswith(reason)
        assert stop.startswith("training would stop: 1 of 12 files are unusable")
    (stop,) = written(edges=3)
    assert stop.startswith("training would stop: column 'edges' of ")


def test_the_split(capsys, photos):
    text = report(capsys, photos, "--group-column", "object", "--validation-share", 0.4)
    training = int(text.split("split: ")[1].split()[0])
    assert training % 4 == 0
    assert f"split: {training} to train, {12 - training} to validate" in text


def test_features(capsys, tmp_path):
    np.savez(tmp_path / "a.npz", caption_feature=np.zeros((1, 3, 5), np.float16))
    (tmp_path / "a.txt").write_text("a caption")
    text = report(capsys, tmp_path)
    assert "features: beside 1 samples; a has caption_feature float16[1, 3, 5]" in text


def test_a_contact_sheet_and_nothing_else(capsys, photos, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    sheet = tmp_path / "sheet.png"
    text = report(capsys, photos, "--contact-sheet", sheet)
    assert f"contact sheet: {sheet}" in text
    assert sorted(tmp_path.rglob("*")) == sorted([*before, sheet])
    with Image.open(sheet) as picture:
        assert picture.width > 4 * 160
        assert picture.height > 3 * 160


@pytest.mark.parametrize(
    ("words", "has", "lacks"),
    [
        ([], ["--conditions", "--clips --help"], ["--cache", "--latent-dtype", "--axes"]),
        (["--cameras"], ["--cameras", "--axes"], ["--cache", "--latent-dtype", "--joint-pictures"]),
        (["--format", "zip_latents"], ["--short-clips"], ["--cache", "--contact-sheet"]),
    ],
)
def test_help_lists_what_is_read(capsys, words, has, lacks):
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    text = capsys.readouterr().out
    assert [name for name in has if name not in text] == []
    assert [name for name in lacks if name in text] == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "--path nowhere does not exist"),
        ([], "--path is missing"),
        ([".", "--resolution", "100"], "--resolution 100 is not allowed"),
        (["--contact-sheet", "a.jpg"], "'a.jpg' is not allowed; a picture's name ends in .png"),
        (["--batch-size", "0"], "--batch-size 0 is not allowed"),
        (["--crops", "2"], "--crops 2 is not allowed; allowed is 1 where --crop is center"),
        (["--cache", "a"], "unknown option --cache; it is for training, and nothing is prepared here"),
        (["--latent-dtype", "float32"], "unknown option --latent-dtype; it is for training"),
        (["--conditions", "control=cany"], "--conditions control=cany: there is no kind 'cany'; choose one of scalar,"),
        (["--caption", " "], "--caption ' ' is not allowed; allowed is a text; pictures and clips without a caption"),
        (["--colour", "red"], "unknown option --colour"),
    ],
)
def test_mistakes_are_one_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(encoded(pixels(), "PNG"))
    with pytest.raises((UserError, FileNotFoundError)) as caught:
        main(arguments)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match="has no picture that can be used"):
        main([str(tmp_path)])
