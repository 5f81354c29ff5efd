"""A run that was interrupted and continued is the run that was not."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time

import numpy as np
import pytest

from sana_jax.generate import main as generate
from tests.train.run_training import (
    SAVE_EVERY,
    STEPS,
    assert_same_run,
    cache_directory,
    call,
    exact_rows,
    in_this_process,
    left_behind,
    pixels,
    rows,
    run,
    saved_progress,
    saved_state,
    saved_steps,
    start,
    straight_run,
    tiny,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return cache_directory(tmp_path_factory)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return straight_run(tmp_path_factory)


def start_and_kill(cache, run_dir, delay: float) -> None:
    """Kills a run some seconds after its first checkpoint was complete."""
    training = start(cache, *tiny(run_dir))
    while not (run_dir / "checkpoints" / str(SAVE_EVERY)).exists():
        assert training.process.poll() is None, training.err
        time.sleep(0.001)
    time.sleep(delay)
    training.send(signal.SIGKILL)
    training.finish(status=-signal.SIGKILL)


def test_killed_and_resumed_is_the_straight_run_bit_for_bit(cache, straight, tmp_path, capfd):
    run_dir = tmp_path / "run"
    start_and_kill(cache, run_dir, delay=0.05)
    steps = saved_steps(run_dir)
    assert steps
    assert steps[-1] < STEPS
    assert exact_rows(run_dir) == exact_rows(straight)[: len(rows(run_dir))]

    # what other interruptions leave: a half-written checkpoint, rows past it, a torn last row
    half_written = run_dir / "checkpoints" / f"{STEPS}.orbax-checkpoint-tmp"
    shutil.copytree(run_dir / "checkpoints" / str(steps[-1]), half_written)
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 22, "loss": 123.0}\n{"step": 2')

    # a run that has not ended is a model already
    with in_this_process(cache):
        picture = tmp_path / "three.png"
        generate(["--model", str(run_dir), "--prompt", "a handwritten three", "--output", str(picture)])
    assert f"ema weights of step {steps[-1]}" in capfd.readouterr().out
    assert picture.exists()

    with in_this_process(cache):
        status, out, err = call(capfd, *tiny(run_dir))  # the same command continues
    assert status == 0, err
    assert f"ignoring {half_written}" in out
    assert f"resumed at step {steps[-1]} of {STEPS}" in out
    assert "metrics.jsonl: dropped " in out
    assert_same_run(run_dir, straight)
    assert left_behind(run_dir) == []


@pytest.mark.prove
def test_another_number_of_devices_gives_the_same_run_to_rounding(cache, straight, tmp_path, capfd):
    """From one device to eight over all three axes, and back to one."""
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    for step in (16, 24):
        shutil.rmtree(run_dir / "checkpoints" / f"{step}")
    axes = ("--mesh.fsdp", "2", "--mesh.tensor", "2")
    out, _ = run(cache, "--resume", str(run_dir), *axes, "--steps", "16", "--preview.every", "0", devices=8)
    assert "mesh data=2, fsdp=2, tensor=2" in out
    assert "resumed at step 8 of 16" in out
    axes = ("--mesh.fsdp", "1", "--mesh.tensor", "1")
    with in_this_process(cache):
        status, out, err = call(capfd, "--resume", str(run_dir), *axes, "--steps", f"{STEPS}")
    assert status == 0, err
    assert "mesh of one device" in out
    assert "resumed at step 16 of 24" in out

    have, want = saved_state(run_dir, STEPS), saved_state(straight, STEPS)
    assert have.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(have[name], want[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert saved_progress(run_dir, STEPS)["data_position"] == saved_progress(straight, STEPS)["data_position"]
    for row, expected in zip(exact_rows(run_dir), exact_rows(straight), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_a_longer_run_continues_a_finished_one(cache, straight, tmp_path, capfd):
    run_dir = tmp_path / "moved"
    shutil.copytree(straight, run_dir)
    with in_this_process(cache):
        status, out, err = call(capfd, "--resume", str(run_dir), "--steps", "26")
    assert status == 0, err
    assert "resumed at step 24 of 26" in out
    assert exact_rows(run_dir)[:-1] == exact_rows(straight)
    assert exact_rows(run_dir)[-1]["step"] == 26
    config = json.loads((run_dir / "config.json").read_text())
    assert (config["steps"], config["run_dir"]) == (26, str(run_dir))
    assert pixels(run_dir, 26).std() > 5


def test_a_run_without_a_checkpoint_starts_again(cache, straight, tmp_path, capfd):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    with in_this_process(cache):
        status, out, err = call(capfd, *tiny(run_dir))
    assert status == 0, err
    assert f"{run_dir} has no checkpoint yet: starting at step 0" in out
    assert "metrics.jsonl: dropped 12 rows past step 0" in out
    assert_same_run(run_dir, straight)


@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_killed_again_and_again(cache, straight, tmp_path):
    moments = random.Random(0)
    for _ in range(4):
        run_dir = tmp_path / "run"
        start_and_kill(cache, run_dir, delay=moments.uniform(0, 0.6))
        for _ in range(2):  # and while it starts, restores, steps, saves
            training = start(cache, "--resume", str(run_dir))
            time.sleep(moments.uniform(3, 14))
            training.send(signal.SIGKILL)
            training.process.wait()
        run(cache, "--resume", str(run_dir))
        assert_same_run(run_dir, straight)
        shutil.rmtree(run_dir)
