"""``train.main`` on a folder with everything that users' folders hold: what can be used is trained, the rest named."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from tests.train.data.cache_cases import published_model
from tests.train.data.damage import Damage, make_damaged_folder
from tests.train.run_training import (
    cache_directory,
    call,
    in_this_process,
    left_behind,
    made_once,
    rows,
    shared_directory,
    the_error,
)
from train.data.cache import CacheReader
from train.data.records import shown

STEPS = 3


@pytest.fixture
def here(tmp_path_factory):
    with in_this_process(cache_directory(tmp_path_factory)):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights; its text encoder reads any caption, cut to its length."""
    return made_once(shared_directory(tmp_path_factory) / "published", published_model)


@pytest.fixture
def damaged(tmp_path) -> tuple[Path, dict[str, Damage]]:
    folder = tmp_path / "pictures"
    return folder, make_damaged_folder(folder)


def options(model: Path, folder: Path, run_dir: Path) -> list[str]:
    return [
        *("lora", "--model", str(model), "--data.path", str(folder), "--run-dir", str(run_dir)),
        *("--steps", f"{STEPS}", "--batch-size", "2", "--compute.dtype", "float32", "--compute.remat", "none"),
        *("--logging.every", "1", "--logging.no-tensorboard", "--preview.every", "0"),
    ]


def names_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def key_of(name: str) -> str:
    """What a line calls the picture, or the file where that is not one."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return shown(unicodedata.normalize("NFC", text if name.startswith("good.") else os.path.splitext(text)[0]))


@pytest.mark.prove
def test_it_trains_and_names_each_skipped_file_once(here, model, damaged, tmp_path, capfd):
    folder, made = damaged
    before, run_dir = names_below(folder), tmp_path / "runs" / "run"
    lenient = ["--data.max-bad-share", "0.5", "--data.missing-captions", "empty"]
    status, out, err = call(capfd, *options(model, folder, run_dir), *lenient)
    assert status == 0, err
    assert "Traceback" not in err
    assert len(rows(run_dir)) == STEPS

    lines = [line for line in out.splitlines() if line.removeprefix("data: ").startswith("left out: ")]
    bad = {name: damage.outcome for name, damage in made.items() if damage.outcome in ("header", "pixels")}
    for name, outcome in bad.items():
        begins = f"data: left out: {shown(name)} " if outcome == "header" else f"left out: {key_of(name)} "
        assert sum(line.startswith(begins) for line in lines) == 1, name
    in_pixels = list(bad.values()).count("pixels")
    assert f"left out: {in_pixels} pictures, each named above" in lines
    assert len(lines) == len(bad) + 1, lines

    used = {key_of(name) for name, damage in made.items() if damage.outcome == "used"}
    (cache,) = (run_dir.parent / "cache").iterdir()
    assert {sample["key"] for sample in CacheReader(cache).samples()} == used
    assert f"data: {len(used)} pictures from the cache {cache}" in out

    assert names_below(folder) == before
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "runs"}
    assert {path.name for path in run_dir.parent.iterdir()} == {"cache", "run"}
    assert left_behind(tmp_path) == []


def test_too_many_bad_files_stop_it(here, model, damaged, tmp_path, capfd):
    folder, _ = damaged
    before = names_below(folder)
    status, out, err = call(capfd, *options(model, folder, tmp_path / "runs" / "run"))
    assert status == 2
    line = the_error(err)
    assert "--data.max-bad-share" in line
    assert "compiling" not in out
    assert names_below(folder) == before
    assert {path.name for path in tmp_path.iterdir()} == {"pictures"}


def test_pictures_without_a_caption_stop_it(here, model, damaged, tmp_path, capfd):
    folder, _ = damaged
    status, out, err = call(capfd, *options(model, folder, tmp_path / "runs" / "run"), "--data.max-bad-share", "0.5")
    assert status == 2
    line = the_error(err)
    assert "--data.missing-captions" in line
    assert "compiling" not in out
    assert {path.name for path in tmp_path.iterdir()} == {"pictures"}
