"""The Triton functions of linear attention: under Triton's interpreter, through its compiler, and on a GPU."""

from __future__ import annotations

import sys

import jax.numpy as jnp
import pytest

from kernels.linear_attention import triton
from tests.kernels.triton_interpreter import run_module

CASES = 6  # of linear_attention_interpreted
HALF_ROUNDING = 4.9e-4  # of float16


@pytest.fixture
def found(request):
    """``{(function, dtype): (error of the value, worst error of a gradient)}``, as the module prints them."""
    lines = run_module("tests.kernels.linear_attention_interpreted", interpret=request.param).splitlines()
    rows = [line.split() for line in lines if "linear_attention" in line]
    assert len(rows) == CASES
    return [(dtype, float(value), float(gradient)) for _, dtype, value, gradient in rows]


@pytest.mark.parametrize("found", [True, pytest.param(False, marks=pytest.mark.gpu)], indirect=True)
def test_value_and_gradient(found):
    """In a process of its own: Triton decides whether to interpret when it is imported."""
    for dtype, value, gradient in found:
        rounding = HALF_ROUNDING if dtype == "float16" else 0.0
        assert value <= 2e-6 + rounding
        assert gradient <= 1e-5 + rounding


def test_absence_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    x = jnp.ones((1, 3, 2, 8))
    with pytest.raises(ValueError, match=r"needs jax-triton, .* \(.*jax_triton.*\): pip install 'sana-jax\[gpu\]'"):
        triton.relu_linear_attention(x, x, x)
