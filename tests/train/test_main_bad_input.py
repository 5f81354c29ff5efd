"""Mistakes and mishaps: one line that says what, what is allowed and what next; nothing half-written, no traceback."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from sana_jax.errors import run_command_line
from sana_jax.generate import main as generate
from tests.train.run_training import (
    cache_directory,
    call,
    exact_rows,
    in_this_process,
    left_behind,
    run,
    saved_state,
    saved_steps,
    straight_run,
    the_error,
    tiny,
)
from train.main import main as train
from train.precompute import main as precompute


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return cache_directory(tmp_path_factory)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return straight_run(tmp_path_factory)


@pytest.fixture
def here(cache):
    with in_this_process(cache):
        yield


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "runs" / "run"


@pytest.fixture
def copied(straight, tmp_path):
    return shutil.copytree(straight, tmp_path / "copied")


def assert_says(line: str, *parts: str) -> None:
    assert [part for part in parts if part not in line] == [], line


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 0}, ["--steps 0", "1 or more"]),
        ({"steps": -5}, ["--steps -5", "1 or more"]),
        ({"steps": "many"}, ["--steps", "'many'", "an integer", "--help"]),
        ({"steps": 2.5}, ["--steps", "'2.5'", "an integer", "--help"]),
        ({"batch_size": 0}, ["--batch-size 0", "1 or more"]),
        ({"optimizer__learning_rate": 0}, ["--optimizer.learning-rate 0", "above 0 and below 1"]),
        ({"optimizer__learning_rate": "fast"}, ["--optimizer.learning-rate", "'fast'", "a number"]),
        ({"optimizer__clip_norm": -1}, ["--optimizer.clip-norm -1", "above 0, or None"]),
        ({"optimizer__schedule": "cosin"}, ["--optimizer.schedule", "'cosin'", "constant, cosine, linear"]),
        ({"optimizer__frozen": "nothing"}, ["--optimizer.frozen 'nothing'", "matches no parameter", "paths look like"]),
        ({"optimizer__no_decay": "nothing"}, ["--optimizer.no-decay 'nothing'", "matches no parameter", ".*"]),
        ({"optimizer__frozen": "("}, ["--optimizer.frozen '('", "not a regular expression"]),
        ({"optimizer__frozen": ".*"}, ["--optimizer.frozen .*", "nothing to train"]),
        ({"compute__remat": "all"}, ["--compute.remat", "'all'", "none, dots, dots_no_batch, full"]),
        (
            {"flow__density": "stretched_logit_normal"},
            ["stretched_logit_normal", "--flow.p-low=None", "--flow.p-low=0.02, --"],
        ),
        ({"flow__logit_mean": 0.5, "flow__density": "uniform"}, ["--flow.logit-mean=0.5 is not read"]),
        ({"preview__num_inference_steps": 0}, ["--preview.num-inference-steps 0", "1 or more"]),
        ({"preview__sampler": "ddim"}, ["--preview.sampler", "'ddim'", "dpm_solver, flow_euler"]),
        ({"mesh__data": 2}, ["data=2", "product 2", "the number of devices, 1", "--mesh.data"]),
        ({"mesh__fsdp": 3}, ["fsdp=3", "does not divide the number of devices, 1", "--mesh.fsdp 1"]),
        ({"mesh__fsdp": 0}, ["fsdp=0", "1 or more"]),
        ({"accumulation": 3}, ["--batch-size 8", "1 x 1 x 3 = 3", "6 or 9"]),
        ({"data__digits": ""}, ["--data.digits (none)", "0 to 9"]),
        ({"data__digits": "3 12"}, ["--data.digits 3 12", "0 to 9"]),
        ({"data__caption": "a digit"}, ["--data.caption 'a digit'", "{digit}", "'a handwritten {digit}'"]),
        ({"data__embedding_dim": 16}, ["--data.embedding-dim 16", "32"]),
        ({"device": "gpu"}, ["--device gpu", "only cpu", "leave --device out"]),
        ({"compute__kernels": "pallas"}, ["--compute.kernels pallas", "cuda alone", "runs on cpu", "auto or xla"]),
        ({"compute__kernels": "cudnn"}, ["--compute.kernels", "'cudnn'", "auto, xla, pallas, triton"]),
        ({"device": "tpu"}, ["--device", "'tpu'", "auto, cpu, gpu"]),
    ],
)
def test_values_that_are_not_allowed(here, capfd, run_dir, changes, says):
    status, _, err = call(capfd, *tiny(run_dir, **changes))
    assert status == 2
    assert_says(the_error(err), *says)
    assert not run_dir.parent.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["digit"], ["unknown preset 'digit'; did you mean digits?", "The presets are digits"]),
        (["--step", "5"], ["unknown option --step", "--steps", "--help"]),
        (["--optimizer.lr", "0.1"], ["unknown option --optimizer.lr", "closest: --optimizer.learning-rate,", "--help"]),
        (["lora", "--prior.caption", "x"], ["the preset lora has no such option; presets that have it:", "dreambooth"]),
        (["lora", "--steps", "x"], ["--steps cannot be 'x'", "see python -m train.main lora --help"]),
        (["--preset", "other"], ["--preset other", "the first word"]),
        (["--steps", "5", "--steps", "6"], ["--steps is given twice (5, then 6)", "leave one of them out"]),
        (["--resume"], ["--resume has no value", "--resume runs/digits"]),
        (["--steps", "5", "--resume", "somewhere"], ["--resume comes first"]),
        (["--steps", "5", "--resume=somewhere"], ["--resume comes first"]),
    ],
)
def test_command_lines_that_cannot_be_read(here, capfd, words, says):
    status, out, err = call(capfd, *words)
    assert status == 2
    assert out == ""
    assert_says(the_error(err), *says)


@pytest.mark.parametrize(
    ("command", "words", "has", "lacks"),
    [
        (train, ["--help"], ["train.main PRESET", "--resume RUN_DIR", "--plan", "  lora  ", "  digits  "], ["--steps"]),
        (
            train,
            ["lora", "--help"],
            ["python -m train.main lora [", "--steps", "LoRA on pictures"],
            ["dreambooth"],
        ),
        (precompute, ["--help"], ["train.precompute PRESET", "  lora  "], ["--plan", "--resume", "  digits  "]),
        (precompute, ["lora", "--help"], ["usage: python -m train.precompute lora ["], ["train.main"]),
    ],
)
def test_help(capsys, command, words, has, lacks):
    with pytest.raises(SystemExit) as caught:
        command(words)
    text = capsys.readouterr().out
    assert caught.value.code in (0, None)
    assert [part for part in has if part not in text] == []
    assert [part for part in lacks if part in text] == []


def test_the_real_command_says_it_too(cache, run_dir):
    _, err = run(cache, "no-such-preset", status=2)
    assert err == f"{the_error(err)}\n"
    _, err = run(cache, *tiny(run_dir, batch_size=12, accumulation=1, mesh__fsdp=2), devices=8, status=2)
    assert_says(the_error(err), "--batch-size 12", "4 x 2 x 1 = 8", "8 or 16")
    assert not run_dir.parent.exists()


# -- run directories ---------------------------------------------------------------------------------------------------


def test_a_directory_that_is_a_file_or_cannot_be_written(here, capfd, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for place, says in (
        (file, ["is a file", "new or holds this run"]),
        (file / "run", [str(file), "is a file", "name a place"]),
        ("", ["--run-dir '' is empty"]),
    ):
        status, _, err = call(capfd, *tiny(place))
        assert status == 2
        assert_says(the_error(err), *says)
    assert file.read_text() == "mine"


@pytest.mark.skipif(not os.path.isdir("/proc/self") or os.access("/proc/nothing", os.F_OK), reason="needs /proc")
def test_a_directory_that_refuses(straight, here, capfd):
    status, _, err = call(capfd, *tiny("/proc/run", steps=3, preview__every=0))
    assert status == 2
    assert_says(the_error(err), "cannot write to --run-dir /proc/run", "that can be written to")


def test_a_directory_that_holds_another_run_or_a_model(here, capfd, copied):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    status, _, err = call(capfd, *tiny(copied, batch_size=4, seed=7))
    assert status == 2
    assert_says(
        the_error(err), "another configuration", "batch_size 8 there, 4 here", "seed 0 there, 7 here", "--resume"
    )
    status, _, err = call(capfd, "--resume", str(copied), "--optimizer.learning-rate", "0.5")
    assert status == 2
    assert_says(the_error(err), "optimizer.learning_rate 0.002 there, 0.5 here")
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before

    (copied / "config.json").unlink()
    status, _, err = call(capfd, *tiny(copied))
    assert status == 2
    assert_says(the_error(err), "model_index.json", "not a run", "would overwrite", "name a directory that is new")
    assert not (copied / "config.json").exists()


def test_resuming_what_cannot_be_resumed(here, capfd, copied, tmp_path):
    def refused(*words):
        status, out, err = call(capfd, "--resume", *words)
        assert status == 2
        assert "compiling" not in out
        return the_error(err)

    assert_says(refused(str(tmp_path / "nowhere")), "nowhere", "missing", "holds no run", "name a directory")
    assert_says(refused(str(copied), "--run-dir", "elsewhere"), "--run-dir elsewhere", "leave --run-dir out")
    config = (copied / "config.json").read_text()
    (copied / "config.json").write_text(config[:100])
    assert_says(refused(str(copied)), "config.json", "not JSON")
    (copied / "config.json").write_text("[1, 2]")
    assert_says(refused(str(copied)), "config.json", "list")
    (copied / "config.json").write_text(json.dumps(json.loads(config) | {"stepps": 3}))
    assert_says(refused(str(copied)), "unknown field stepps", "steps")
    (copied / "config.json").write_text(config)
    for step in saved_steps(copied):
        (copied / "checkpoints" / str(step)).rename(copied / "checkpoints" / f"{step}.orbax-checkpoint-tmp")
    assert_says(refused(str(copied)), "no checkpoint in", "start the run from the beginning")
    shutil.rmtree(copied / "checkpoints")
    assert_says(refused(str(copied)), "no checkpoint in", "start the run from the beginning")
    (copied / "config.json").unlink()
    assert_says(refused(str(copied)), "config.json is missing", "name a directory")


def test_a_truncated_checkpoint(here, capfd, copied):
    config = (copied / "config.json").read_bytes()
    largest = max((copied / "checkpoints" / "24" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    status, _, err = call(capfd, "--resume", str(copied), "--steps", "26")
    assert status == 2
    assert_says(the_error(err), "checkpoints/24", "damaged", "8, 16", "delete it and resume from step 16")
    assert (copied / "config.json").read_bytes() == config
    assert [row["step"] for row in exact_rows(copied)][-1] == 24

    shutil.rmtree(copied / "checkpoints" / "24")  # as the message says
    status, out, err = call(capfd, "--resume", str(copied), "--steps", "18")
    assert status == 0, err
    assert "resumed at step 16 of 18" in out


# -- while it runs -----------------------------------------------------------------------------------------------------


def test_a_disk_that_no_checkpoint_fits_on(here, capfd, run_dir, monkeypatch):
    """Said before anything is compiled, and not when the first of them is saved, after hours."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 4096, 4096))
    status, out, err = call(capfd, *tiny(run_dir))
    assert status == 2
    assert_says(the_error(err), "a checkpoint does not fit into", " 4096 bytes", "free some space")
    assert "compil" not in out.partition("model: ")[2]
    assert not run_dir.exists()


