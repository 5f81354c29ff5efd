"""What the gated delta rule remembers of the frames before: matrices of a fixed size, however many there were."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=("key_value", "key"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class DeltaState:
    """The memory after some frames, a pytree of fixed shapes; a network stacks its layers in front of them.

    Attributes:
        key_value: what a query reads its numerator from: key channels by value channels, (B, h, d, e).
        key: what it reads its normaliser from, (B, h, d); None where the rule has no normaliser.
    """

    key_value: Any  # arrays, or what else stands for them in a pytree
    key: Any = None


def init_state(
    batch_size: int, num_heads: int, head_dim: int, value_dim: int | None = None, *, normalised: bool = True
) -> DeltaState:
    """The state before the first frame: zeros, float32 whatever the dtype of the inputs will be.

    Args:
        batch_size: B.
        num_heads: h.
        head_dim: d, the size of a key.
        value_dim: e, the size of a value; None for that of a key.
        normalised: whether the rule has a normaliser.

    Raises:
        ValueError: a size that is not positive.
    """
    value_dim = head_dim if value_dim is None else value_dim
    shape = (batch_size, num_heads, head_dim, value_dim)
    if min(shape) < 1:
        raise ValueError(f"batch size, heads, head size, value size = {shape}: all of them must be 1 or more")
    return DeltaState(jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:3], jnp.float32) if normalised else None)
