"""Which parameters a run trains, in lines for its start and its plan."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from configs.optimizer import own_learning_rates
from kernels.typing import PyTree
from train.optimizers.paths import matching_paths, peak_learning_rates
from train.phases import Schedule, part
from train.sharding import parameter_paths

_HEAD = ("option", "pattern", "matches", "parameters")


def trained_count(schedules: Sequence[Schedule], params: PyTree) -> int:
    """How many parameters the optimizers of a run update; frozen ones are not among them.

    Args:
        schedules: the optimizers.
        params: what they were made for, or its shapes.
    """
    return sum(leaf.size for schedule in schedules for leaf in _trained(schedule, params).values())


def trained_table(schedules: Sequence[Schedule], params: PyTree) -> list[str]:
    """What each pattern of paths matches, and what is trained in all; nothing where a run has no patterns.

    Args:
        schedules: the optimizers.
        params: what they were made for, or its shapes.
    """
    rows = [row for schedule in schedules for row in _rows(schedule, params)]
    if not rows:
        return []
    whole = sum(leaf.size for schedule in schedules for leaf in jax.tree.leaves(_own(schedule, params)))
    trained = trained_count(schedules, params)
    table = [_HEAD, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(_HEAD))]
    lines = [
        f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}" for row in table
    ]
    return [*lines, f"trained: {trained:,} of {whole:,} parameters ({100 * trained / whole:.3g} %)"]


def _rows(schedule: Schedule, params: PyTree) -> list[tuple[str, ...]]:
    options, paths, trained = schedule.options, parameter_paths(_own(schedule, params)), _trained(schedule, params)
    asked = [("optimizer.trained", pattern, pattern, paths) for pattern in options.trained]
    asked += [("optimizer.frozen", pattern, pattern, paths) for pattern in options.frozen]
    asked += [
        ("optimizer.learning-rates", pattern, f"{pattern}={rate:g}", trained)
        for pattern, rate in own_learning_rates(options).items()
    ]
    found = []
    for option, pattern, shown, among in asked:
        matched = matching_paths(among, pattern, option)
        found.append((f"--{option}", shown, f"{len(matched)}", f"{sum(among[path].size for path in matched):,}"))
    return found


def _own(schedule: Schedule, params: PyTree) -> PyTree:
    return params if schedule.parts is None else part(params, schedule.parts)


def _trained(schedule: Schedule, params: PyTree) -> PyTree:
    """The parameters that an optimizer updates, by path."""
    own = _own(schedule, params)
    paths = parameter_paths(own)
    return {path: paths[path] for path in peak_learning_rates(schedule.options, own)}
