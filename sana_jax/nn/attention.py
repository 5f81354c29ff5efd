"""The attentions of a SANA block."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from kernels.block_linear_attention import BlockSums, block_linear_attention
from kernels.linear_attention import relu_linear_attention, rope_linear_attention
from kernels.softmax_attention import softmax_attention
from kernels.typing import Array, Bool, Float, Int
from sana_jax.nn.initializers import xavier_uniform
from sana_jax.nn.linear import Linear
from sana_jax.nn.norms import RMSNorm
from sana_jax.nn.rope import Rotation

# Attention's query and key norms have their own epsilon; the layer norms of the blocks have 1e-6.
QK_NORM_EPSILON = 1e-5
MASKED = -10000.0
LARGEST_FLOAT16 = 65504.0


def mask_to_bias(mask: Int[Array, "B L"]) -> Float[Array, "B 1 1 L"]:
    """0 where a token is kept, -10000 where it is padding.

    Finite, as in the published models: a caption that is all padding attends as if it were unmasked instead of
    giving NaN. Elsewhere the weights of padding underflow to exactly 0.
    """
    return (MASKED * (1.0 - mask.astype(jnp.float32)))[:, None, None, :]


class LinearSelfAttention(nn.Module):
    """ReLU linear attention over all tokens, with optional RMS norms of q and k over all heads together.

    ``fp16_saturation`` clips the result to ±65504, as float16 does in the weights that were trained with it.
    """

    num_heads: int
    head_dim: int
    qk_norm: bool = False
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    fp16_saturation: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], identity: Bool[Array, " B"] | None = None) -> Float[Array, "B N D"]:
        """Attends from every token to every token; where ``identity`` is set, from every token to itself alone."""
        batch, tokens, features = x.shape
        inner = self.num_heads * self.head_dim
        query, key, value = _self_projections(x, inner, self.qk_norm, self.use_bias, self.dtype)
        heads = (batch, tokens, self.num_heads, self.head_dim)
        attended = relu_linear_attention(query.reshape(heads), key.reshape(heads), value.reshape(heads))
        attended = attended.reshape(batch, tokens, inner)
        if identity is not None:
            attended = jnp.where(identity[:, None, None], value, attended)
        out = Linear(features, dtype=self.dtype, kernel_init=xavier_uniform(), name="to_out")(attended)
        return jnp.clip(out, -LARGEST_FLOAT16, LARGEST_FLOAT16) if self.fp16_saturation else out


def _self_projections(
    x: Float[Array, "B N D"], inner: int, qk_norm: bool, use_bias: bool, dtype: Any
) -> tuple[Float[Array, "B N E"], Float[Array, "B N E"], Float[Array, "B N E"]]:
    """Query, key and value of self-attention, made in the module that calls this."""

    def project(name: str) -> Float[Array, "B N E"]:
        return Linear(inner, use_bias, dtype=dtype, kernel_init=xavier_uniform(fused=3), name=name)(x)

    query, key, value = project("to_q"), project("to_k"), project("to_v")
    if qk_norm:
        query = RMSNorm(QK_NORM_EPSILON, name="norm_q")(query)
        key = RMSNorm(QK_NORM_EPSILON, name="norm_k")(key)
    return query, key, value


class RotaryLinearSelfAttention(nn.Module):
    """ReLU linear attention with rotary positions: over all tokens, or, where a state is given, in causal blocks.

    ``epsilon`` is added to the normaliser.
    """

    num_heads: int
    head_dim: int
    qk_norm: bool = False
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    epsilon: float = 1e-15

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        rotation: Rotation,
        block_starts: tuple[int, ...] = (0,),
        state: BlockSums | None = None,
    ) -> tuple[Float[Array, "B N D"], BlockSums | None]:
        """Attends; returns the state after the last block too, None where none was given.

        Args:
            x: tokens.
            rotation: their angles.
            block_starts: the first token of every block; without a state there is but one block.
            state: sums of earlier blocks, zero before the first.
        """
        batch, tokens, features = x.shape
        inner = self.num_heads * self.head_dim
        heads = (batch, tokens, self.num_heads, self.head_dim)
        projections = _self_projections(x, inner, self.qk_norm, self.use_bias, self.dtype)
        query, key, value = (projection.reshape(heads) for projection in projections)
        if state is None:
            attended = rope_linear_attention(query, key, value, *rotation, epsilon=self.epsilon)
        else:
            attended, state = block_linear_attention(
                query, key, value, *rotation, block_starts=block_starts, state=state, epsilon=self.epsilon
            )
        out = Linear(features, dtype=self.dtype, kernel_init=xavier_uniform(), name="to_out")
        return out(attended.reshape(batch, tokens, inner)), state


class CrossAttention(nn.Module):
    """Softmax attention from image tokens to caption tokens."""

    num_heads: int
    head_dim: int
    qk_norm: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        caption: Float[Array, "B L E"],
        bias: Float[Array, "B 1 1 L"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Attends to the caption; ``bias`` is added to the logits (see ``mask_to_bias``)."""
        batch, tokens, features = x.shape
        inner = self.num_heads * self.head_dim

        def project(source: Array, name: str, fused: int) -> Array:
            return Linear(inner, dtype=self.dtype, kernel_init=xavier_uniform(fused), name=name)(source)

        query = project(x, "to_q", 1)
        key, value = project(caption, "to_k", 2), project(caption, "to_v", 2)
        if self.qk_norm:
            query = RMSNorm(QK_NORM_EPSILON, name="norm_q")(query)
            key = RMSNorm(QK_NORM_EPSILON, name="norm_k")(key)
        query, key, value = (z.reshape(batch, z.shape[1], self.num_heads, self.head_dim) for z in (query, key, value))
        # The default scale is 1/sqrt(head_dim); logits and softmax are float32 inside.
        attended = softmax_attention(query, key, value, bias=bias)
        out = Linear(features, dtype=self.dtype, kernel_init=xavier_uniform(), name="to_out")
        return out(attended.reshape(batch, tokens, inner))
