"""Where an optimizer's state lies on a mesh: beside the parameters that it belongs to."""

from __future__ import annotations

import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels.typing import PyTree
from train.sharding import path_name, replicated

# Fields of the optimizers' own states, below the path of a parameter: which axis of it they lack, counted from the end.
_WITHOUT_AXIS = {
    "second_per_output": 2,
    "second_per_input": 1,
    "residual_per_output": 2,
    "residual_per_input": 1,
    "block_scales": 2,
    "block_minimums": 2,
}


def state_shardings(abstract_opt_state: PyTree, param_shardings: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of every array of an optimizer's state.

    An array that belongs to a parameter, which is seen by the parameter's path in its own, lies as the parameter does
    along the axes that the two share. An axis of blocks is cut as the axis it stands for where the number of blocks
    divides, and is whole elsewhere. All else, such as counters, is on every device.

    Args:
        abstract_opt_state: the state, or its shapes.
        param_shardings: ``NamedSharding`` of every parameter.
        mesh: the devices.

    Raises:
        ValueError: an array at a parameter's path that does not fit the parameter's sharding.
    """
    by_path = {
        _names(path): sharding.spec for path, sharding in jax.tree_util.tree_flatten_with_path(param_shardings)[0]
    }
    longest = max(map(len, by_path))

    def one(path, leaf):
        names = _names(path)
        # The longest run of names that is a parameter's path: a table of the blocks ends like one outside them.
        for length in range(min(longest, len(names)), 0, -1):
            for start in range(len(names) - length, -1, -1):
                spec = by_path.get(names[start : start + length])
                if spec is not None:
                    return NamedSharding(mesh, _spec(leaf, spec, names, mesh))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, abstract_opt_state)


def _names(path) -> tuple[str, ...]:
    return tuple(path_name((key,)) for key in path)


def _spec(leaf, spec: PartitionSpec, names: tuple[str, ...], mesh: Mesh) -> PartitionSpec:
    missing = _WITHOUT_AXIS.get(names[-1])
    rank = leaf.ndim + (missing is not None)
    axes = [*spec, *(None,) * (rank - len(spec))]
    if len(axes) != rank:
        raise ValueError(f"{'/'.join(names)} of shape {leaf.shape} does not fit its parameter's sharding {spec}")
    if missing is not None:
        del axes[-missing]
    fitting = []
    for axis, size in zip(axes, leaf.shape):
        used = () if axis is None else axis if isinstance(axis, tuple) else (axis,)
        fitting.append(axis if size % math.prod(mesh.shape[name] for name in used) == 0 else None)
    return PartitionSpec(*fitting)
