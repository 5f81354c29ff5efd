"""Sprint training through the trainer: both kinds of step, resuming between them, meshes, sampling the student."""

from __future__ import annotations

import contextlib
import io
import json
import shutil

import numpy as np
import pytest

from sana_jax.generate import main as generate
from tests.train.run_training import (
    assert_same_run,
    cache_directory,
    call,
    in_this_process,
    left_behind,
    made_once,
    rows,
    run,
    saved_state,
    saved_steps,
    shared_directory,
    straight_run,
)
from train.main import main as train

STEPS, BETWEEN = 6, 3
GENERATOR = {f"generator/{name}" for name in ("scm", "adversarial", "tangent_norm", "log_variance")}
DISCRIMINATOR = {f"discriminator/{name}" for name in ("real", "false", "right")}
OPTIONS = (
    *("--steps", f"{STEPS}", "--batch-size", "8", "--logging.every", "1"),
    *("--checkpoint.every", f"{BETWEEN}", "--checkpoint.keep-last", "9"),
    *("--sprint.head-blocks", "0", "1", "--sprint.virtual-batch", "2", "--sprint.tangent-warmup-steps", "4"),
    *("--sprint.discriminator-learning-rate", "1e-3", "--optimizer.learning-rate", "1e-3"),
    # with a smaller epsilon the sign of a gradient that is nothing but rounding makes a whole update
    *("--optimizer.schedule", "constant", "--optimizer.warmup-steps", "0", "--optimizer.epsilon", "1e-3"),
    *("--preview.captions", "2", "--preview.per-caption", "1", "--preview.every", f"{STEPS}"),
)


def losses(row: dict) -> dict[str, float]:
    """The loss of a row and what it consists of."""
    return {name: value for name, value in row.items() if name in {"loss"} | GENERATOR | DISCRIMINATOR}


def distil(teacher, run_dir, *changes: str) -> list[str]:
    return ["digits_sprint", "--model", str(teacher), "--run-dir", str(run_dir), *OPTIONS, *changes]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return cache_directory(tmp_path_factory)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return straight_run(tmp_path_factory)


@pytest.fixture(scope="module")
def student(tmp_path_factory, cache, teacher):
    """A run without any interruption."""

    def make(directory):
        out = io.StringIO()
        with in_this_process(cache), contextlib.redirect_stdout(out):
            assert train(distil(teacher, directory)) == 0
        (directory / "stdout.txt").write_text(out.getvalue())

    return made_once(shared_directory(tmp_path_factory) / "sprint", make)


def test_both_kinds_of_step_in_turn(student):
    printed = (student / "stdout.txt").read_text()
    assert "1 x consistency + 0.5 x adversarial (2 heads on the teacher's blocks)" in printed
    assert [row["step"] for row in rows(student)] == list(range(1, STEPS + 1))
    for number, row in enumerate(rows(student)):
        figures = {name for name in row if name.startswith(("generator/", "discriminator/"))}
        assert figures == (DISCRIMINATOR if number % 2 else GENERATOR)
        assert all(np.isfinite(row[name]) for name in figures)
    assert saved_steps(student) == [BETWEEN, 2 * BETWEEN]

    before, after = (saved_state(student, step) for step in saved_steps(student))
    parts = {"params/transformer", "params/logvar", "params/heads", "params/vectors", "ema/transformer"}
    names = {"/".join(path.split("/")[:2]) for path in after if not path.startswith("opt_state")}
    assert names == parts
    for part in parts:
        paths = [path for path in after if path.startswith(f"{part}/")]
        assert any(not np.array_equal(before[path], after[path]) for path in paths), part


def test_resumed_between_the_two_kinds_is_the_straight_run_bit_for_bit(cache, student, tmp_path, capfd):
    run_dir = tmp_path / "run"
    shutil.copytree(student, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / f"{STEPS}")
    (run_dir / "samples" / f"step_{STEPS:06d}.png").unlink()
    with in_this_process(cache):
        status, out, err = call(capfd, "--resume", str(run_dir))
    assert status == 0, err
    assert f"resumed at step {BETWEEN} of {STEPS}" in out
    assert f"metrics.jsonl: dropped {STEPS - BETWEEN} rows" in out
    assert_same_run(run_dir, student, STEPS)
    assert [losses(row) for row in rows(run_dir)] == [losses(row) for row in rows(student)]
    assert left_behind(run_dir) == []


def test_the_directory_draws_in_one_two_and_four_steps(cache, student, tmp_path, capfd):
    from PIL import Image

    pictures = []
    for steps in (None, 2, 4):
        path = tmp_path / f"{steps}.png"
        asked = [] if steps is None else ["--steps", f"{steps}"]
        with in_this_process(cache):
            generate(["--model", str(student), "--prompt", "a handwritten three", "--output", str(path), *asked])
        with Image.open(path) as picture:
            pictures.append(np.asarray(picture).astype(int))
    assert f"ema weights of step {STEPS}" in capfd.readouterr().out
    assert json.loads((student / "model_index.json").read_text())["_class_name"] == "SanaSprintPipeline"
    assert np.abs(pictures[0] - pictures[1]).max() > 0
    assert np.abs(pictures[1] - pictures[2]).max() > 0


@pytest.mark.parametrize(
    ("changes", "devices", "said"),
    [
        (("--mesh.fsdp", "4"), 8, "mesh data=2, fsdp=4"),
        (("--accumulation", "2"), 1, "mesh of one device"),
    ],
)
@pytest.mark.prove  # two minutes
def test_devices_and_accumulation_change_only_rounding(cache, teacher, student, tmp_path, changes, devices, said):
    run_dir = tmp_path / "run"
    out, _ = run(cache, *distil(teacher, run_dir, *changes), devices=devices)
    assert said in out
    for row, expected in zip(rows(run_dir), rows(student), strict=True):
        assert losses(row) == pytest.approx(losses(expected), rel=1e-5), row["step"]
    have, want = saved_state(run_dir, STEPS), saved_state(student, STEPS)
    assert have.keys() == want.keys()
    # of the optimizer's state not: biases in front of a normalisation have a gradient that is nothing but rounding
    weights = {name: array for name, array in want.items() if not name.startswith("opt_state/")}
    for name, array in weights.items():
        difference = np.abs(have[name].astype(float) - array).max()
        assert difference <= 1e-4 * np.abs(array).max(), name
