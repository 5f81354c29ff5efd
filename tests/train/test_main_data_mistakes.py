"""Mistakes with pictures, models and caches: one line that says what and what next, and nothing half-written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.train.data.cache_cases import gray_model
from tests.train.run_training import (
    cache_directory,
    call,
    in_this_process,
    left_behind,
    made_once,
    run,
    saved_steps,
    shared_directory,
    start,
    straight_run,
    the_error,
)
from train.data.cache import CacheReader
from train.main import main as train

STEPS = 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return cache_directory(tmp_path_factory)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return straight_run(tmp_path_factory)


@pytest.fixture
def here(cache):
    with in_this_process(cache):
        yield


@pytest.fixture
def pictures(tmp_path):
    return draw_pictures(tmp_path / "pictures")


def draw_pictures(folder: Path) -> Path:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder.mkdir(exist_ok=True)
    for number, picture in enumerate(digits.images[digits.target == 3][:8]):
        Image.fromarray((picture * 15.9).astype("uint8")).save(folder / f"{number}.png")
    return folder


def options(base: Path, pictures: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *("lora", "--model", str(base), "--data.path", str(pictures), "--data.caption", "a handwritten three"),
        *("--run-dir", str(run_dir), "--steps", f"{STEPS}", "--batch-size", "4", "--compute.dtype", "float32"),
        *("--compute.remat", "none", "--checkpoint.every", "2", "--preview.every", "2"),
        *("--preview.num-inference-steps", "2", "--logging.every", "1", "--logging.no-tensorboard", *more),
    ]


def without_data(words: list[str], pictures: Path) -> list[str]:
    """The options of a run that names a finished cache alone."""
    return [
        word for word in words if word not in ("--data.path", str(pictures), "--data.caption", "a handwritten three")
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache, base):
    """A LoRA run of a few steps with its cache beside it, and the pictures; not to be changed."""

    def make(directory):
        directory.mkdir()
        with in_this_process(cache):
            assert train(options(base, draw_pictures(directory / "pictures"), directory / "run")) == 0

    return made_once(shared_directory(tmp_path_factory) / "finished-lora", make)


def names_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def assert_refused(capfd, words: list[str], *says: str, folder: Path | None = None) -> str:
    """Fails unless the command ends with one line that says all this, and leaves a folder as it was."""
    before = names_below(folder) if folder is not None else None
    status, out, err = call(capfd, *words)
    assert status == 2, out
    line = the_error(err)
    assert [part for part in says if part not in line] == [], line
    assert "compiling the train step" not in out
    if folder is not None:
        assert names_below(folder) == before
    return line


# -- where the data is -------------------------------------------------------------------------------------------------


def test_data_that_is_not_there(here, base, tmp_path, capfd):
    run_dir = tmp_path / "runs" / "run"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("not a data set")
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "letter.pdf").write_text("no picture")
    for place, says in (
        (tmp_path / "nowhere", ["nowhere"]),
        (tmp_path / "empty", ["empty", "no picture"]),
        (tmp_path / "text.txt", ["text.txt"]),
        (documents, ["documents", "no picture"]),
    ):
        assert_refused(capfd, options(base, place, run_dir), "--data.path", *says, folder=tmp_path)
    words = [word for word in options(base, tmp_path, run_dir) if word not in ("--data.path", str(tmp_path))]
    assert_refused(capfd, words, "--data.path is missing", "--data.cache", folder=tmp_path)


def test_models_that_do_not_do(here, base, finished, pictures, tmp_path, capfd):
    run_dir = tmp_path / "runs" / "run"
    words = options(base, pictures, run_dir)
    without = [word for word in words if word not in ("--model", str(base))]
    assert_refused(capfd, without, "lora", "--model DIRECTORY", folder=tmp_path)
    assert_refused(capfd, options(tmp_path / "none", pictures, run_dir), "none", folder=tmp_path)
    assert_refused(capfd, options(pictures, pictures, run_dir), "pictures", "model_index.json", folder=tmp_path)
    # a run that trained a LoRA is not a whole model
    assert_refused(capfd, options(finished / "run", pictures, run_dir), "lora", "merge", folder=tmp_path)


def test_layers_that_are_not_there(here, base, pictures, tmp_path, capfd):
    words = options(base, pictures, tmp_path / "runs" / "run", "--lora.targets", "to_everything")
    assert_refused(capfd, words, "LoRA target 'to_everything'", "no layer", "all_linear", folder=tmp_path)
    words = options(base, pictures, tmp_path / "runs" / "run", "--optimizer.frozen", "to_everything")
    assert_refused(capfd, words, "--optimizer.frozen 'to_everything'", "no parameter", folder=tmp_path)


# -- caches ------------------------------------------------------------------------------------------------------------


def test_a_cache_of_another_model(here, base, pictures, tmp_path, capfd):
    other = gray_model(tmp_path / "other")
    from tests.train.data.cache_cases import prepared, run_config

    made, _ = prepared(run_config(pictures, tmp_path / "made", caption="a handwritten three"), other)
    words = options(base, pictures, tmp_path / "runs" / "run", "--data.cache", str(made))
    assert_refused(capfd, words, str(made), "text_encoder", "there", "here", "--data.cache", folder=tmp_path)
    # the same where only the cache is named
    words = without_data(words, pictures)
    assert_refused(capfd, words, str(made), "text_encoder", "--data.cache", folder=tmp_path)


def test_folders_that_are_no_cache(here, base, pictures, tmp_path, capfd):
    run_dir = tmp_path / "runs" / "run"
    assert_refused(
        capfd,
        options(base, pictures, run_dir, "--data.cache", str(draw_pictures(tmp_path / "others"))),
        *("--data.cache", "others", "cache.json"),
        folder=tmp_path,
    )
    words = without_data(options(base, pictures, run_dir), pictures)
    assert_refused(capfd, [*words, "--data.cache", str(tmp_path / "none")], "none", "precompute", folder=tmp_path)


def test_a_disk_that_is_full_while_pictures_are_prepared(cache, base, pictures, tmp_path, capfd):
    words = options(base, pictures, tmp_path / "runs" / "run", "--data.cache", str(tmp_path / "prepared"))
    _, err = run(cache, *words, hook=["files_stay_below", "900"], status=2)
    line = the_error(err)
    assert "prepared" in line
    assert "make room" in line or "another folder" in line
    assert not (tmp_path / "runs").exists()
    assert left_behind(tmp_path) == []
    assert not list((tmp_path / "prepared").glob("latents-*"))
    # the same command, on a disk with room, goes on
    with in_this_process(cache):
        status, out, err = call(capfd, *words)
    assert status == 0, err
    assert f"trained {STEPS} steps" in out


@pytest.mark.prove
def test_two_runs_that_prepare_the_same_cache(cache, base, pictures, tmp_path):
    """The second waits for the first, and then finds everything there."""
    shared = str(tmp_path / "prepared")
    words = [options(base, pictures, tmp_path / "runs" / name, "--data.cache", shared) for name in ("one", "two")]
    waited = tmp_path / "waited"
    first = start(cache, *words[0], hook=["preparing_waits_for", str(waited)])
    first.wait_for("distinct prompts")
    second = start(cache, *words[1])
    second.wait_for("another process is writing")
    waited.touch()
    (_, _), (out, _) = first.finish(), second.finish()
    assert "waiting until it has ended" in out + second.out
    assert "8 pictures, 8 of them there" in second.out
    assert len(list(CacheReader(shared).samples())) == 8
    assert left_behind(tmp_path) == []
    for name in ("one", "two"):
        assert saved_steps(tmp_path / "runs" / name)[-1] == STEPS


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished / "run", tmp_path / "run"), finished


def test_resuming_with_another_model(here, copied, tmp_path, capfd):
    run_dir, _ = copied
    other = gray_model(tmp_path / "other").path
    words = ["--resume", str(run_dir), "--model", str(other), "--steps", "6"]
    assert_refused(capfd, words, "other", folder=tmp_path)


def test_a_model_that_was_trained_on_since(here, base, cache, copied, tmp_path, capfd):
    """The base model's path leads to other weights than the run has begun with."""
    run_dir, _ = copied
    config = (run_dir / "config.json").read_text()
    moved = shutil.copytree(base, tmp_path / "base")
    (run_dir / "config.json").write_text(config.replace(str(base), str(moved)))
    shutil.rmtree(moved / "checkpoints" / "24")
    assert_refused(capfd, ["--resume", str(run_dir), "--steps", "6"], "trained beside", "weights", folder=tmp_path)


