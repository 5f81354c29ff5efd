"""Commands that the README and the presets show: they are read, and the stages of one recipe fit one another."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest

from configs import PRESETS, load_preset
from sana_jax.command_line import parse
from train.main import read_command_line
from train.make_trajectories import MakeTrajectoriesConfig
from train.plan import plan_words

README = Path(__file__).parents[2] / "README.md"
TRAJECTORIES, TRAIN = "train.make_trajectories", "train.main"


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(module, words behind it) of every ``python -m`` line, without its comment and what is optional in it."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found = [re.match(r"\s*python -m (\S+)(.*)", line) for line in lines]
    return [(m[1], shlex.split(re.sub(r"\[.*?\]", "", m[2]), comments=True)) for m in found if m]


def text_of(source: str) -> str:
    """The README, or what a preset says of itself."""
    return (
        README.read_text()
        if source == "README"
        else inspect.getdoc(sys.modules[load_preset(source) and PRESETS[source]])
    )


def recipes(source: str) -> list[tuple[list[str], str]]:
    """What trajectories are made with, and the preset of the next run."""
    found = commands(text_of(source))
    return [
        (words, next(rest[0] for module, rest in found[place:] if module == TRAIN))
        for place, (module, words) in enumerate(found)
        if module == TRAJECTORIES
    ]


@pytest.mark.parametrize(
    ("source", "count"), [("README", 2), *((name, 1) for name in PRESETS if name.endswith("_ode"))]
)
def test_trajectories_are_kept_where_the_preset_trains(source, count):
    """``MakeTrajectoriesConfig`` itself refuses timesteps that its Euler steps do not pass."""
    found = recipes(source)
    assert len(found) >= count
    for words, preset in found:
        made = parse(MakeTrajectoriesConfig, words, prog=f"python -m {TRAJECTORIES}")
        assert made.timesteps == load_preset(preset).ode.timesteps, (source, preset)


def test_the_commands_of_runs_are_read():
    """No option of theirs is unknown, refused, or left unread."""
    runs = [words for module, words in commands(README.read_text()) if module == TRAIN]
    runs = [words for words in runs if not {"--resume", "--help"} & {*words}]
    assert len(runs) > 20
    for words in runs:
        read_command_line(plan_words(words)[0])