def test_a_disk_that_is_full_while_saving(straight, cache, run_dir):
    # larger than the logs, smaller than the arrays
    options = tiny(run_dir, checkpoint__every=2, steps=6, preview__every=0)
    _, err = run(cache, *options, hook=["files_stay_below", "60000"], status=2)
    assert_says(the_error(err), "saving step 2", "File too large", "make room", "resume from")
    assert left_behind(run_dir) == []
    assert saved_steps(run_dir) == []


@pytest.fixture
def poisoned_pictures(monkeypatch):
    """One in ten pictures is not a number."""
    from train.data import digits

    load = digits.load_images

    def poisoned(chosen):
        images, labels = load(chosen)
        images[::10] = np.nan
        return images, labels

    monkeypatch.setattr(digits, "load_images", poisoned)


def test_a_loss_that_is_not_finite_stops_the_run(here, capfd, copied, poisoned_pictures):
    good = saved_state(copied, 24)
    status, _, err = call(capfd, "--resume", str(copied), "--steps", "60", "--logging.every", "50")
    assert status == 2
    line = the_error(err)
    assert_says(line, "is not finite (loss nan", "was not applied", "--nonfinite skip", "0.002")
    newest = saved_steps(copied)[-1]
    assert_says(line, f"checkpoint {newest} is good")
    assert all(np.isfinite(array).all() for array in saved_state(copied, newest).values())
    # rows are rarer than checkpoints here: none was saved past the bad step all the same
    assert int(line.split("at step ")[1].split()[0]) > newest
    assert {name: array.tobytes() for name, array in saved_state(copied, 24).items()} == {
        name: array.tobytes() for name, array in good.items()
    }