def test_a_new_preview_prompt_on_resume(here, copied, tmp_path, capfd):
    """It is encoded where the pictures are still there, and refused in one line where only the cache is."""
    run_dir, _ = copied
    words = ["--resume", str(run_dir), "--steps", "6", "--preview.prompts", "a handwritten seven"]
    status, _, err = call(capfd, *words)
    assert status == 0, err
    assert (run_dir / "samples" / "step_000006.png").exists()
    words = ["--resume", str(run_dir), "--steps", "8", "--preview.prompts", "a handwritten unicorn"]
    line = assert_refused(capfd, words, "unicorn", folder=run_dir)
    assert "words" in line or "knows" in line


def test_a_preview_prompt_that_is_not_in_the_cache(here, base, finished, tmp_path, capfd):
    (prepared,) = (finished / "cache").iterdir()
    words = without_data(options(base, tmp_path, tmp_path / "runs" / "run", "--data.cache", str(prepared)), tmp_path)
    prompts = ["--preview.prompts", "a handwritten seven"]
    assert_refused(capfd, [*words, *prompts], "'a handwritten seven'", "not in the cache", "precompute")
    assert not (tmp_path / "runs").exists()


def test_the_data_has_changed_since(here, copied, tmp_path, capfd):
    """A run goes on with the samples that it began with; what is gone matters where the cache does not have it."""
    run_dir, finished = copied
    pictures, hidden = finished / "pictures", finished / "hidden"
    shutil.copytree(pictures, hidden)
    try:
        shutil.copy(pictures / "0.png", pictures / "more.png")
        words = ["--resume", str(run_dir), "--preview.prompts", "three handwritten", "--steps"]
        status, out, err = call(capfd, *words, "5")
        assert status == 0, err
        assert f"{pictures} (folder of pictures): 9 pictures" in out
        assert "data: 8 pictures from the cache" in out
        shutil.rmtree(pictures)
        status, out, err = call(capfd, *words, "6")
        assert status == 0, err
        assert "the run goes on with the samples that it began with" in out
        line = assert_refused(capfd, [*words[:3], "seven three", "--steps", "7"], "pictures", folder=run_dir)
        assert "--data.path" in line
    finally:
        shutil.rmtree(pictures, ignore_errors=True)
        hidden.rename(pictures)
