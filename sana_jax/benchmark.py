"""``python -m sana_jax.benchmark``: seconds of every stage of the pipelines, with random weights.

SANA 1.6B at 1024 px, SANA-Sprint, SANA-Video 480p, LongSANA's frames per second, SANA-WM against real time, DC-AE's
decoder, networks alone beside the roofline, and how cost grows with the number of tokens.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from sana_jax.benchmarking import command, growth
from sana_jax.benchmarking.cases import CASES
from sana_jax.benchmarking.command import BenchmarkConfig
from sana_jax.benchmarking.plot import draw_growth
from sana_jax.command_line import parse
from sana_jax.errors import UserError, run_command_line
from sana_jax.files import atomic_file

PROGRAM = "python -m sana_jax.benchmark"
ALL_CASES = {**CASES, "growth_time": growth.time_case, "growth_memory": growth.memory_case}
_USUAL = tuple(name for name in ALL_CASES if name != "sana_600m")
USUAL = {"cpu": _USUAL, "gpu": _USUAL}


@dataclasses.dataclass(frozen=True)
class SanaBenchmarkConfig(BenchmarkConfig):
    """Times the pipelines stage by stage, with random weights, and writes a table."""

    steps: int | None = None
    """Sampling steps of image and video cases, in place of their own: fewer for a quick look."""
    output: pathlib.Path = pathlib.Path("runs/benchmarks/sana_jax")
    """Where the report goes, as .json and .md, and the plot of growing cost as .growth.png."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps {self.steps} is not allowed; choose 1 or more, or leave it out")


def _plot(report: dict[str, Any], output: pathlib.Path) -> list[pathlib.Path]:
    panels = growth.series(report["rows"])
    if not panels:
        return []
    path = output.with_name(output.name + ".growth.png")
    with atomic_file(path) as file:
        draw_growth(panels, f"growth of cost, {report['device']}, {report['date']}").save(file, "PNG")
    return [path]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    config = parse(SanaBenchmarkConfig, argv, prog=PROGRAM)
    return command.run(config, PROGRAM, argv, ALL_CASES, USUAL, _plot, steps=config.steps)


if __name__ == "__main__":
    run_command_line(main)
