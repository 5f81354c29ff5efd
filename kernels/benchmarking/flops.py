"""FLOPs of the matrix products and convolutions of a whole function, read off its trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jax_core


def count_products(function: Callable, *arguments: Any) -> float:
    """Additions and multiplications in products and convolutions; those of loops as often as they run.

    What is computed again (remat) counts again, so that a training step's useful work is counted on its forward pass.

    Args:
        function: what is traced.
        arguments: arrays or shapes.

    Raises:
        ValueError: a loop whose length is not known when it is traced.
    """
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of(jaxpr: jax_core.Jaxpr) -> float:
    return sum((_of_equation(equation) for equation in jaxpr.eqns), 0.0)


def _of_equation(equation: jax_core.JaxprEqn) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(out) * math.prod(kernel) / features
    inner = [_of(jaxpr) for jaxpr in jax_core.jaxprs_in_params(params)]
    if not any(inner):
        return 0.0
    if name == "while":
        raise ValueError("a loop of unknown length has products in it: count its body alone")
    if name == "cond":
        return max(inner)
    times = params.get("length", 1) if name == "scan" else 1
    if name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
    return times * sum(inner)
