"""Inputs of the rotary kernels' tests."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np


def draw_rotary(batch: int, tokens: int, heads: int, size: int, value_size: int, dtype=jnp.float32, seed: int = 0):
    """``(query, key, value, cos, sin)``: any angles; a common offset leaves every query several positive channels."""
    rng = np.random.default_rng(seed)

    def normal(width: int, offset: float):
        return jnp.asarray(rng.standard_normal((batch, tokens, heads, width)) + offset, dtype)

    angles = rng.uniform(0, 2 * np.pi, (tokens, size // 2))
    tables = (jnp.asarray(table, jnp.float32) for table in (np.cos(angles), np.sin(angles)))
    return normal(size, 1.0), normal(size, 1.0), normal(value_size, 0.0), *tables
