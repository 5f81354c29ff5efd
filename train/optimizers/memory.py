"""What an optimizer's state takes, before any of it exists."""

from __future__ import annotations

import math

import jax

from configs.optimizer import OptimizerConfig
from kernels.typing import PyTree
from train.optimizers.build import make_optimizer
from train.optimizers.paths import peak_learning_rates
from train.sharding import parameter_paths


def state_bytes(config: OptimizerConfig, abstract_params: PyTree) -> dict[str, float]:
    """Bytes of an optimizer's state over all devices.

    Args:
        config: the optimizer.
        abstract_params: the parameters, or their shapes.

    Returns:
        ``parameters`` that are trained, ``bytes`` of state, ``bytes_per_parameter``, and the share of ``bytes`` in
        each dtype, as ``float32``, ``int8``, ...
    """
    optimizer = make_optimizer(config, 1, abstract_params)
    leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, abstract_params))
    paths = parameter_paths(abstract_params)
    trained = sum(math.prod(paths[path].shape) for path in peak_learning_rates(config, abstract_params))
    by_dtype: dict[str, float] = {}
    for leaf in leaves:
        by_dtype[leaf.dtype.name] = by_dtype.get(leaf.dtype.name, 0) + leaf.size * leaf.dtype.itemsize
    total = sum(by_dtype.values())
    return {"parameters": trained, "bytes": total, "bytes_per_parameter": total / trained, **by_dtype}
