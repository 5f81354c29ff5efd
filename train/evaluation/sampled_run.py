"""What the commands share that sample a run's model and measure what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

from kernels.selection import Preference
from sana_jax.devices import computing
from sana_jax.files import write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledRunConfig:
    """Options of every such command; each has its own default of ``model``."""

    model: str
    """The run's directory."""
    seed: int = 1
    """Seed of the noise."""
    guidance_scale: float | None = None
    """Guidance scale; None: the run's own."""
    steps: int | None = None
    """Sampling steps; None: the run's own."""
    weights: Literal["auto", "ema", "params"] = "auto"
    """Averaged weights where there are any (auto), or one of the two."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """What to run on."""
    kernels: Preference = "auto"
    """What runs operations that have several forms: the one measured to be faster (auto), XLA's own (xla), or kernels
    for NVIDIA GPUs wherever there are such."""
    json: str | None = None
    """Also write the figures to this file."""


Config = TypeVar("Config", bound=SampledRunConfig)


def report(config: Config, evaluate: Callable[[Config], Any], describe: Callable[[Any], Iterable[str]]) -> None:
    """Measures on the device that is asked for, prints the figures, and writes them to the file that is asked for.

    Args:
        config: the command's options.
        evaluate: samples and measures; gives a dataclass of figures.
        describe: the lines that say what the figures are.

    Raises:
        UserError: the device is not there, or the file cannot be written; and what ``evaluate`` raises.
    """
    with computing(config.device, config.kernels):
        figures = evaluate(config)
    for line in describe(figures):
        print(line)
    if config.json:
        write_json(config.json, dataclasses.asdict(figures))
