"""LongSANA's stages through the trainer, on moving digits: each one runs, resumes exactly, and leaves a model."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

from sana_jax import LongSanaVideoPipeline
from sana_jax.errors import UserError
from sana_jax.pipelines.text_to_video import SanaVideoPipeline
from sana_jax.weights import load_checkpoint_params
from sana_jax.weights.checkpoints import checkpoint_structure
from tests.train.run_training import (
    assert_same_run,
    cache_directory,
    call,
    in_this_process,
    left_behind,
    rows,
)
from tests.train.test_main_video import DIGITS, words
from train.main import main as train
from train.make_trajectories import main as make_trajectories

TIMESTEPS = [1000, 947, 857, 667]
CLIP = {"data.digits": [3, 7], "data.frames": 4}
TEACHER = {
    **DIGITS,
    **CLIP,
    "transformer.num-layers": 1,
    "steps": 1,
    "checkpoint.every": 1,
    "preview.every": 0,
    "preview.captions": None,
    "validation.every": 0,
    "validation.samples": None,
}
STAGE = {
    "batch-size": 2,
    "checkpoint.every": 2,
    "preview.every": 4,
    "preview.captions": 2,
    "preview.num-inference-steps": 4,
    "preview.guidance-scale": 1.0,
}
FORCING = {
    **STAGE,
    **CLIP,
    "preview.every": 0,
    "preview.captions": None,
    "self-forcing.block-frames": 2,
    "self-forcing.critic-steps": 1,
    "ema.start": 1,
}


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    with in_this_process(cache_directory(tmp_path_factory)):
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("longsana")


@pytest.fixture(scope="module")
def teacher(directory):
    assert train(words("moving_digits", directory / "teacher", TEACHER)) == 0
    return directory / "teacher"


@pytest.fixture(scope="module")
def ode(directory, teacher):
    trajectories = directory / "trajectories"
    options = ["--num-steps=8", "--flow-shift=6", "--per-caption=1", "--timesteps", *map(str, TIMESTEPS)]
    make_trajectories([f"--model={teacher}", f"--out={trajectories}", *options])
    more = {"model": teacher, "data.path": trajectories, "ode.block-frames": 2, "preview.at": 9}
    assert train(words("moving_digits_ode", directory / "ode", STAGE, more)) == 0
    return directory / "ode"


@pytest.fixture(scope="module")
def self_forcing(directory, teacher, ode):
    more = {"model": teacher, "self-forcing.generator": ode}
    assert train(words("moving_digits_self_forcing", directory / "forcing", FORCING, more)) == 0
    return directory / "forcing"


@pytest.fixture(scope="module")
def streaming(directory, teacher, self_forcing):
    # windows of 5 frames of which 4 are new, three to a video; six steps until all begins again, four kinds of them
    stream = {"data.frames": 5, "self-forcing.stream.window-frames": 5, "self-forcing.stream.total-frames": 13}
    stream |= {"self-forcing.block-frames": 4, "model": teacher, "self-forcing.generator": self_forcing}
    assert train(words("moving_digits_longsana", directory / "streaming", FORCING, stream)) == 0
    return directory / "streaming"


# Windows take four programs of their own, a minute and a half; `make prove` runs them.
STAGES = ["ode", "self_forcing", pytest.param("streaming", marks=pytest.mark.prove)]


def trained(run, which: str, step: int):
    structure = checkpoint_structure(run / "checkpoints", which=which, step=step)
    return load_checkpoint_params(run / "checkpoints", structure, which=which, step=step)[0]


def distance(one, other) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_leaves_a_model(stage, request):
    run = request.getfixturevalue(stage)
    assert json.loads((run / "model_index.json").read_text())["_class_name"] == "LongSanaVideoPipeline"
    assert np.isfinite([row["loss"] for row in rows(run)]).all()
    assert LongSanaVideoPipeline.from_pretrained(run).checkpoint_step == 4
    with pytest.raises(UserError, match="LongSanaVideoPipeline"):
        SanaVideoPipeline.from_pretrained(run)


def test_its_videos_may_be_longer_than_trained(self_forcing):
    pipeline = LongSanaVideoPipeline.from_pretrained(self_forcing)
    frames = pipeline("a seven moving left", frames=8, output_type="np", say=lambda line: None).frames
    assert np.asarray(frames).shape == (1, 8, 12, 12, 1)
    assert np.std(frames) > 0.01


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_resumes_exactly(stage, request, capfd, monkeypatch):
    run = request.getfixturevalue(stage)
    monkeypatch.delattr("train.main.open_start")  # where the generator began is no longer needed
    copy = run.with_name(f"{run.name}-copy")
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "4")  # what is left is in the middle of a video's windows
    for path in copy.glob("samples/step_000004.*"):
        path.unlink()
    status, out, err = call(capfd, "--resume", str(copy))
    assert status == 0, err
    assert "resumed at step 2 of 4" in out
    assert ("previews: none at 9 (--preview.at), since the run has 4 steps" in out) == (stage == "ode")
    assert_same_run(copy, run, 4)
    assert not left_behind(copy)


def test_steps_of_both_kinds_move_their_own_network(self_forcing, ode):
    found = rows(self_forcing)
    kinds = [{name.partition("/")[0] for name in row if "/" in name} for row in found]
    assert kinds == [{"generator"}, {"critic"}] * 2
    two, four = (trained(self_forcing, "params", step) for step in (2, 4))
    assert set(four) == {"transformer", "fake"}
    assert distance(two["transformer"], four["transformer"]) > 0
    assert distance(two["fake"], four["fake"]) > 0
    start = load_checkpoint_params(ode / "checkpoints", checkpoint_structure(ode / "checkpoints"))[0]
    # the generator began as the ODE run's averaged weights, and not as the teacher
    assert distance(two["transformer"], start) < 10 * distance(two["transformer"], four["transformer"]) + 1e-3
    assert distance(two["fake"], start) > distance(two["transformer"], start)


@pytest.mark.prove
def test_windows_go_on_where_the_last_one_ended(streaming):
    kept = trained(streaming, "params", 2)["stream"], trained(streaming, "params", 4)["stream"]
    assert kept[0]["history"].shape == (2, 5, 12, 12, 1)
    # step 4 is a new video's first window, step 2 the second of the first video
    assert np.std(kept[0]["history"][:, 0]) > 0
    assert distance(kept[0]["captions"], kept[1]["captions"]) > 0


MISTAKES = {
    "no model": (["moving_digits_self_forcing"], "trains a few-step generator from a model"),
    "guided previews": (["moving_digits_ode", "--preview.guidance-scale=2"], "--preview.guidance-scale 2.0"),
    "other steps": (["moving_digits_ode", "--preview.num-inference-steps=3"], "--preview.num-inference-steps 3"),
    "another sampler": (["moving_digits_ode", "--preview.sampler=flow_euler"], "allowed is longsana"),
    "flow options": (["moving_digits_ode", "--flow.caption-dropout=0.2"], "reads none of --flow"),
    "two kinds of given frames": (
        ["longsana_chunk_causal", "--flow.image-to-video=0.1"],
        "set --chunk-causal.image-to-video",
    ),
    "validation": (["moving_digits_self_forcing", "--validation.every=2"], "--validation.every 2"),
    "accumulated windows": (["moving_digits_longsana", "--accumulation=2"], "--accumulation 2"),
    "unknown generator": (
        ["moving_digits_self_forcing", "--self-forcing.generator=runs/no"],
        "^--self-forcing.generator runs/no is no model",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake, teacher, tmp_path):
    command, said = MISTAKES[mistake]
    if mistake == "unknown generator":
        command = [*command, f"--model={teacher}"]
    with pytest.raises((UserError, FileNotFoundError), match=said):
        train([*command, f"--run-dir={tmp_path / 'run'}"])


def test_windows_of_another_length_are_refused(teacher, tmp_path):
    command = ["moving_digits_longsana", f"--model={teacher}", "--data.frames=7", f"--run-dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="windows of 5 latent frames"):
        train(command)