def test_steps_that_are_not_finite_are_left_out_and_counted(here, capfd, copied, poisoned_pictures):
    words = ["--resume", str(copied), "--nonfinite", "skip", "--steps", "40", "--logging.every", "1"]
    status, out, err = call(capfd, *words)
    assert status == 0, err
    left_out = [row["step"] for row in exact_rows(copied) if row["loss"] is None]
    assert 2 <= len(left_out) < 16
    for step in left_out:
        assert f"warning: left out step {step}: loss or gradient not finite" in out
    assert f"; steps left out, not finite: {len(left_out)}" in out
    assert all(np.isfinite(array).all() for array in saved_state(copied, 40).values())


def test_too_many_steps_that_are_not_finite(here, capfd, copied, poisoned_pictures):
    words = ["--resume", str(copied), "--nonfinite", "skip", "--max-nonfinite", "1", "--steps", "60"]
    status, _, err = call(capfd, *words)
    assert status == 2
    assert_says(the_error(err), "steps by now", "--max-nonfinite allows 1", "is good", "allow more")
    assert all(np.isfinite(array).all() for array in saved_state(copied, saved_steps(copied)[-1]).values())


def test_steps_left_out_are_counted_over_all_starts_of_a_run(here, capfd, copied, poisoned_pictures):
    """Whoever repeats the command of a run that has ended at its limit meets the same limit again."""
    words = ["--resume", str(copied), "--nonfinite", "skip", "--checkpoint.every", "4", "--logging.every", "1"]
    status, out, err = call(capfd, *words, "--steps", "40")
    assert status == 0, err
    first = out.count("warning: left out step")
    assert first >= 2
    for _ in range(2):
        status, _, err = call(capfd, *words, "--max-nonfinite", str(first), "--steps", "60")
        assert status == 2
        assert_says(the_error(err), f"{first + 1} steps by now", f"--max-nonfinite allows {first}")
    status, out, err = call(capfd, *words, "--max-nonfinite", "50", "--steps", "48")
    assert status == 0, err
    assert f"; steps left out, not finite: {first + out.count('warning: left out step')}" in out


