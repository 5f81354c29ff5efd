"""The small SANA-WM really follows the camera, on paths that training has never seen."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.prove.moving_digits import command
from tests.train.run_training import made_once, shared_directory

pytestmark = [pytest.mark.prove, pytest.mark.timeout(4800)]
MOST_SECONDS = 2400
LEAST_RATIO = 3.0  # shuffled paths are this many times further from what is seen than those asked for
FLOOR_SHARE = 0.25  # of the error: what the measurement itself adds


class Learnt(NamedTuple):
    """The preset ``moving_camera`` as it is, but for where it goes, and its figures."""

    run: Path
    seconds: float
    figures: dict


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    def train(directory: Path) -> None:
        compiled = directory.with_name("moving_camera_compiled")  # nothing from other runs
        started = time.perf_counter()
        print(command("train.main", "moving_camera", "--run-dir", directory, JAX_COMPILATION_CACHE_DIR=str(compiled)))
        (directory / "seconds.json").write_text(json.dumps(time.perf_counter() - started))

    run = made_once(shared_directory(tmp_path_factory) / "moving_camera", train)
    file = tmp_path_factory.mktemp("figures") / "figures.json"
    print(command("train.evaluate_moving_camera", "--model", run, "--json", file))
    return Learnt(run, json.loads((run / "seconds.json").read_text()), json.loads(file.read_text()))


def test_takes_at_most_forty_minutes(learnt):
    assert learnt.seconds <= MOST_SECONDS


@pytest.mark.parametrize("error", ["rotation", "translation", "pixels"])
def test_moves_as_it_is_asked_to(learnt, error):
    figures = learnt.figures
    assert figures["clips"] == 48
    assert figures["ratio"][error] >= LEAST_RATIO
    assert figures["requested"][error] < figures["still"][error] / 1.5  # better than not to move at all
    assert figures["floor"][error] <= FLOOR_SHARE * figures["shuffled"][error]


def test_opposite_keys_move_the_other_way(learnt):
    assert learnt.figures["reversed"] >= 0.95
    assert learnt.figures["opposite"] <= -0.8
