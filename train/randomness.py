"""Random streams that are functions of (seed, step, name): resume draws what an uninterrupted run would have drawn."""

from __future__ import annotations

import zlib

import jax

from kernels.typing import Array, Int, PRNGKeyArray


def stream(seed: int, step: int | Int[Array, ""], name: str) -> PRNGKeyArray:
    """The key of one named stream at one step; ``step`` may be traced. Keys are never carried from step to step."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, step)
