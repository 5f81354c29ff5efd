"""LongSANA's last stage through the trainer, as small as it gets: a video's first window and its second, a program
each, and a resume between them. `make prove` also has the next video, whose two programs take as long to compile."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from sana_jax import LongSanaVideoPipeline
from tests.train import tiny_teacher
from tests.train.run_training import assert_same_run, cache_directory, call, in_this_process, left_behind, rows
from tests.train.test_main_video import words
from tests.train.tiny_run import QUICKLY

OPTIONS = {
    "checkpoint.every": 1,
    "data.digits": [3, 7],
    "data.frames": 5,
    "batch-size": 1,
    "preview.every": 0,
    "preview.num-inference-steps": 1,
    "preview.guidance-scale": 1.0,
    "self-forcing.timesteps": 1000,
    "self-forcing.block-frames": 4,
    "self-forcing.critic-steps": 1,
    "self-forcing.stream.window-frames": 5,
    "self-forcing.stream.total-frames": 9,
    "ema.start": 1,
}


@pytest.fixture(autouse=True)
def what_runs_is_compiled(tmp_path_factory, monkeypatch):
    """Programs are compiled when they first run: those that would run after the last step are not."""

    def compile_ahead(name, function, *arguments, say, identity=None):
        compiled = []

        def run(*inputs):
            compiled[:] = compiled or [function.lower(*arguments).compile(QUICKLY)]
            return compiled[0](*inputs)

        return run

    monkeypatch.setattr("train.main.compile_ahead", compile_ahead)
    monkeypatch.setattr(tiny_teacher, "NETWORK", dataclasses.replace(tiny_teacher.NETWORK, num_layers=1))
    with in_this_process(cache_directory(tmp_path_factory)):
        yield


# The generator has the first window of the first video and the second window of the second.
KINDS = ["generator", "critic", "critic", "generator"]


@pytest.mark.parametrize("steps", [2, pytest.param(4, marks=pytest.mark.prove)])
def test_windows_of_a_growing_video_and_a_resume_between_them(steps, tmp_path, capfd):
    teacher, run, copy = tiny_teacher.save_teacher(tmp_path / "teacher"), tmp_path / "run", tmp_path / "copy"
    options = {**OPTIONS, "steps": steps, "model": teacher}
    status, out, err = call(capfd, *words("moving_digits_longsana", run, options))
    assert status == 0, err
    assert "windows of 5 latent frames, 2 to a video of 9; every step takes the next" in out
    assert "one step in 2 is the generator's, which would always meet the same of the 2 windows" in out
    found = rows(run)
    assert [next(name.partition("/")[0] for name in row if "/" in name) for row in found] == KINDS[:steps]
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in found)
    assert LongSanaVideoPipeline.from_pretrained(run).checkpoint_step == steps
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / str(steps))  # what is left is in the middle of a video
    status, out, err = call(capfd, "--resume", str(copy))
    assert status == 0, err
    assert f"resumed at step {steps - 1} of {steps}" in out
    assert_same_run(copy, run, steps)
    assert not left_behind(copy)
