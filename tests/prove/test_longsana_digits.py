"""LongSANA in miniature: after self-forcing, clips eight times longer than trained hold digit and direction."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time

import pytest

from tests.prove import moving_digits
from tests.prove.moving_digits import command, figures
from tests.train.run_training import assert_same_run, cache_directory, left_behind, run, saved_steps, start

pytestmark = [pytest.mark.prove, pytest.mark.timeout(7200)]
FRAMES, TRAINED_FRAMES = 40, 5
LEAST = 0.80
STAGES = ("ode", "self_forcing", "longsana")
KILLS = 3


class Stages:
    """The command of each stage, in a directory."""

    def __init__(self, directory, teacher):
        self.directory, self.teacher = directory, teacher

    def run_dir(self, stage: str):
        return self.directory / stage

    def options(self, stage: str, run_dir) -> list[str]:
        """Of ``train.main``."""
        before = {"self_forcing": "ode", "longsana": "self_forcing"}
        words = [f"moving_digits_{stage}", "--model", str(self.teacher.run), "--run-dir", str(run_dir)]
        if stage == "ode":
            return [*words, "--data.path", str(self.directory / "trajectories")]
        earlier = str(self.run_dir(before[stage]))
        words += ["--self-forcing.generator", earlier]
        return words if stage == "self_forcing" else [*words, "--self-forcing.fake-score", earlier]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """All three trained as their presets say."""
    found = Stages(tmp_path_factory.mktemp("longsana"), moving_digits.teacher(tmp_path_factory))
    out = found.directory / "trajectories"
    options = ("--per-caption", 16, "--num-steps", 20, "--flow-shift", 6, "--timesteps", 1000, 947, 857, 667)
    print(command("train.make_trajectories", "--model", found.teacher.run, "--out", out, *options))
    for stage in STAGES:
        print(command("train.main", *found.options(stage, found.run_dir(stage))))
    return found


@pytest.fixture(scope="module")
def long_clips(stages, tmp_path_factory):
    """What is measured of clips of 40 frames, by stage."""
    folder = tmp_path_factory.mktemp("figures")
    options = ("--frames", FRAMES, "--per-caption", 2)
    return {stage: figures(stages.run_dir(stage), folder / f"{stage}.json", *options) for stage in STAGES}


@pytest.mark.parametrize("stage", ["self_forcing", "longsana"])
def test_long_clips_hold_digit_and_direction(stage, long_clips):
    assert FRAMES == 8 * TRAINED_FRAMES
    found = long_clips[stage]
    assert len(found["recognised_by_frame"]) == FRAMES
    assert found["recognised"] >= LEAST
    assert found["direction"] >= LEAST


def test_self_forcing_is_what_does_it(long_clips):
    """The student that has learnt from the teacher's trajectories alone loses the digit on the way."""
    last = slice(-TRAINED_FRAMES, None)
    share = {stage: sum(long_clips[stage]["recognised_by_frame"][last]) / TRAINED_FRAMES for stage in STAGES}
    print(f"digits read in the last {TRAINED_FRAMES} of {FRAMES} frames: {share}")
    assert share["self_forcing"] > share["ode"]


@pytest.mark.parametrize("stage", STAGES)
def test_kills_change_nothing(stage, stages, tmp_path, tmp_path_factory):
    """Kill -9 at random moments of a stage, beside the same steps without any."""
    cache = cache_directory(tmp_path_factory)
    fewer = ("--steps", "18", "--checkpoint.every", "3", "--checkpoint.keep-last", "9", "--logging.every", "1")
    options = {name: [*stages.options(stage, tmp_path / name), *fewer] for name in ("straight", "killed")}
    options = {name: [*words, "--optimizer.schedule", "constant"] for name, words in options.items()}
    run(cache, *options["straight"])
    draw, newest = random.Random(stage), []
    for step in (draw.randrange(first, first + 3) for first in range(2, 2 + 6 * KILLS, 6)):
        training = start(cache, *options["killed"])
        training.wait_for(f"step {step}/")
        time.sleep(draw.uniform(0.0, 0.3))
        training.send(signal.SIGKILL)
        out, _ = training.finish(status=-signal.SIGKILL)
        newest.append(max(saved_steps(tmp_path / "killed"), default=0))
        seen = re.findall("step ([0-9]+)/", training.out + out)
        print(f"{stage}: killed after {seen[-1]} steps, newest checkpoint {newest[-1]}")
    run(cache, *options["killed"])
    assert 0 < max(newest) < 18, "the kills came too early or too late to show anything"
    assert_same_run(tmp_path / "killed", tmp_path / "straight", 18)
    assert left_behind(tmp_path) == []
    shutil.rmtree(tmp_path / "straight")
