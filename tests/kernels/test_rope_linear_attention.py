"""ReLU linear attention with rotary positions: the linear form beside the quadratic definition."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.linear_attention import reference, relu_linear_attention, rope_linear_attention
from kernels.linear_attention.api import ROPE_IMPLEMENTATIONS
from kernels.selection import DEVICE_PROGRAMS
from tests.kernels.rotation_cases import draw_rotary
from tests.kernels.shapes import QUICK_COMPILE, relative_error

# those that run wherever XLA does; the fused ones have tests of their own
EVERYWHERE = [name for name in ROPE_IMPLEMENTATIONS if name not in DEVICE_PROGRAMS]
# (batch, tokens, heads, head size, value size): odd ones, one token, and the head size of SANA-Video
SHAPES = [(2, 33, 3, 8, 8), (1, 19, 5, 10, 3), (3, 1, 1, 32, 32), (1, 130, 2, 112, 112)]
# SANA-Video 2B with guidance, in tokens: 480p and 720p, 81 frames
PUBLISHED_SHAPES = [("bfloat16", 2, 21 * 30 * 52, 20, 112), ("bfloat16", 2, 11 * 22 * 40, 20, 112)]


def with_gradients(function):
    """Compiled ``(q, k, v, cos, sin, output_weights) -> output, gradients of sum(output * output_weights)``."""

    def run(query, key, value, cos, sin, weights):
        def loss(query, key, value):
            out = function(query, key, value, cos, sin)
            return (out.astype(jnp.float32) * weights).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
        return out, gradients

    return jax.jit(run, compiler_options=QUICK_COMPILE)


def output_weights(shape):
    batch, tokens, heads, _, value_size = shape
    return np.random.default_rng(1).standard_normal((batch, tokens, heads, value_size)).astype(np.float32)


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(shape, implementation):
    arguments = (*draw_rotary(*shape), output_weights(shape))
    out, gradients = with_gradients(functools.partial(rope_linear_attention, implementation=implementation))(*arguments)
    expected, expected_gradients = with_gradients(reference.rope_linear_attention)(*arguments)
    assert out.dtype == jnp.float32
    assert relative_error(out, expected) <= 2e-6
    single = shape[1] == 1  # a single key gets all the weight: its own gradient and the query's are 0
    for name, found, wanted in zip("qkv", gradients, expected_gradients):
        if single and name != "v":
            assert np.abs(found).max() <= 1e-4
        else:
            assert relative_error(found, wanted) <= 1e-5, name


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_the_normaliser_is_not_rotated(implementation):
    """Without angles it is the plain attention; with them the weights of a query do not add up to 1."""
    query, key, value, cos, sin = draw_rotary(*SHAPES[0])
    run = functools.partial(rope_linear_attention, implementation=implementation)
    still = run(query, key, value, jnp.ones_like(cos), jnp.zeros_like(sin))
    assert relative_error(still, relu_linear_attention(query, key, value)) <= 2e-6
    sums = run(query, key, jnp.ones_like(value), cos, sin)
    assert np.abs(sums - 1).max() > 0.1


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_half_precision_inputs_are_rotated_and_summed_in_float32(implementation):
    shape = SHAPES[0]
    half = draw_rotary(*shape, dtype=jnp.bfloat16)
    run = with_gradients(functools.partial(rope_linear_attention, implementation=implementation))
    out, gradients = run(*half, output_weights(shape))
    exact = [x.astype(jnp.float32) for x in half]
    expected, expected_gradients = with_gradients(reference.rope_linear_attention)(*exact, output_weights(shape))
    rounding = float(jnp.finfo(jnp.bfloat16).eps) / 2
    assert out.dtype == jnp.bfloat16
    assert np.all(np.abs(out.astype(jnp.float32) - expected) <= 1.02 * rounding * np.abs(expected) + 1e-6)
    for found, wanted in zip(gradients, expected_gradients):
        assert found.dtype == jnp.bfloat16
        assert relative_error(found.astype(jnp.float32), wanted) <= rounding


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_nothing_to_attend_to_gives_zero(implementation):
    query, key, value, cos, sin = draw_rotary(*SHAPES[0])
    run = with_gradients(functools.partial(rope_linear_attention, implementation=implementation))
    out, gradients = run(query, -jnp.abs(key), value, cos, sin, output_weights(SHAPES[0]))
    assert not np.any(out)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_unknown_implementation_is_named():
    with pytest.raises(
        ValueError, match=r"implementation='cudnn': choose one of \['pallas', 'triton', 'xla'\], or None"
    ):
        rope_linear_attention(*draw_rotary(*SHAPES[0]), implementation="cudnn")


def test_tables_that_do_not_fit():
    query, key, value, cos, sin = draw_rotary(*SHAPES[0])
    with pytest.raises(ValueError, match=r"33 tokens and an even head size 8 need \(33, 4\)"):
        rope_linear_attention(query, key, value, cos[:, :-1], sin[:, :-1])


@pytest.mark.parametrize("shape", PUBLISHED_SHAPES, ids=str)
@pytest.mark.parametrize("implementation", [None, *EVERYWHERE])
def test_lowers_for_cuda(shape, implementation):
    """Value and gradient lower at the published models' shapes, in their compute dtype; nothing is computed."""
    dtype, *sizes = shape
    abstract = [jax.ShapeDtypeStruct(sizes, dtype)] * 3
    tables = [jax.ShapeDtypeStruct((sizes[1], sizes[3] // 2), jnp.float32)] * 2
    run = with_gradients(functools.partial(rope_linear_attention, implementation=implementation))
    weights = jax.ShapeDtypeStruct(sizes, jnp.float32)
    lowered = run.trace(*abstract, *tables, weights).lower(lowering_platforms=("cuda",))
    assert lowered.out_info[0].shape == tuple(sizes)
    assert "dot_general" in lowered.as_text()
