"""ReLU linear attention: the linear form beside the quadratic definition."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.published import PUBLISHED_TRANSFORMERS
from kernels.linear_attention import reference, relu_linear_attention, rope_linear_attention
from kernels.linear_attention.api import IMPLEMENTATIONS
from kernels.selection import DEVICE_PROGRAMS
from tests.kernels.shapes import QUICK_COMPILE, attention_shapes, relative_error

# those that run wherever XLA does; the fused ones have tests of their own
EVERYWHERE = [name for name in IMPLEMENTATIONS if name not in DEVICE_PROGRAMS]
# (batch, queries, keys, heads, head size, value size): odd ones, one token, one head, values of another width
SHAPES = [(2, 33, 33, 3, 8, 8), (1, 7, 19, 5, 11, 3), (3, 1, 1, 1, 32, 32), (1, 130, 130, 2, 112, 112)]


def draw(shape, dtype=jnp.float32, seed=0):
    batch, queries, keys, heads, size, value_size = shape
    rng = np.random.default_rng(seed)
    sizes = ((queries, size), (keys, size), (keys, value_size))
    # A common offset leaves every query several positive channels: the result does not depend on a query's length, so
    # one that has a single small channel has a gradient that is all rounding.
    offsets = (1.0, 1.0, 0.0)
    return tuple(
        jnp.asarray(rng.standard_normal((batch, tokens, heads, width)) + offset, dtype)
        for (tokens, width), offset in zip(sizes, offsets)
    )


def with_gradients(function):
    """Compiled ``(q, k, v, output_weights) -> output, gradients of sum(output * output_weights)``."""

    def run(query, key, value, weights):
        def loss(query, key, value):
            out = function(query, key, value)
            return (out.astype(jnp.float32) * weights).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
        return out, gradients

    return jax.jit(run, compiler_options=QUICK_COMPILE)


def output_weights(shape):
    batch, queries, _, heads, _, value_size = shape
    return np.random.default_rng(1).standard_normal((batch, queries, heads, value_size)).astype(np.float32)


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(shape, implementation):
    arguments = (*draw(shape), output_weights(shape))
    out, gradients = with_gradients(functools.partial(relu_linear_attention, implementation=implementation))(*arguments)
    expected, expected_gradients = with_gradients(reference.relu_linear_attention)(*arguments)
    assert out.dtype == jnp.float32
    assert relative_error(out, expected) <= 2e-6
    single = shape[2] == 1  # a single key gets all the weight: its own gradient and the query's are 0
    for name, found, wanted in zip("qkv", gradients, expected_gradients):
        if single and name != "v":
            assert np.abs(found).max() <= 1e-5
        else:
            assert relative_error(found, wanted) <= 1e-5, name


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_forward_mode(implementation):
    inputs, tangents = draw(SHAPES[0]), draw(SHAPES[0], seed=5)

    def along(function):
        run = jax.jit(lambda *arguments: jax.jvp(function, *arguments), compiler_options=QUICK_COMPILE)
        return run(inputs, tangents)

    out, tangent = along(functools.partial(relu_linear_attention, implementation=implementation))
    expected_out, expected_tangent = along(reference.relu_linear_attention)
    assert relative_error(out, expected_out) <= 2e-6
    assert relative_error(tangent, expected_tangent) <= 1e-5


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_inputs_are_summed_in_float32(implementation, dtype):
    """Nothing is rounded but the result, and that once; the same for the gradients."""
    shape = SHAPES[0]
    half = draw(shape, dtype)
    run = with_gradients(functools.partial(relu_linear_attention, implementation=implementation))
    out, gradients = run(*half, output_weights(shape))
    exact = [x.astype(jnp.float32) for x in half]
    expected, expected_gradients = with_gradients(reference.relu_linear_attention)(*exact, output_weights(shape))
    rounding = float(jnp.finfo(dtype).eps) / 2
    assert out.dtype == dtype
    assert np.all(np.abs(out.astype(jnp.float32) - expected) <= 1.02 * rounding * np.abs(expected) + 1e-6)
    for found, wanted in zip(gradients, expected_gradients):
        assert found.dtype == dtype
        assert relative_error(found.astype(jnp.float32), wanted) <= rounding


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("which", ["keys", "queries"])
def test_nothing_to_attend_to_gives_zero(which, implementation):
    """Keys or queries without a positive channel: the output is exactly 0 and the gradients are finite."""
    query, key, value = draw(SHAPES[0])
    if which == "keys":
        key = -jnp.abs(key)
    else:
        query = jnp.zeros_like(query)
    run = with_gradients(functools.partial(relu_linear_attention, implementation=implementation))
    out, gradients = run(query, key, value, output_weights(SHAPES[0]))
    assert not np.any(out)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("key", [(2, 1, 2, 4), (1, 6, 2, 4), (2, 6, 1, 4), (2, 5, 2, 4), (2, 6, 2, 3), (6, 2, 4)])
def test_shapes_that_do_not_fit_are_refused(key):
    relu, rope = (getattr(each, "__wrapped__", each) for each in (relu_linear_attention, rope_linear_attention))
    query, value, table = jnp.ones((2, 6, 2, 4)), jnp.ones((2, 6, 2, 4)), jnp.ones((6, 2))
    with pytest.raises(ValueError, match=r"they must be \(B, N, h, d\), \(B, M, h, d\) and \(B, M, h, e\)"):
        relu(query, jnp.ones(key), value)
    with pytest.raises(ValueError, match=r"they must be \(B, N, h, d\), \(B, N, h, d\) and \(B, N, h, e\)"):
        rope(query, jnp.ones(key), jnp.ones(key), table, table)


def test_unknown_implementation_is_named():
    with pytest.raises(
        ValueError, match=r"implementation='cudnn': choose one of \['pallas', 'triton', 'xla'\], or None"
    ):
        relu_linear_attention(*draw(SHAPES[0]), implementation="cudnn")


@pytest.mark.parametrize("shape", attention_shapes(PUBLISHED_TRANSFORMERS), ids=str)
@pytest.mark.parametrize("implementation", [None, *EVERYWHERE])
def test_lowers_for_cuda(shape, implementation):
    """Value and gradient lower at every shape of the published models, in their compute dtype; nothing is computed."""
    dtype, *sizes = shape
    abstract = [jax.ShapeDtypeStruct(sizes, dtype)] * 3
    run = with_gradients(functools.partial(relu_linear_attention, implementation=implementation))
    lowered = run.trace(*abstract, jax.ShapeDtypeStruct(sizes, jnp.float32)).lower(lowering_platforms=("cuda",))
    assert lowered.out_info[0].shape == tuple(sizes)
    assert "dot_general" in lowered.as_text()
