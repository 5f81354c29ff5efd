"""The training state: parameters, their average, the optimizer's memory and the step."""

from __future__ import annotations

from typing import NamedTuple

import jax

from kernels.typing import Array, Int, PyTree


class TrainState(NamedTuple):
    """What a step reads and returns; the step counts optimizer steps, those left out included."""

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree | None
    opt_state: PyTree


def parameter_count(params: PyTree) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def sampled_params(state: TrainState) -> PyTree:
    """The parameters that pictures are drawn with: the average, where the run keeps one."""
    return state.params if state.ema is None else state.ema
