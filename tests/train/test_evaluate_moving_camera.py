"""The evaluation of moving_camera, on a run of a few steps."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from sana_jax.errors import UserError
from tests.train.run_training import cache_directory, in_this_process
from train.evaluate_moving_camera import choose, held_out
from train.evaluate_moving_camera import main as evaluate
from train.main import main as train
from train.run_directory import read_config

OPTIONS = {
    "steps": 2,
    "batch-size": 2,
    "transformer.num-layers": 1,  # one block to compile
    "transformer.softmax-every-n": 1,
    "transformer.hidden-size": 16,
    "transformer.num-attention-heads": 2,
    "transformer.linear-head-dim": 8,
    "data.canvas": 8,
    "data.frames": 3,
    "data.photographs": "flower",
    "optimizer.warmup-steps": 0,
    "logging.tensorboard": False,
    "preview.every": 0,
    "preview.num-inference-steps": 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("camera") / "run"
    with in_this_process(cache_directory(tmp_path_factory)):
        words = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
        assert train(["moving_camera", "--run-dir", str(directory), *words]) == 0
        yield directory


def test_figures_of_an_untrained_run(run, tmp_path, capsys):
    file, picture = tmp_path / "figures.json", tmp_path / "clips.png"
    evaluate(["--model", str(run), "--pairs", "2", "--json", str(file), "--picture", str(picture)])
    figures = json.loads(file.read_text())
    assert figures["clips"] == 4
    assert figures["requested"]["pixels"] > 3 * figures["floor"]["pixels"]  # it has learnt nothing
    assert figures["pixel_error"] > 0.1
    assert "opposite keys" in capsys.readouterr().out
    with Image.open(picture) as opened:
        assert opened.width == 6 * 3 * (8 + 1)


def test_what_is_asked_for(run):
    data = held_out(str(run))
    assert data.config == read_config(run).data
    asked = choose(data, 3, 5)
    assert asked.views[::2] == asked.views[1::2]
    np.testing.assert_array_equal(asked.videos[::2, 0], asked.videos[1::2, 0])
    assert set(asked.actions) <= set(data.actions)
    assert choose(data, 3, 5).actions == asked.actions != choose(data, 3, 6).actions


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--pairs", "1"], "--pairs 1"),
        (["--pairs", "100000"], "pairs of action strings"),
        (["--picture", "clips.jpg"], "clips.jpg"),
    ],
)
def test_mistakes(run, words, named):
    with pytest.raises(UserError, match=named):
        evaluate(["--model", str(run), *words])


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises((UserError, FileNotFoundError), match=str(tmp_path)):
        evaluate(["--model", str(tmp_path)])
