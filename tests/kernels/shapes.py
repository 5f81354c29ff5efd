"""Shapes that the published SANA image models give each operation, and how two arrays are compared."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from configs.published import PublishedTransformer

# For programs of which only values are wanted, not speed: LLVM's optimiser is most of the compile time.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


def attention_shapes(published: Mapping[str, PublishedTransformer]) -> list[tuple]:
    """``(dtype, batch, tokens, heads, head size)`` at the size each model was trained for, with guidance (batch 2)."""
    shapes = {
        (
            entry.dtype,
            2,
            (entry.config.sample_size // entry.config.patch_size) ** 2,
            entry.config.num_attention_heads,
            entry.config.attention_head_dim,
        )
        for entry in published.values()
    }
    return sorted(shapes)


def feed_forward_shapes(published: Mapping[str, PublishedTransformer]) -> list[tuple]:
    """``(dtype, batch, height, width, channels)`` of the depthwise convolution."""
    shapes = set()
    for entry in published.values():
        side = entry.config.sample_size // entry.config.patch_size
        shapes.add((entry.dtype, 2, side, side, 2 * entry.config.mlp_hidden))
    return sorted(shapes)


def relative_error(found, expected) -> float:
    found, expected = (np.asarray(jnp.asarray(x, jnp.float32), np.float64) for x in (found, expected))
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
