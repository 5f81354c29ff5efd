"""Command lines: tyro's values and help, one line for mistakes."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest

from sana_jax.command_line import parse
from sana_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Euler:
    """A sampler."""

    shift: float = 3.0
    """How far timesteps are moved towards noise."""


@dataclasses.dataclass(frozen=True)
class Solver:
    """Another sampler."""

    order: int = 2
    """Order of the solver."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Training."""

    batch_size: int = 32
    """Pictures per step."""
    compile_cache: bool = True
    """Whether compiled programs are kept."""
    interval: tuple[float, float] | None = None
    """From and to."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size {self.batch_size} is not allowed; choose 1 or more")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The whole configuration."""

    name: str
    """A name that is required."""
    train: Train = dataclasses.field(default_factory=Train)
    """Training."""
    sampler: Euler | Solver = dataclasses.field(default_factory=Euler)
    """The sampler."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    prompt: tuple[str, ...] = ()
    """Prompts."""
    rate: float = 1e-3
    """Learning rate."""


def run(*words: str, default: Settings | None = None) -> Settings:
    return parse(Settings, list(words), default, prog="python -m thing", aliases={"label": "name"})


def mistake(*words: str, default: Settings | None = None) -> str:
    with pytest.raises(UserError) as caught:
        run(*words, default=default)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_values_nested_and_in_both_spellings():
    settings = run(
        "--name", "a b", "--train.batch-size", "4", "--train.no-compile_cache", "--train.interval", "-0.5", "1e3",
        "--sampler.shift=1", "--dtype", "bfloat16", "--prompt", "one", "two words", "--prompt", "three", "--rate", "-1",
    )  # fmt: skip
    assert settings == Settings(
        name="a b",
        train=Train(4, False, (-0.5, 1000.0)),
        sampler=Euler(1.0),
        dtype="bfloat16",
        prompt=("one", "two words", "three"),
        rate=-1.0,
    )
    assert run("--name", "x", "--train.batch_size", "5", "--train.interval", "None").train.batch_size == 5
    assert run("--name=--dashes").name == "--dashes"
    assert run("--label", "x", "--train.compile-cache").train.compile_cache is True
    assert run("--name", "x", "--train.compile-cache", "false").train.compile_cache is False


def test_a_text_that_begins_with_a_dash():
    """As the message about one without ``=`` says."""
    assert run("--name=-weird", "--prompt=--a seven", "--prompt=-h").prompt == ("--a seven", "-h")
    caption = dataclasses.make_dataclass("Captioned", [("caption", str | None, None)], frozen=True)
    assert parse(caption, ["--caption=-weird"], prog="python -m thing").caption == "-weird"


def test_default_keeps_its_values_and_its_classes():
    default = Settings("named", train=Train(batch_size=7), sampler=Solver(3), rate=0.5)
    assert run(default=default) is not None
    assert run(default=default) == default
    changed = run("--sampler.order", "1", "--train.interval", "0", "1", default=default)
    assert changed == dataclasses.replace(default, sampler=Solver(1), train=Train(batch_size=7, interval=(0.0, 1.0)))
    assert "--sampler.shift" in mistake("--sampler.shift", "2", default=default)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--batch-size", "3"), ("unknown option --batch-size", "--train.batch-size", "--help")),
        (("--train.bath_size", "3"), ("unknown option --train.bath_size", "--train.batch-size")),
        (("--zzzz", "3"), ("unknown option --zzzz", "--train.*", "--dtype")),
        (("-n", "3"), ("unknown option -n",)),
        (("--train.bs", "3"), ("unknown option --train.bs; closest: --train.batch-size",)),
        (("--cc", "3"), ("closest: --train.compile-cache",)),
        (("--train.batch-size", "many"), ("--train.batch-size", "'many'", "an integer", "default 32", "--help")),
        (("--train.batch-size", "1.5"), ("'1.5'", "an integer")),
        (("--train.batch-size", "1", "2"), ("'1 2'", "an integer")),
        (("--train.batch-size",), ("--train.batch-size has no value", "an integer")),
        (("--train.batch-size", "0"), ("batch_size 0 is not allowed; choose 1 or more",)),
        (("--rate", "fast"), ("--rate", "'fast'", "a number", "0.001")),
        (("--dtype", "float64"), ("--dtype", "'float64'", "one of float32, bfloat16")),
        (("--train.interval", "1"), ("--train.interval", "2 values (a number, a number) or None")),
        (("--train.compile-cache", "maybe"), ("True or False",)),
        (("--train.no-compile-cache", "maybe"), ("takes no value", "'maybe'")),
        (("--rate", "1", "--rate", "2"), ("--rate is given twice",)),
        (("digits",), ("unexpected 'digits'", "--help")),
        (("--name", "two", "words"), ("'two words'", "quotes")),
        (
            ("--prompt", "--a seven"),
            ("unknown option --a seven; if", "for --prompt, write '--prompt=--a seven'; python"),
        ),
        (("--name", "-weird"), ("unknown option -weird; if it is a text for --name, write --name=-weird;",)),
        (("--prompt", "one", "--rates", "2"), ("unknown option --rates; closest: --rate; python",)),
        (("--rate", "2", "--rate 3"), ("unknown option --rate 3; closest: --rate; python",)),
    ],
)
def test_mistakes_are_one_line(words, parts):
    name = () if "--name" in words else ("--name", "x")
    message = mistake(*words, *name)
    for part in parts:
        assert part in message


def test_missing_required_option():
    assert "--name is missing" in mistake("--rate", "1")


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--rate", "1", "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("--name", "--train.batch-size", "Pictures per step.", "--sampler.shift", "default: 0.001", "bfloat16"):
        assert part in text
