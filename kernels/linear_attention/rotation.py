"""Rotary position embedding: every pair of adjacent channels is turned by an angle of its token (arXiv 2104.09864)."""

from __future__ import annotations

import jax.numpy as jnp

from kernels.typing import Array, Float


def rotate_pairs(
    x: Float[Array, "B N h d"], cos: Float[Array, "N p"], sin: Float[Array, "N p"]
) -> Float[Array, "B N h d"]:
    """Turns channels (2i, 2i+1) of every token and head by the angle whose cosine and sine stand in column i.

    ``p`` is d/2. Positive angles turn the first channel towards the second.
    """
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1).reshape(x.shape)
