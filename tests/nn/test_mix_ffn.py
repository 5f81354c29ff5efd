"""A Mix-FFN whose middle is one operation has the parameters and the values of the one of single layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import selection
from sana_jax.nn.mix_ffn import GLUMBConv


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_fused_middle(dtype, monkeypatch):
    network, x = GLUMBConv(hidden=6, dtype=dtype), jax.random.normal(jax.random.key(0), (2, 5, 3, 8), dtype)
    params = network.init(jax.random.key(1), x)
    plain = network.apply(params, x)
    row = selection.Measurement("mix_ffn", "pallas", "cuda", "a card", {}, "2026-01-01", "any", 0.5, "made up")
    monkeypatch.setattr(selection, "measurements", lambda: (*selection.parse([]), row))
    traced = str(jax.make_jaxpr(network.apply)(params, x))
    assert "pallas_call" in traced
    fused = network.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, fused, params)
    # a CPU runs XLA's form still
    np.testing.assert_allclose(network.apply(params, x), plain, rtol=1e-5, atol=0 if dtype == jnp.bfloat16 else 1e-7)
