"""Adaptive layer norm with one projection for all blocks ("adaLN-single", PixArt-alpha, arXiv 2310.00426 §2.3)."""

from __future__ import annotations

import jax.numpy as jnp

from kernels.adaln import gated_residual, modulated_norm
from kernels.typing import Array, Float

__all__ = ["gated_residual", "modulated_norm", "modulation"]


def modulation(
    table: Float[Array, "K D"], embedding: Float[Array, "*B K D"] | Float[Array, "*B 1 D"]
) -> tuple[Float[Array, "*B 1 D"], ...]:
    """Adds a learned table of K vectors to each embedding, in float32, and splits into K vectors (..., 1, D).

    There is one embedding per sample (B,), or, in videos, one per frame (B, T).
    """
    vectors = table.astype(jnp.float32) + embedding.astype(jnp.float32)
    return tuple(vectors[..., i : i + 1, :] for i in range(table.shape[0]))
