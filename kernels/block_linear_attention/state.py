"""What block linear attention remembers of the blocks before: sums of a fixed size, however many there were."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("key_value", "key"), meta_fields=("num_cached_blocks",)
)
@dataclasses.dataclass(frozen=True)
class BlockSums:
    """Sums over the tokens of earlier blocks, a pytree of fixed shapes; a network stacks its layers in front of them.

    Attributes:
        key_value: ``Σ (R k) vᵀ``, float32 (slots, B, h, d, e).
        key: ``Σ k``, not rotated, float32 (slots, B, h, d).
        num_cached_blocks: None for one slot that holds the sums of all earlier blocks; n for n slots that hold the
            sums of the last n blocks one by one, the oldest first, zero where there was no block yet.
    """

    key_value: Any  # arrays, or what else stands for them in a pytree
    key: Any
    num_cached_blocks: int | None = None


def init_block_sums(
    batch_size: int, num_heads: int, head_dim: int, value_dim: int | None = None, num_cached_blocks: int | None = None
) -> BlockSums:
    """The state before the first block: zeros.

    Raises:
        ValueError: a window of no block.
    """
    if num_cached_blocks is not None and num_cached_blocks < 1:
        raise ValueError(f"num_cached_blocks={num_cached_blocks}: choose 1 or more, or None for all earlier blocks")
    shape = (num_cached_blocks or 1, batch_size, num_heads, head_dim)
    value_dim = head_dim if value_dim is None else value_dim
    return BlockSums(jnp.zeros((*shape, value_dim)), jnp.zeros(shape), num_cached_blocks)
