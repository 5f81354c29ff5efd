"""Runs of our side and of PyTorch's in turn, and the table rows that they become."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from kernels.benchmarking.timing import Timing
from sana_jax.benchmarking.other_side import OtherSide

OURS, EAGER, COMPILED = "sana_jax", "diffusers eager", "diffusers torch.compile"
TOTAL = "total"

Run = Callable[[], Mapping[str, float]]
"""Does everything once and returns the seconds of each stage."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How cases are measured.

    Attributes:
        size: ``tiny`` or ``full``.
        dtype: of weights and computation, by name.
        repetitions: runs of each side after a first one.
        steps: of sampling, in place of a case's own; None for those.
        against: whether PyTorch's side runs too.
        torch_threads: of PyTorch on a CPU; None for all cores.
        peaks: of ``measure_peaks``.
        say: prints a line.
    """

    size: str
    dtype: str
    repetitions: int
    steps: int | None = None
    against: bool = False
    torch_threads: int | None = None
    peaks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    say: Callable[[str], None] = print

    @property
    def takes_turns(self) -> bool:
        """Whether both sides are in memory at once; on a CPU at full size they may not fit: one runs after another."""
        return self.size == "tiny" or jax.default_backend() != "cpu"


@dataclasses.dataclass(frozen=True)
class Samples:
    """Of one side: seconds of the first run, compiling included, and of every stage in the later ones."""

    first: float
    stages: Mapping[str, Timing]


def measure_sides(
    ours: Callable[[], contextlib.AbstractContextManager[Run]], case: Mapping[str, Any], setting: Setting
) -> dict[str, Samples]:
    """Our side, and PyTorch's where it is asked for, in turn.

    Args:
        ours: opens our side: a context manager that gives its ``Run`` and frees it at the end.
        case: what PyTorch's side builds; dtype, device, threads and the kind of compilation are added here.
        setting: how to measure.
    """
    openers = {OURS: ours}
    if setting.against:
        on_gpu = jax.default_backend() != "cpu"
        shared = {**case, "dtype": setting.dtype, "device": "cuda" if on_gpu else "cpu"}
        shared["threads"] = setting.torch_threads
        for name, compiled in ((EAGER, False), (COMPILED, True)) if on_gpu else ((EAGER, False),):
            openers[name] = lambda compiled=compiled: _theirs({**shared, "compile": compiled})
    if not setting.takes_turns:
        found = {}
        for name, opener in openers.items():
            found |= _in_turn({name: opener}, setting)
        return found
    return _in_turn(openers, setting)


@contextlib.contextmanager
def _theirs(case: Mapping[str, Any]) -> Iterator[Run]:
    with OtherSide(case) as side:
        yield side.run


def _in_turn(openers: Mapping[str, Callable], setting: Setting) -> dict[str, Samples]:
    first: dict[str, float] = {}
    seconds: dict[str, list[Mapping[str, float]]] = {name: [] for name in openers}
    with contextlib.ExitStack() as stack:
        runs = {}
        for name, opener in openers.items():
            setting.say(f"{name}: making weights, and a first run")
            runs[name] = stack.enter_context(opener())
            start = time.perf_counter()
            runs[name]()
            first[name] = time.perf_counter() - start
        for _ in range(setting.repetitions):
            for name, run in runs.items():
                seconds[name].append(run())
        del runs
    gc.collect()
    jax.clear_caches()
    return {name: Samples(first[name], _timings(found)) for name, found in seconds.items()}


def _timings(runs: list[Mapping[str, float]]) -> dict[str, Timing]:
    stages = list(runs[0])
    timings = {stage: Timing(tuple(run[stage] for run in runs)) for stage in stages}
    if len(stages) > 1:
        timings[TOTAL] = Timing(tuple(sum(run.values()) for run in runs))
    return timings


def rows(start: Mapping[str, Any], samples: Mapping[str, Samples]) -> list[dict[str, Any]]:
    """A row for every stage of every side; ours say how many times longer the others take."""
    found = []
    for name, side in samples.items():
        for stage, timing in side.stages.items():
            row = {**start, "what": stage, "implementation": name, **timing.summary()}
            figures = {}
            if stage == list(side.stages)[-1]:
                figures["first run, compiling included, s"] = side.first
            if name == OURS:
                others = {other: theirs.stages for other, theirs in samples.items() if other != OURS}
                for other, theirs in others.items():
                    if stage in theirs:
                        figures[f"{other} / ours"] = theirs[stage].median / timing.median
            if figures:
                row["figures"] = figures
            found.append(row)
    return found


def row_of(found: list[dict[str, Any]], stage: str, implementation: str = OURS) -> dict[str, Any]:
    """The row of a stage."""
    return next(row for row in found if row["what"] == stage and row["implementation"] == implementation)


def add_figures(row: dict[str, Any], **figures: Any) -> None:
    """Puts figures before those that a row has; ``_`` in a name is a space, ``__`` a slash."""
    named = {name.replace("__", "/").replace("_", " "): value for name, value in figures.items()}
    row["figures"] = named | row.get("figures", {})
