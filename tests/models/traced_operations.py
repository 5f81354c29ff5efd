"""Every operation of a traced program, with where it stands: to read from it what is computed in which dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PRODUCTS = ("dot_general", "conv_general_dilated")
# statistics, softmax and the sums' quotients
ISLANDS = ("exp", "rsqrt", "reduce_sum", "reduce_max", "div")


class Operation(NamedTuple):
    name: str
    scope: str
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    output: jax.ShapeDtypeStruct
    flops: float


def operations(run: Callable, *arguments: Any) -> list[Operation]:
    """The operations of a function for arguments of these shapes."""
    return operations_of(jax.make_jaxpr(run)(*arguments).jaxpr)


def operations_of(jaxpr: Any, outside: str = "", times: int = 1) -> list[Operation]:
    """Every operation of a traced program with those inside it, each once; FLOPs are those of all turns of a scan.

    Of forms for several kinds of device it is the one for all that have none of their own.
    """
    found = []
    for equation in jaxpr.eqns:
        inputs = tuple(variable.aval for variable in equation.invars)
        scope = "/".join(part for part in (outside, str(equation.source_info.name_stack)) if part)
        outputs = [variable.aval for variable in equation.outvars]
        if outputs:
            found.append(Operation(equation.primitive.name, scope, inputs, outputs[0], times * flops_of(equation)))
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        by_platform = equation.params.get("branches_platforms") is not None
        parameters = [equation.params["branches"][-1]] if by_platform else equation.params.values()
        for parameter in parameters:
            for inner in parameter if isinstance(parameter, tuple | list) else (parameter,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += operations_of(inner, scope, times * turns)
    return found


def flops_of(equation: Any) -> float:
    """Of a matrix product; convolutions and all else count nothing."""
    if equation.primitive.name != "dot_general":
        return 0.0
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)


def wide_products(found: Iterable[Operation]) -> list[Operation]:
    """Products of which an operand is float32."""
    return [one for one in found if one.name in PRODUCTS and any(x.dtype == jnp.float32 for x in one.inputs)]
