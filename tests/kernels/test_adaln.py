"""Modulated norm and gated residual: both forms beside the definitions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.adaln import gated_residual, modulated_norm, pallas, reference
from kernels.adaln.api import check_rows, check_update
from tests.kernels.cuda_lowering import lower_for_cuda, triton_kernels
from tests.kernels.pointwise_cases import assert_matches, draw, network_shapes, with_gradients

EPSILON = 1e-6
# (tokens, one modulation per sample or per frame): odd sizes, more tokens than one program has
SHAPES = [((2, 19, 20), (2, 1, 20)), ((2, 3, 5, 12), (2, 3, 1, 12)), ((2, 3, 5, 12), (1, 3, 1, 12))]
# A result that is rounded has half a unit; sums over tokens are float32.
TOLERANCES = {jnp.float32: (1e-6, 1e-6), jnp.bfloat16: (2.0**-8, 2.0**-8)}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=lambda dtype: dtype.__name__)


def norm_inputs(shapes, dtype):
    tokens, rows = shapes
    (x,), (shift, scale) = draw(tokens), draw(rows, rows, seed=1)
    return (3 * x + 1).astype(dtype), shift, scale


def residual_inputs(shapes, dtype):
    tokens, rows = shapes
    (x, update), (gate,) = draw(tokens, tokens, dtype=dtype), draw(rows, seed=1)
    return x, gate, update


NORM_REFERENCE = lambda x, shift, scale: reference.modulated_norm(x, shift, scale, EPSILON)  # noqa: E731
CASES = {
    "xla": (
        lambda *given: modulated_norm(*given, EPSILON, implementation="xla"),
        lambda *given: gated_residual(*given, implementation="xla"),
    ),
    "pallas": (
        lambda *given: pallas.modulated_norm(*given, EPSILON, True),
        lambda *given: pallas.gated_residual(*given, True),
    ),
}


@DTYPES
@pytest.mark.parametrize(("implementation", "shapes"), [("xla", SHAPES[1]), *(("pallas", shapes) for shapes in SHAPES)])
def test_value_and_gradients(implementation, shapes, dtype):
    norm, residual = CASES[implementation]
    assert_matches(norm, NORM_REFERENCE, norm_inputs(shapes, dtype), tolerances=TOLERANCES[dtype])
    given = residual_inputs(shapes, dtype)
    assert_matches(residual, reference.gated_residual, given, tolerances=TOLERANCES[dtype])


def test_forward_mode():
    """As Sprint's training takes it."""
    given = norm_inputs(SHAPES[0], jnp.float32)
    norm = lambda *given: modulated_norm(*given, EPSILON)  # noqa: E731
    found, expected = (jax.jvp(function, given, given) for function in (norm, NORM_REFERENCE))
    for mine, wanted in zip(found, expected):
        np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "width"), sorted({(shape.dtype, shape.width) for shape in network_shapes()}))
def test_lowers_for_cuda(dtype, width):
    """Value and gradients at the widths of the networks, per sample and per frame. Nothing is computed."""
    for tokens, rows in (((2, 70, width), (2, 1, width)), ((2, 3, 35, width), (2, 3, 1, width))):
        x, row = jax.ShapeDtypeStruct(tokens, dtype), jax.ShapeDtypeStruct(rows, jnp.float32)
        norm = with_gradients(lambda *given: modulated_norm(*given, EPSILON, implementation="pallas"))
        assert triton_kernels(lower_for_cuda(norm, x, x, row, row)) == 2
        residual = with_gradients(functools.partial(gated_residual, implementation="pallas"))
        assert triton_kernels(lower_for_cuda(residual, x, x, row, x)) == 2


def test_shapes_that_do_not_fit_are_named():
    x, shift, _ = norm_inputs(SHAPES[0], jnp.float32)
    check_rows(x.shape, shift=(2, 1, 20), scale=(1, 1, 20))
    with pytest.raises(ValueError, match=r"shift \(2, 1, 19\): x \(2, 19, 20\) needs \(2, 1, 20\)"):
        check_rows(x.shape, shift=(2, 1, 19))
    for wrong in ((2, 20), (3, 1, 20), (2, 19, 20)):
        with pytest.raises(ValueError, match=r"gate \(.*: x"):
            check_rows(x.shape, gate=wrong)
    with pytest.raises(ValueError, match=r"update \(1, 19, 20\): it must have the shape \(2, 19, 20\)"):
        check_update(x.shape, (1, 19, 20))
    with pytest.raises(ValueError, match="gated_residual: implementation='pallas' runs on cuda alone"):
        gated_residual(x, shift, x, implementation="pallas")


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("shapes", [*SHAPES, ((2, 1024, 2240), (2, 1, 2240)), ((1, 6, 880, 2240), (1, 6, 1, 2240))])
def test_on_a_gpu(shapes, dtype):
    norm = lambda *given: modulated_norm(*given, EPSILON, implementation="pallas")  # noqa: E731
    assert_matches(norm, NORM_REFERENCE, norm_inputs(shapes, dtype), tolerances=TOLERANCES[dtype])
    residual = functools.partial(gated_residual, implementation="pallas")
    given = residual_inputs(shapes, dtype)
    assert_matches(residual, reference.gated_residual, given, tolerances=TOLERANCES[dtype])
