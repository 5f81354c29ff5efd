"""The two attentions of a SANA block."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.linear_attention import relu_linear_attention
from kernels.typing import Array, Bool, Float, Int
from sana_jax.nn.initializers import xavier_uniform
from sana_jax.nn.linear import Linear
from sana_jax.nn.norms import RMSNorm

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

        def project(name: str) -> Float[Array, "B N D"]:
            init = xavier_uniform(fused=3)
            return Linear(inner, self.use_bias, dtype=self.dtype, kernel_init=init, name=name)(x)

        query, key, value = project("to_q"), project("to_k"), project("to_v")
        if self.qk_norm:
            query = RMSNorm(QK_NORM_EPSILON, name="norm_q")(query)
            key = RMSNorm(QK_NORM_EPSILON, name="norm_k")(key)
        heads = (batch, tokens, self.num_heads, self.head_dim)
        attended = relu_linear_attention(query.reshape(heads), key.reshape(heads), value.reshape(heads))
        attended = attended.reshape(batch, tokens, inner)
        if identity is not None:
            attended = jnp.where(identity[:, None, None], value, attended)
        out = Linear(features, dtype=self.dtype, kernel_init=xavier_uniform(), name="to_out")(attended)
        return jnp.clip(out, -LARGEST_FLOAT16, LARGEST_FLOAT16) if self.fp16_saturation else out


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
        attended = jax.nn.dot_product_attention(query, key, value, bias=bias)
        out = Linear(features, dtype=self.dtype, kernel_init=xavier_uniform(), name="to_out")
        return out(attended.reshape(batch, tokens, inner))
