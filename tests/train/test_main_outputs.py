"""What a run prints and leaves behind, from its first line to a picture drawn with it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from configs.schema import RunConfig
from configs.serialization import from_dict, to_dict
from tests.train.run_training import (
    PREVIEW_EVERY,
    ROOT,
    ROW_EVERY,
    SAVE_EVERY,
    STEPS,
    cache_directory,
    call,
    in_this_process,
    left_behind,
    pixels,
    rows,
    saved_steps,
    straight_run,
    tiny,
)
from train.main import read_command_line


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return straight_run(tmp_path_factory)


@pytest.fixture
def here(tmp_path_factory):
    with in_this_process(cache_directory(tmp_path_factory)):
        yield


# -- printed -----------------------------------------------------------------------------------------------------------


def test_compilation_is_spoken_of_before_the_first_step(straight):
    out = (straight / "stdout.txt").read_text()
    before = out[: out.index("step 2/24")]
    compiled = re.findall(r"compiled (.*) in \d+\.\d s .*; memory per device: [\d.]+ .*B \(arguments ", before)
    assert compiled == [
        "the train step for latents 8x8x8x1",
        "sampling of 2 previews (8x8 latents, 2 steps)",
        "the first state",
    ]
    assert all(f"compiling {name} ..." in before for name in compiled)
    assert "compil" not in out[len(before) :]


def test_every_row_is_a_line_with_loss_speed_and_time_left(straight):
    out = (straight / "stdout.txt").read_text()
    lines = re.findall(r"^step (\d+)/24  loss \d+\.\d{4}  \d+ images/s  ETA \d+:\d\d$", out, re.MULTILINE)
    assert [int(step) for step in lines] == list(range(ROW_EVERY, STEPS + 1, ROW_EVERY))


def test_nothing_is_printed_on_stderr_that_is_not_the_compilers(straight):
    lines = (straight / "stderr.txt").read_text().splitlines()
    assert [line for line in lines if re.search("error|warn|Traceback", line, re.IGNORECASE)] == []


def test_the_last_lines_name_everything_and_the_command_to_sample(straight, tmp_path):
    *_, summary, where, command = (straight / "stdout.txt").read_text().splitlines()
    assert re.fullmatch(r"trained 24 steps in \d+:\d\d, median \d+ images/s", summary)
    assert str(straight) in where
    words = shlex.split(command)
    words[0] = sys.executable
    assert words[1:3] == ["-m", "sana_jax.generate"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "picture.png") as picture:
        assert np.asarray(picture).std() > 1
        assert picture.text["checkpoint_step"] == str(STEPS)
        assert picture.text["steps"] == "2"


# -- left behind -------------------------------------------------------------------------------------------------------


def test_config_json_holds_the_whole_configuration(straight):
    values = json.loads((straight / "config.json").read_text())
    config = read_command_line(tiny(straight))
    assert values == json.loads(json.dumps(to_dict(config)))
    assert from_dict(RunConfig, values, "config.json") == config


def test_metrics_have_every_column_at_every_row(straight):
    assert [row["step"] for row in rows(straight)] == list(range(ROW_EVERY, STEPS + 1, ROW_EVERY))
    bins = {"loss_sigma_0.00_0.25", "loss_sigma_0.25_0.50", "loss_sigma_0.50_0.75", "loss_sigma_0.75_1.00"}
    seen = set()
    for row in rows(straight):
        assert all(isinstance(value, (int, float)) and np.isfinite(value) for value in row.values()), row
        for name in ("loss", "loss_mean", "grad_norm", "update_norm", "param_norm", "images_per_second"):
            assert row[name] > 0, name
        assert 0 < row["learning_rate"] <= 2.001e-3
        seen |= {name for name in row if name.startswith("loss_sigma")}
    assert seen == bins
    assert rows(straight)[-1]["loss_mean"] < 0.7 * rows(straight)[0]["loss_mean"]


def test_tensorboard_has_the_numbers_and_the_pictures(straight):
    events = list((straight / "tensorboard").glob("events.out.tfevents.*"))
    assert len(events) == 1
    content = events[0].read_bytes()
    for name in (b"loss", b"grad_norm", b"samples"):
        assert name in content


def test_previews_at_the_start_along_the_way_and_at_the_end(straight):
    names = sorted(path.name for path in (straight / "samples").iterdir())
    assert names == [f"step_{step:06d}.png" for step in range(0, STEPS + 1, PREVIEW_EVERY)]
    for step in range(0, STEPS + 1, PREVIEW_EVERY):
        picture = pixels(straight, step)
        height, width = picture.shape
        digits = picture[: int(0.6 * height), :]  # above the labels
        assert digits.std() > 5
        assert len(np.unique(picture)) > 20
        assert not np.array_equal(digits[:, : width // 2], digits[:, width // 2 :]), "both captions draw the same"
    assert not np.array_equal(pixels(straight, 0), pixels(straight, STEPS))


def test_nothing_half_written_is_left(straight):
    assert left_behind(straight) == []
    assert saved_steps(straight) == list(range(SAVE_EVERY, STEPS + 1, SAVE_EVERY))


def test_the_same_command_on_a_finished_run_has_nothing_to_do(straight, here, capfd):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    for options in (tiny(straight), ["--resume", str(straight)]):
        status, out, err = call(capfd, *options)
        assert status == 0, err
        assert f"nothing left to do: {straight} is at step 24 of 24" in out
        assert "compiling" not in out
        assert f"--model {straight}" in out.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before


# -- what may fail without stopping a run ------------------------------------------------------------------------------


def test_failing_previews_and_logs_are_said_counted_and_not_fatal(straight, here, capfd, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    run_dir = tmp_path / "run"

    def decode(autoencoder, latents):
        raise RuntimeError("the decoder\nbroke")

    monkeypatch.setattr("sana_jax.autoencoders.PixelAutoencoder.decode", decode)
    status, out, err = call(capfd, *tiny(run_dir, steps=4), "--logging.wandb")
    assert status == 0, err
    warnings = [line for line in out.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 3
    assert "Weights & Biases" in warnings[0]
    for line, step in zip(warnings[1:], (0, 4)):
        assert line.startswith(
            f"warning: the preview at step {step} failed, training goes on: RuntimeError: the decoder"
        )
    assert "; previews that failed: 2; no longer logging to Weights & Biases" in out
    assert saved_steps(run_dir) == [4]
    # once it works again, the same command draws the picture that is missing, and nothing else
    monkeypatch.undo()
    (run_dir / "samples").mkdir(exist_ok=True)
    status, out, err = call(capfd, "--resume", str(run_dir))
    assert status == 0, err
    assert f"preview: {run_dir}/samples/step_000004.png" in out
    assert "nothing left to do" in out
    assert pixels(run_dir, 4).std() > 5


def test_a_folder_for_previews_that_cannot_be_written(straight, here, capfd, tmp_path):
    run_dir = tmp_path / "run"
    assert call(capfd, *tiny(run_dir, steps=3, preview__every=0))[0] == 0
    assert not (run_dir / "samples").exists()
    (run_dir / "samples").write_text("a file where a folder should be")
    status, out, err = call(capfd, "--resume", str(run_dir), "--steps", "4", "--preview.every", "4")
    assert status == 0, err
    assert "warning: the preview at step 4 failed, training goes on" in out
    assert "; previews that failed: 1" in out
    assert saved_steps(run_dir) == [3, 4]
