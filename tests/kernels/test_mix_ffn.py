"""The middle of a Mix-FFN: both forms beside the definition."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.mix_ffn import mix_ffn, pallas, reference
from kernels.mix_ffn.api import check_parameters
from tests.kernels.cuda_lowering import lower_for_cuda, triton_kernels
from tests.kernels.pointwise_cases import assert_matches, draw, network_shapes, with_gradients

# (batch, height, width, hidden): pictures smaller than a strip and of several, channels of more than one block
SHAPES = [(2, 7, 5, 13), (1, 1, 67, 3), (1, 5, 2, 132)]
TOLERANCES = {jnp.float32: (1e-6, 2e-6), jnp.bfloat16: (2.0**-8, 2.0**-7)}


def inputs(shape, dtype=jnp.float32, seed=0):
    *picture, hidden = shape
    wide = 2 * hidden
    return draw((*picture, wide), (wide,), (3, 3, wide), (wide,), dtype=dtype, seed=seed)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_xla(implementation):
    function = functools.partial(mix_ffn, implementation=implementation)
    assert_matches(function, reference.mix_ffn, inputs(SHAPES[0]), tolerances=TOLERANCES[jnp.float32])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pallas_interpreted(shape):
    function = lambda *arrays: pallas.mix_ffn(*arrays, True)  # noqa: E731
    assert_matches(function, reference.mix_ffn, inputs(shape), tolerances=TOLERANCES[jnp.float32])


def test_pallas_rounds_once():
    """The value is within half a unit of bfloat16; gradients have passed one intermediate result in bfloat16."""
    function = lambda *arrays: pallas.mix_ffn(*arrays, True)  # noqa: E731
    given = inputs(SHAPES[0], jnp.bfloat16)
    assert_matches(function, reference.mix_ffn, given, tolerances=TOLERANCES[jnp.bfloat16])


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_the_gradients_of_biases_are_summed_in_float32(implementation):
    """Over 2,048 places; in bfloat16 a sum stands still at 256 times its terms."""
    given = inputs((2, 32, 32, 8), jnp.bfloat16)
    functions = {"xla": mix_ffn, "pallas": lambda *arrays: pallas.mix_ffn(*arrays, True)}

    def gradients(function, given):
        loss = lambda *arrays: function(*arrays).astype(jnp.float32).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(1, 3)))(*given)

    exact = gradients(reference.mix_ffn, [array.astype(jnp.float32) for array in given])
    for found, expected in zip(gradients(functions[implementation], given), exact):
        assert np.linalg.norm(found.astype(np.float32) - expected) <= 0.02 * np.linalg.norm(expected)


def test_forward_mode():
    """As Sprint's training takes it."""
    given, tangents = inputs(SHAPES[0]), inputs(SHAPES[0], seed=5)
    found, expected = (jax.jvp(function, given, tangents) for function in (mix_ffn, reference.mix_ffn))
    for mine, wanted in zip(found, expected):
        np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", sorted({shape[:3] + shape[4:5] for shape in network_shapes()}), ids=str)
def test_lowers_for_cuda(shape):
    """Value and gradients at the shapes of the networks: forward, and two kernels backward. Nothing is computed."""
    dtype, rows, columns, hidden = shape
    wide, cotangent = 2 * hidden, jax.ShapeDtypeStruct((2, rows, columns, hidden), dtype)
    sizes = ((2, rows, columns, wide), (wide,), (3, 3, wide), (wide,))
    abstract = [jax.ShapeDtypeStruct(size, dtype) for size in sizes]
    function = with_gradients(functools.partial(mix_ffn, implementation="pallas"))
    assert triton_kernels(lower_for_cuda(function, cotangent, *abstract)) == 3
    assert triton_kernels(lower_for_cuda(with_gradients(mix_ffn), cotangent, *abstract)) == 0


@pytest.mark.parametrize(
    "shapes",
    [(5, (5,), (3, 3, 5), (5,)), (6, (6,), (2, 3, 6), (6,)), (6, (5,), (3, 3, 6), (6,)), (6, (6,), (3, 3, 6), ())],
)
def test_shapes_that_do_not_fit_are_named(shapes):
    with pytest.raises(ValueError, match=r"bias \(.*kernel \(.*must be an even number, and needs"):
        check_parameters(*shapes)


def test_a_named_implementation_runs_or_fails():
    with pytest.raises(ValueError, match=r"mix_ffn: implementation='pallas' runs on cuda alone"):
        mix_ffn(*inputs((1, 2, 2, 3)), implementation="pallas")
    with pytest.raises(ValueError, match=r"implementation='triton': choose one of \['pallas', 'xla'\]"):
        mix_ffn(*inputs((1, 2, 2, 3)), implementation="triton")
    forward_mode = functools.partial(jax.jvp, functools.partial(mix_ffn, implementation="pallas"))
    with pytest.raises(ValueError, match=r"no forward-mode derivative.*use implementation='xla' there"):
        lower_for_cuda(forward_mode, inputs((1, 2, 2, 3)), inputs((1, 2, 2, 3)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 32, 32, 5600), (1, 22, 40, 6720)], ids=str)
def test_on_a_gpu(shape, dtype):
    function = functools.partial(mix_ffn, implementation="pallas")
    assert_matches(function, reference.mix_ffn, inputs(shape, dtype), tolerances=TOLERANCES[dtype])
