"""``Linear`` is Flax's ``Dense`` to the bit, and has a LoRA where one is given."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.nn.initializers import xavier_uniform
from sana_jax.nn.linear import LORA, Linear, sample_dropout


def same(found, expected) -> bool:
    return jax.tree.structure(found) == jax.tree.structure(expected) and all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes() and a.dtype == b.dtype
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected))
    )


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("use_bias", [True, False])
def test_equals_dense(dtype, use_bias):
    options = {"dtype": dtype, "kernel_init": xavier_uniform(3), "bias_init": nn.initializers.normal(1.0)}
    ours, theirs = Linear(13, use_bias, **options), nn.Dense(13, use_bias, **options)
    x = jax.random.normal(jax.random.key(1), (3, 5, 7))
    params = ours.init(jax.random.key(0), x)
    assert same(params, theirs.init(jax.random.key(0), x))
    assert same(jax.jit(ours.apply)(params, x), jax.jit(theirs.apply)(params, x))


def test_defaults_are_those_of_dense():
    x = jnp.ones((2, 7))
    assert same(Linear(4).init(jax.random.key(0), x), nn.Dense(4).init(jax.random.key(0), x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lora(dtype):
    layer = Linear(6, dtype=dtype)
    x, down, up = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(4, 5), (5, 2), (2, 6)]))
    params = layer.init(jax.random.key(3), x)["params"]
    found = layer.apply({"params": params, LORA: {"down": down, "up": up}}, x)
    assert found.dtype == dtype
    expected = x @ (params["kernel"] + down @ up) + params["bias"]
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=0, atol=1e-5 if dtype == jnp.float32 else 0.1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropout(dtype):
    """The LoRA's input loses a share of its values, each sample its own; the layer's own product sees all of them."""
    rate, samples = 0.25, 64
    layer = Linear(6, dtype=dtype)
    x = jax.random.normal(jax.random.key(0), (samples, 10, 8)).astype(dtype)
    down, up = jnp.eye(8), jax.random.normal(jax.random.key(2), (8, 6)).astype(dtype)
    params = layer.init(jax.random.key(3), x)["params"]
    keys = jax.random.split(jax.random.key(4), samples)
    lora = {"down": down, "up": up, "dropout_keys": keys, "dropout_rate": jnp.float32(rate)}
    seen = sample_dropout(x, keys, jnp.float32(rate))
    assert seen.dtype == dtype
    kept = np.asarray(seen) != 0
    assert abs(kept.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / kept.size)
    expected = (np.asarray(x, np.float32) / np.float32(1 - rate)).astype(dtype)
    one_rounding = {"rtol": 2e-7 if dtype == jnp.float32 else 8e-3, "atol": 0}  # a quotient or a product, as compiled
    np.testing.assert_allclose(
        np.asarray(seen)[kept].astype(np.float32), expected[kept].astype(np.float32), **one_rounding
    )
    assert len(np.unique(kept.reshape(samples, -1), axis=0)) == samples
    found = layer.apply({"params": params, LORA: lora}, x)
    base = layer.apply({"params": params}, x)
    np.testing.assert_array_equal(found, base + (seen @ down.astype(dtype)) @ up)
    # a row draws the same alone
    alone = layer.apply({"params": params, LORA: {**lora, "dropout_keys": keys[5:6]}}, x[5:6])
    tolerance = 1e-5 if dtype == jnp.float32 else 0.1
    np.testing.assert_allclose(alone[0].astype(jnp.float32), found[5].astype(jnp.float32), rtol=0, atol=tolerance)
