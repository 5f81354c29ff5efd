"""What ``--help`` of a command over presets says before a preset is chosen, and where an option of another one is."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Callable, Iterable

from configs import DEFAULT_PRESET, PRESETS, load_preset
from configs.schema import RunConfig
from sana_jax.command_line import option_names
from sana_jax.gpu_compiler import GPUS

TRAINING = (
    "Trains a model: starts a run of a preset, with options that change it, or continues one. Everything of a run goes "
    "into its --run-dir."
)
OPTIONS_OF_TRAINING = (
    ("--resume RUN_DIR", "in the place of a preset: continues that run; options may follow"),
    ("PRESET --plan", "says how much memory the run would take, part by part, and leaves"),
    ("PRESET --plan=h100x8", "the same for eight GPUs that need not be here; " + ", ".join(GPUS) + " are known"),
)
_WIDTH = 120


def overview(command: str, does: str, options: Iterable[tuple[str, str]], presets: Iterable[str] = PRESETS) -> str:
    """The presets with a line on each.

    Args:
        command: what is typed before the preset.
        does: what the command does.
        options: of the command itself, each with its help.
        presets: those that it takes.
    """
    presets = tuple(presets)
    default = f" (default: {DEFAULT_PRESET})" if DEFAULT_PRESET in presets else ""
    lines = [f"usage: {command} PRESET [--field.sub value ...]", "", *textwrap.wrap(does, _WIDTH), ""]
    lines += _table([*options, ("PRESET --help", "every option of the preset, with its help and default")])
    lines += ["", f"presets{default}:", *_table((name, about_preset(name)) for name in presets)]
    return "\n".join(lines)


def about_preset(name: str) -> str:
    """The first line on a preset."""
    return (importlib.import_module(PRESETS[name]).__doc__ or "").split("\n", 1)[0]


def where_else(preset: str) -> Callable[[str], str | None]:
    """What says which presets have an option that this one lacks, by the option's name without its dashes."""

    def say(option: str) -> str | None:
        names = [name for name in PRESETS if option in option_names(RunConfig, load_preset(name))]
        some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        return f"the preset {preset} has no such option; presets that have it: {some}" if names else None

    return say


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    rows = list(rows)
    width = max(len(name) for name, _ in rows) + 4
    lines: list[str] = []
    for name, text in rows:
        first, *others = textwrap.wrap(text, _WIDTH - width) or [""]
        lines += [f"  {name:<{width - 2}}{first}".rstrip(), *(" " * width + line for line in others)]
    return lines
