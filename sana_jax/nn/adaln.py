"""Adaptive layer norm with one projection for all blocks ("adaLN-single", PixArt-alpha, arXiv 2310.00426 §2.3)."""

from __future__ import annotations

import jax.numpy as jnp

from kernels.typing import Array, Float
from sana_jax.nn.norms import layer_norm


def modulation(
    table: Float[Array, "K D"], embedding: Float[Array, "*B K D"] | Float[Array, "*B 1 D"]
) -> tuple[Float[Array, "*B 1 D"], ...]:
    """Adds a learned table of K vectors to each embedding, in float32, and splits into K vectors (..., 1, D).

    There is one embedding per sample (B,), or, in videos, one per frame (B, T).
    """
    vectors = table.astype(jnp.float32) + embedding.astype(jnp.float32)
    return tuple(vectors[..., i : i + 1, :] for i in range(table.shape[0]))


def modulated_norm(
    x: Float[Array, "*B N D"], shift: Float[Array, "*#B 1 D"], scale: Float[Array, "*#B 1 D"], epsilon: float
) -> Float[Array, "*B N D"]:
    """``LayerNorm(x) · (1 + scale) + shift`` in float32, rounded once to ``x``'s dtype."""
    return (layer_norm(x, epsilon) * (1 + scale) + shift).astype(x.dtype)


def gated_residual(
    x: Float[Array, "*B N D"], gate: Float[Array, "*#B 1 D"], update: Float[Array, "*B N D"]
) -> Float[Array, "*B N D"]:
    """``x + gate · update`` in float32, rounded once to ``x``'s dtype."""
    return (x.astype(jnp.float32) + gate * update.astype(jnp.float32)).astype(x.dtype)
