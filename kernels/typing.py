"""Array annotations with shapes.

jaxtyping's names where it is installed, and stand-ins that accept any subscript where it is not, so that the kernels
and the library import on a machine that has nothing but jax, flax, numpy, einops and safetensors.
"""

from __future__ import annotations

from typing import Any

try:
    from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped, UInt8
except ModuleNotFoundError:
    from jax import Array

    class _Anything:
        def __class_getitem__(cls, _shape):
            return Any

    Bool = Float = Int = Shaped = UInt8 = PyTree = _Anything
    PRNGKeyArray = Array

__all__ = ["Array", "Bool", "Float", "Int", "PRNGKeyArray", "PyTree", "Shaped", "UInt8"]
