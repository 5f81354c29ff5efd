"""Activations in half precision: one rounding, and nothing in float32 is kept for the backward pass."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.nn.activations import gelu_tanh, silu

PAIRS = [(silu, jax.nn.silu), (gelu_tanh, functools.partial(jax.nn.gelu, approximate=True))]
X = jnp.linspace(-6, 6, 997)


@pytest.mark.parametrize(("ours", "plain"), PAIRS)
def test_float32_is_the_plain_one(ours, plain):
    np.testing.assert_array_equal(ours(X), plain(X))
    slopes = [jax.vmap(jax.grad(function))(X) for function in (ours, plain)]
    np.testing.assert_allclose(*slopes, rtol=1e-6, atol=1e-7)  # they pass through 0
    extremes = jnp.array([-200.0, -90.0, 90.0, 200.0])
    assert jnp.isfinite(jax.vmap(jax.grad(ours))(extremes)).all()


def test_silu_keeps_one_array():
    _, back = jax.vjp(lambda x: silu(jnp.sin(x)), X)
    kept = [leaf for leaf in jax.tree.leaves(back) if getattr(leaf, "size", 0) > 1]
    assert len(kept) == 2  # the slopes of the sine and of SiLU


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("ours", "plain"), PAIRS)
def test_half_precision_rounds_once(ours, plain, dtype):
    x = X.astype(dtype)
    found = jax.jit(ours)(x)
    assert found.dtype == dtype
    expected, size = np.asarray(plain(x.astype(jnp.float32))), float(jnp.finfo(dtype).eps) / 2
    # float32 itself has few digits of gelu far to the left
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=1.001 * size, atol=1e-6)


@pytest.mark.parametrize(("ours", "plain"), PAIRS)
def test_gradients_in_half_precision(ours, plain):
    x = X.astype(jnp.bfloat16)
    found, back = jax.vjp(ours, x)
    (gradient,) = back(jnp.ones_like(found))
    expected = jax.vmap(jax.grad(plain))(x.astype(jnp.float32))
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(gradient, np.float32), expected, rtol=2**-8, atol=2**-9)
    kept = [leaf for leaf in jax.tree.leaves(back) if hasattr(leaf, "dtype") and leaf.size > 1]
    assert all(leaf.dtype == jnp.bfloat16 for leaf in kept)
    tangent = jax.jvp(ours, (x,), (jnp.ones_like(x),))[1]
    np.testing.assert_allclose(np.asarray(tangent, np.float32), expected, rtol=2**-8, atol=2**-9)
