"""The layers that LTX-2's transformer and its text connectors share: gated attention, feed-forward, bare RMS norms."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.softmax_attention import softmax_attention
from kernels.typing import Array, Bool, Float
from sana_jax.nn.activations import gelu_tanh
from sana_jax.nn.initializers import scaled_normal, xavier_uniform
from sana_jax.nn.linear import Linear
from sana_jax.nn.ltx2_rope import HeadRotation, rotate_heads
from sana_jax.nn.norms import RMSNorm

QK_NORM_EPSILON = 1e-6  # whatever the epsilon of the blocks' own norms is


class KeysValues(NamedTuple):
    """Keys and values of tokens, by head; with the layer on the first axis where they are those of a whole network."""

    key: Float[Array, "... N h d"]
    value: Float[Array, "... N h d"]


def bare_rms_norm(x: Float[Array, "... C"], epsilon: float) -> Float[Array, "... C"]:
    """``x / sqrt(mean(x²) + ε)``, without a scale; returns float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + epsilon)


def modulated_rms_norm(
    x: Float[Array, "*B N D"], shift: Float[Array, "*#B 1 D"], scale: Float[Array, "*#B 1 D"], epsilon: float
) -> Float[Array, "*B N D"]:
    """``bare_rms_norm(x) · (1 + scale) + shift`` in float32, rounded once to ``x``'s dtype."""
    return (bare_rms_norm(x, epsilon) * (1 + scale) + shift).astype(x.dtype)


class LTX2Attention(nn.Module):
    """Softmax attention with RMS norms of q and k over all heads together, rotary positions, and a gate per head.

    The gate is ``2 · sigmoid(Linear(x))``: 1 where its layer is zero.
    """

    num_heads: int
    head_dim: int
    rope_type: str
    gated: bool = False
    use_bias: bool = True
    out_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        context: Float[Array, "B M E"] | None = None,
        *,
        rotation: HeadRotation | None = None,
        key_mask: Bool[Array, "B P"] | None = None,
        prefix: tuple[KeysValues, ...] = (),
    ) -> tuple[Float[Array, "B N D"], KeysValues, KeysValues]:
        """Attends from ``x`` to ``context``, or to itself.

        Args:
            x: where queries and the gate come from.
            context: where keys and values come from; None for ``x``.
            rotation: the angles of ``x``'s queries and keys; None for no positions.
            key_mask: which keys are seen, the prefix's first; None for all.
            prefix: keys, rotated already, and values of tokens before ``x``, one group after another.

        Returns:
            The result, the keys before the rotation with their values, and the keys after it with their values; the
            last two without the prefix's.
        """
        batch, queries, features = x.shape
        context = x if context is None else context

        def project(source: Array, name: str) -> Array:
            init = xavier_uniform()
            dense = Linear(self.num_heads * self.head_dim, self.use_bias, self.dtype, init, name=name)
            return dense(source)

        def by_head(z: Array) -> Array:
            return z.reshape(batch, -1, self.num_heads, self.head_dim)

        query = by_head(RMSNorm(QK_NORM_EPSILON, name="norm_q")(project(x, "to_q")))
        unrotated = by_head(RMSNorm(QK_NORM_EPSILON, name="norm_k")(project(context, "to_k")))
        value = by_head(project(context, "to_v"))
        key = unrotated
        if rotation is not None:
            query, key = (rotate_heads(z, rotation, self.rope_type) for z in (query, key))
        groups = (*prefix, KeysValues(key, value))
        keys, values = (jnp.concatenate([part.astype(key.dtype) for part in parts], axis=1) for parts in zip(*groups))
        # one row for all queries, one column for every key
        seen = None if key_mask is None else key_mask[:, None]
        attended = softmax_attention(query, keys, values, mask=seen, scale=self.head_dim**-0.5, bounded_memory=True)
        if self.gated:
            # from nothing, so that a network that starts so has gates of 1
            gate = Linear(self.num_heads, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="to_gate_logits")(x)
            gate = 2.0 * jax.nn.sigmoid(gate.astype(jnp.float32))
            attended = (attended.astype(jnp.float32) * gate[..., None]).astype(attended.dtype)
        out = Linear(features, self.out_bias, self.dtype, xavier_uniform(), name="to_out")
        out = out(attended.reshape(batch, queries, -1))
        return out, KeysValues(unrotated, value), KeysValues(key, value)


class LTX2FeedForward(nn.Module):
    """Linear D -> 4·D, GELU (tanh form), Linear 4·D -> D."""

    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Mixes the channels of every token."""
        features, normal = x.shape[-1], scaled_normal(0.02)
        hidden = Linear(4 * features, self.use_bias, self.dtype, normal, name="linear_1")(x)
        return Linear(features, self.use_bias, self.dtype, normal, name="linear_2")(gelu_tanh(hidden))
