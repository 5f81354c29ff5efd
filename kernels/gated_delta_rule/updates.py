"""What one frame does to the memory, as a pair of matrices; pairs compose, so frames can be absorbed in any grouping.

A frame with keys K (S x d, one row per token), values V, update strengths β and decay g turns the memory M (d x e) into
``g M + Kᵀ diag(β) (V − K (g M))``: M decays, and what it then says at the frame's keys is moved towards the values, for
all tokens at once. That is ``W M + U`` with ``W = g (I − Kᵀ diag(β) K)`` and ``U = Kᵀ diag(β) V``, in both directions
of time. The normaliser is the same rule with values that are all 1.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kernels.typing import Array, Float


@functools.partial(jax.tree_util.register_dataclass, data_fields=("transition", "addition"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class FrameUpdate:
    """``M -> transition @ M + addition``: one frame, or a run of frames.

    Attributes:
        transition: (..., d, d), symmetric for a single frame.
        addition: (..., d, e).
    """

    transition: Float[Array, "... d d"]
    addition: Float[Array, "... d e"]

    def __call__(self, memory: Float[Array, "... d e"]) -> Float[Array, "... d e"]:
        """The memory after these frames."""
        return jnp.matmul(self.transition, memory, precision="highest") + self.addition


def compose(earlier: FrameUpdate, later: FrameUpdate) -> FrameUpdate:
    """The update of both, ``earlier`` absorbed first; associative, with ``identity_update`` as its neutral element.

    "First" is meant in the order of absorbing, which is from the last frame to the first in the backward direction.
    """
    transition = jnp.matmul(later.transition, earlier.transition, precision="highest")
    return FrameUpdate(transition, later(earlier.addition))


def identity_update(like: FrameUpdate) -> FrameUpdate:
    """The update of no frame, in the shapes and dtypes of another update."""
    size = like.transition.shape[-1]
    transition = jnp.broadcast_to(jnp.eye(size, dtype=like.transition.dtype), like.transition.shape)
    return FrameUpdate(transition, jnp.zeros_like(like.addition))


def frame_update(
    key: Float[Array, "... S d"],
    value: Float[Array, "... S e"] | None,
    beta: Float[Array, "... S"],
    decay: Float[Array, "..."],
    key_scale: float = 1.0,
) -> FrameUpdate:
    """The update of one frame, or of as many as there are in front.

    Args:
        key: keys of the frame's S tokens.
        value: their values; None for the normaliser, whose values are 1 (e = 1).
        beta: update strength of every token.
        decay: how much of the memory the frame keeps.
        key_scale: factor of the keys.
    """
    weighted = key * beta[..., None]
    gram = jnp.einsum("...sd,...sc->...dc", weighted, key, precision="highest") * key_scale**2
    if value is None:
        addition = weighted.sum(-2)[..., None]
    else:
        addition = jnp.einsum("...sd,...se->...de", weighted, value, precision="highest")
    transition = decay[..., None, None] * (jnp.eye(key.shape[-1], dtype=key.dtype) - gram)
    return FrameUpdate(transition, addition * key_scale)
