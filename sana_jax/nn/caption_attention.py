"""Softmax attention from video tokens to caption tokens, keys and values in one projection."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from kernels.softmax_attention import softmax_attention
from kernels.typing import Array, Bool, Float
from sana_jax.nn.initializers import xavier_uniform
from sana_jax.nn.linear import Linear
from sana_jax.nn.norms import RMSNorm


class CaptionAttention(nn.Module):
    """Cross-attention whose scores of all tokens are never held at once.

    Attributes:
        num_heads: heads; their size is the width over their number.
        qk_norm: whether queries and keys are normalised over all heads together.
        epsilon: of these norms.
        dtype: compute dtype.
    """

    num_heads: int
    qk_norm: bool = False
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], caption: Float[Array, "B L D"], mask: Bool[Array, "B L"] | None = None
    ) -> Float[Array, "B N D"]:
        """Attends to the caption's tokens that ``mask`` keeps; a caption without any adds the bias alone."""
        width = x.shape[-1]
        query = Linear(width, dtype=self.dtype, kernel_init=xavier_uniform(), name="to_q")(x)
        fused = Linear(2 * width, dtype=self.dtype, kernel_init=xavier_uniform(), name="to_kv")(caption)
        key, value = jnp.split(fused, 2, axis=-1)
        if self.qk_norm:
            query = RMSNorm(self.epsilon, name="norm_q")(query)
            key = RMSNorm(self.epsilon, name="norm_k")(key)
        query, key, value = (z.reshape(*z.shape[:2], self.num_heads, -1) for z in (query, key, value))
        seen = None if mask is None else mask[:, None]
        attended = softmax_attention(query, key, value, mask=seen, bounded_memory=True)
        out = Linear(width, dtype=self.dtype, kernel_init=xavier_uniform(), name="to_out")
        return out(attended.reshape(x.shape))
