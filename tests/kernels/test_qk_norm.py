"""RMS norm of queries and keys, with ReLU and rotation behind it: both forms beside the definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.qk_norm import pallas, qk_norm, reference
from kernels.qk_norm.api import check_shapes
from sana_jax.nn.norms import rms_norm
from tests.kernels.cuda_lowering import lower_for_cuda, triton_kernels
from tests.kernels.pointwise_cases import assert_matches, draw, network_shapes, with_gradients

EPSILON = 1e-5
SHAPE = (2, 19, 30)  # three heads of 10; more tokens than one program has
# A result that is rounded has half a unit; the scale's gradient is a float32 sum.
TOLERANCES = {jnp.float32: (1e-6, 1e-6), jnp.bfloat16: (2.0**-8, 2.0**-8)}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=lambda dtype: dtype.__name__)
FORMS = pytest.mark.parametrize(("turned", "relu"), [(False, False), (False, True), (True, False), (True, True)])


def inputs(shape, dtype, head_dim):
    """Queries, scale and, where heads have a size, angles' cosines and sines."""
    (x,), (scale,) = draw(shape, dtype=dtype), draw((shape[-1],), seed=1)
    if head_dim is None:
        return x, scale
    (angles,) = draw((shape[1], head_dim // 2), seed=2)
    return x, scale, jnp.cos(angles), jnp.sin(angles)


def defined(relu):
    return lambda x, scale, *rotation: reference.qk_norm(x, scale, rotation or None, EPSILON, relu)


def named(relu, implementation):
    return lambda x, scale, *rotation: qk_norm(
        x, scale, rotation or None, epsilon=EPSILON, relu=relu, implementation=implementation
    )


@FORMS
def test_xla(turned, relu):
    given = inputs(SHAPE, jnp.float32, 10 if turned else None)
    assert_matches(named(relu, "xla"), defined(relu), given, tolerances=TOLERANCES[jnp.float32])


@DTYPES
@FORMS
def test_pallas_interpreted(turned, relu, dtype):
    """Angles' gradients too, which come from the XLA form."""
    given = inputs(SHAPE, dtype, 10 if turned else None)
    function = lambda x, scale, *rotation: pallas.qk_norm(x, scale, rotation or None, EPSILON, relu, True)  # noqa: E731
    # In bfloat16 the angles' gradients are those of a norm that was rounded before it was turned.
    tolerances = TOLERANCES[dtype] if not turned else (TOLERANCES[dtype][0], 2 * TOLERANCES[dtype][1])
    assert_matches(function, defined(relu), given, tolerances=tolerances)


def test_any_leading_axes_without_a_rotation():
    (x,), (scale,) = draw((2, 3, 5, 12)), draw((12,), seed=1)
    found = pallas.qk_norm(x, scale, None, EPSILON, False, True)
    np.testing.assert_allclose(found, rms_norm(x, scale, EPSILON), rtol=1e-5, atol=1e-6)


def test_forward_mode():
    """As Sprint's training takes it."""
    given = inputs(SHAPE, jnp.float32, 10)
    found, expected = (jax.jvp(function, given, given) for function in (named(True, None), defined(True)))
    for mine, wanted in zip(found, expected):
        np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "width", "head_dim"), sorted({(shape.dtype, shape.width, shape.head_dim) for shape in network_shapes()})
)
def test_lowers_for_cuda(dtype, width, head_dim):
    """Value and gradients at the widths of the networks, with and without a rotation. Nothing is computed."""
    for given in (inputs((2, 70, width), dtype, size) for size in (None, head_dim)):
        abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in given]
        function = with_gradients(named(len(given) > 2, "pallas"))
        assert triton_kernels(lower_for_cuda(function, abstract[0], *abstract)) == 2


def test_shapes_that_do_not_fit_are_named():
    x, scale = inputs(SHAPE, jnp.float32, None)
    with pytest.raises(ValueError, match=r"scale \(29,\): 30 channels of x need \(30,\)"):
        check_shapes(SHAPE, (29,), None)
    for rotation in (((19, 5), (18, 5)), ((18, 5), (18, 5)), ((19, 4), (19, 4))):
        with pytest.raises(ValueError, match=r"cos \(.*whole heads of 2·p channels"):
            check_shapes(SHAPE, (30,), rotation)
    with pytest.raises(ValueError, match="qk_norm: implementation='pallas' runs on cuda alone"):
        qk_norm(x, scale, epsilon=EPSILON, implementation="pallas")


@pytest.mark.gpu
@DTYPES
@FORMS
@pytest.mark.parametrize("case", [(SHAPE, 10), ((2, 1024, 2240), 32), ((1, 880, 2240), 112)], ids=str)
def test_on_a_gpu(case, turned, relu, dtype):
    shape, head_dim = case
    given = inputs(shape, dtype, head_dim if turned else None)
    tolerances = TOLERANCES[dtype] if not turned else (TOLERANCES[dtype][0], 2 * TOLERANCES[dtype][1])
    assert_matches(named(relu, "pallas"), defined(relu), given, tolerances=tolerances)
