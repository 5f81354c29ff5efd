"""A bias's gradient, in both modes and in half precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.bias import add_bias
from sana_jax.nn.linear import Linear


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("shape", [(2, 32, 32, 8), (2, 5, 16, 16, 8), (3, 700, 8), (8,)], ids=str)
def test_the_gradient_is_summed_in_float32(shape, dtype):
    """Within the rounding of the result, however many terms there are."""
    rng = np.random.default_rng(0)
    cotangent = jnp.asarray(1 + 0.5 * rng.standard_normal(shape), dtype)
    x, bias = jnp.zeros(shape, dtype), jnp.asarray(rng.standard_normal(8), jnp.float32)
    out, pull_back = jax.vjp(jax.jit(add_bias), x, bias)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, x + bias.astype(dtype))
    of_x, of_bias = pull_back(cotangent)
    np.testing.assert_array_equal(of_x, cotangent)
    assert of_bias.dtype == jnp.float32
    np.testing.assert_allclose(of_bias, np.asarray(cotangent, np.float64).reshape(-1, 8).sum(0), rtol=1e-5)


def test_forward_mode():
    x, bias, of_x, of_bias = (jnp.arange(8.0) + number for number in range(4))
    found = jax.jvp(add_bias, (x, bias), (of_x, of_bias))
    np.testing.assert_array_equal(found, (x + bias, of_x + of_bias))


def test_dense_layers_have_such_a_gradient():
    layer, rng = Linear(8, dtype=jnp.bfloat16), np.random.default_rng(0)
    x, cotangent = (jnp.asarray(1 + 0.5 * rng.standard_normal((2, 32, 32, 8)), jnp.bfloat16) for _ in range(2))
    params = layer.init(jax.random.key(0), x)
    _, pull_back = jax.vjp(jax.jit(lambda params: layer.apply(params, x)), params)
    (found,) = pull_back(cotangent)
    exact = np.asarray(cotangent, np.float64).reshape(-1, 8).sum(0)
    np.testing.assert_allclose(found["params"]["bias"], exact, rtol=2.0**-8)