@pytest.mark.prove
def test_an_absurd_learning_rate_ends_in_words_or_not_at_all(here, capfd, run_dir):
    status, _, err = call(capfd, *tiny(run_dir, optimizer__learning_rate=0.9, optimizer__clip_norm="None"))
    assert "Traceback" not in err
    if status:
        assert_says(the_error(err), "not finite")
    for step in saved_steps(run_dir):
        assert all(np.isfinite(array).all() for array in saved_state(run_dir, step).values())


# -- sampling from it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompt", ""], ["''", "empty"]),
        (["--prompt", "a a a a a a a a three"], ["9 words", "at most 7", "shorten"]),
        (["--prompt", "a handwritten seven", "--height", "9"], ["9", "2"]),
        (["--prompt", "a handwritten seven", "--width", "7"], ["7", "2"]),
        (["--prompt", "a handwritten seven", "--device", "gpu"], ["--device gpu", "only cpu"]),
        (["--prompt", "a handwritten seven", "--checkpoint-step", "9"], ["step 9", "8, 16, 24"]),
    ],
)
def test_pictures_that_cannot_be_drawn(here, capfd, straight, tmp_path, options, says):
    picture = tmp_path / "out.png"
    with pytest.raises(SystemExit) as leaving:
        run_command_line(lambda: generate(["--model", str(straight), "--out", str(picture), *options]))
    assert leaving.value.code == 2
    assert_says(the_error(capfd.readouterr().err), *says)
    assert not picture.exists()
