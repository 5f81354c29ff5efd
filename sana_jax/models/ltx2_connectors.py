"""LTX-2's text connectors: from all hidden states of Gemma-3 to the prompt that the transformer's video half sees.

Paper: LTX-2 (arXiv 2601.03233). Field names and parameter names are those of the published checkpoints. The audio
half has a connector of its own, which is not built; its fields are kept, so that a configuration comes back as it was.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from sana_jax.component_config import known_fields
from sana_jax.errors import UserError
from sana_jax.models.sana import check_field
from sana_jax.nn.initializers import torch_uniform
from sana_jax.nn.layers import run_layers
from sana_jax.nn.linear import Linear
from sana_jax.nn.ltx2_layers import LTX2Attention, LTX2FeedForward, bare_rms_norm
from sana_jax.nn.ltx2_rope import INTERLEAVED, ROPE_TYPES, SPLIT, HeadRotation, text_rotation

CLASS_NAME = "LTX2TextConnectors"
NORM_EPSILON = 1e-6  # of every norm here; no configuration has it as a field
PACKING_SCALE = 8.0
_FIXED = {  # fields of the published class that have one value here, and why
    "rope_double_precision": (True, "frequencies are powers in float64"),
    "per_modality_projections": (False, "that is LTX-2.3; SANA-WM's refiner is LTX-2.0"),
    "causal_temporal_positioning": (False, "nothing in the published network reads it"),
}


def normalize_packed_states(
    states: Float[Array, "B L C layers"], mask: Int[Array, "B L"] | Bool[Array, "B L"]
) -> Float[Array, "B L C layers"]:
    """``8 · (x - mean) / (max - min)`` of every text and layer, over its tokens and channels; 0 at padding.

    Doing it twice changes nothing but the last digits. Computed in float32 and rounded once to the states' dtype.

    Args:
        states: hidden states of every layer of the text encoder, its embeddings first.
        mask: not 0 for tokens, 0 for padding, wherever that stands.

    Returns:
        The same shape; flattened over its last two axes, the layer runs fastest.
    """
    wide = states.astype(jnp.float32)
    seen = (mask != 0)[:, :, None, None]
    count = (mask != 0).sum(-1)[:, None, None, None] * states.shape[2]
    mean = jnp.where(seen, wide, 0.0).sum((1, 2), keepdims=True) / (count + 1e-6)
    lowest = jnp.where(seen, wide, jnp.inf).min((1, 2), keepdims=True)
    highest = jnp.where(seen, wide, -jnp.inf).max((1, 2), keepdims=True)
    normed = PACKING_SCALE * ((wide - mean) / (highest - lowest + 1e-6))
    return jnp.where(seen, normed, 0.0).astype(states.dtype)


@dataclasses.dataclass(frozen=True)
class LTX2ConnectorsConfig:
    """Shape of LTX-2's connectors; the defaults are those of the published class. ``ltx2()``: LTX-2.0's.

    Attributes:
        caption_channels: width of the text encoder's states, and of the prompt that comes out.
        text_proj_in_factor: states per token: the text encoder's layers and its embeddings.
        video_connector_num_attention_heads: heads of the video connector.
        video_connector_attention_head_dim: size of each, even; heads x size is ``caption_channels``.
        video_connector_num_layers: its blocks.
        video_connector_num_learnable_registers: learned tokens that take the place of padding; None for none.
        video_gated_attn: whether its attention has a gate per head.
        connector_rope_base_seq_len: position at which a fraction is 1.
        rope_theta: highest frequency of the rotary positions over the lowest.
        rope_double_precision: True.
        causal_temporal_positioning: False.
        rope_type: which channels of a head are a pair, ``split`` or ``interleaved``; published ones have ``split``.
        per_modality_projections: False.
        video_hidden_dim: without effect where ``per_modality_projections`` is False.
        audio_hidden_dim: the same.
        proj_bias: whether the projection of the states has a bias.

    All other fields with ``audio`` in their names are the audio connector's.
    """

    caption_channels: int = 3840
    text_proj_in_factor: int = 49
    video_connector_num_attention_heads: int = 30
    video_connector_attention_head_dim: int = 128
    video_connector_num_layers: int = 2
    video_connector_num_learnable_registers: int | None = 128
    video_gated_attn: bool = False
    audio_connector_num_attention_heads: int = 30
    audio_connector_attention_head_dim: int = 128
    audio_connector_num_layers: int = 2
    audio_connector_num_learnable_registers: int | None = 128
    audio_gated_attn: bool = False
    connector_rope_base_seq_len: int = 4096
    rope_theta: float = 10000.0
    rope_double_precision: bool = True
    causal_temporal_positioning: bool = False
    rope_type: str = INTERLEAVED
    per_modality_projections: bool = False
    video_hidden_dim: int = 4096
    audio_hidden_dim: int = 2048
    proj_bias: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check_field(f"connectors.{field.name}", field.type, value)
            if field.type == "float":
                object.__setattr__(self, field.name, float(value))
        for name, (allowed, reason) in _FIXED.items():
            if getattr(self, name) != allowed:
                raise UserError(f"connectors.{name}={getattr(self, name)!r}: {reason}; choose a model with {allowed}")
        if self.rope_type not in ROPE_TYPES:
            raise UserError(f"connectors.rope_type={self.rope_type!r} is not known; choose {' or '.join(ROPE_TYPES)}")
        if self.rope_theta <= 1:
            raise UserError(f"connectors.rope_theta={self.rope_theta} is not allowed; allowed is a number above 1")
        heads, size = self.video_connector_num_attention_heads, self.video_connector_attention_head_dim
        if heads * size != self.caption_channels or size % 2:
            raise UserError(
                f"connectors.caption_channels={self.caption_channels}: the video connector's {heads} heads of {size} "
                "must make up that width, with an even head size; change one of them"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LTX2ConnectorsConfig:
        """Reads a published ``config.json``: keys that are missing keep the default, unknown ones are an error."""
        return cls(**known_fields(cls, values, "connectors", "LTX-2's"))

    def to_dict(self) -> dict[str, Any]:
        """The fields as a published ``config.json`` has them."""
        return {"_class_name": CLASS_NAME, **dataclasses.asdict(self)}

    @classmethod
    def ltx2(cls, **changes) -> LTX2ConnectorsConfig:
        """LTX-2.0's connectors, and those of SANA-WM's refiner."""
        return cls(**{"rope_type": SPLIT, **changes})


def init_params(connectors: LTX2Connectors, key: PRNGKeyArray) -> PyTree:
    """Random parameters; under ``jax.eval_shape`` their shapes alone."""
    config = connectors.config
    length = config.video_connector_num_learnable_registers or 1
    states = jnp.zeros((1, length, config.caption_channels, config.text_proj_in_factor))
    return connectors.init(key, states, jnp.ones((1, length), jnp.int32))["params"]


class ConnectorBlock(nn.Module):
    """Self-attention and feed-forward, each on the bare RMS norm of the stream."""

    config: LTX2ConnectorsConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], rotation: HeadRotation, key_mask: Bool[Array, "B L"] | None
    ) -> Float[Array, "B L D"]:
        """Runs the block."""
        cfg = self.config
        attention = LTX2Attention(
            cfg.video_connector_num_attention_heads,
            cfg.video_connector_attention_head_dim,
            cfg.rope_type,
            cfg.video_gated_attn,
            dtype=self.dtype,
            name="attn1",
        )

        def norm(x: Array) -> Array:
            return bare_rms_norm(x, NORM_EPSILON).astype(x.dtype)

        x = x + attention(norm(x), rotation=rotation, key_mask=key_mask)[0]
        return x + LTX2FeedForward(dtype=self.dtype, name="ff")(norm(x))


class VideoConnector(nn.Module):
    """A small transformer over the text's tokens, behind which learned registers take the place of padding."""

    config: LTX2ConnectorsConfig
    dtype: jnp.dtype = jnp.float32
    scan_blocks: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"]) -> Float[Array, "B L D"]:
        """Runs the connector over projected states."""
        cfg = self.config
        length, features = x.shape[1:]
        key_mask = mask
        if count := cfg.video_connector_num_learnable_registers:
            if length % count:
                raise UserError(
                    f"a text of {length} tokens, padding included, is not a multiple of the connectors' {count} "
                    "registers; pad it to one"
                )
            registers = self.param("learnable_registers", _uniform, (count, features), jnp.float32)
            x, key_mask = _registers_behind_text(x, mask, registers.astype(x.dtype)), None
        heads = (cfg.video_connector_num_attention_heads, cfg.video_connector_attention_head_dim)
        table = text_rotation(length, *heads, base_length=cfg.connector_rope_base_seq_len, theta=cfg.rope_theta)
        rotation = HeadRotation(*map(jnp.asarray, table))
        x = self._blocks(x, rotation, key_mask)
        return bare_rms_norm(x, NORM_EPSILON).astype(x.dtype)

    def _blocks(self, x: Array, rotation: HeadRotation, key_mask: Array | None) -> Array:
        layers, scanned = self.config.video_connector_num_layers, self.scan_blocks or self.is_initializing()
        block = ConnectorBlock(self.config, self.dtype, name="transformer_blocks")

        def step(block, x, _):
            return block(x, rotation, key_mask), None

        return run_layers(block, step, x, None, layers, scanned=scanned)[0]


def _uniform(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0)


def _registers_behind_text(
    x: Float[Array, "B L D"], mask: Bool[Array, "B L"], registers: Float[Array, "R D"]
) -> Float[Array, "B L D"]:
    """The tokens to the front in their order, and at every place behind them its register, counted round and round."""
    length = x.shape[1]
    order = jnp.argsort(~mask, axis=1, stable=True)
    front = jnp.take_along_axis(x, order[..., None], axis=1)
    is_text = np.arange(length) < mask.sum(1, keepdims=True)
    return jnp.where(is_text[..., None], front, jnp.tile(registers, (length // registers.shape[0], 1)))


class LTX2Connectors(nn.Module):
    """Normalises a text's states, projects all layers of a token to one vector, and runs the video connector.

    Attributes:
        config: the shape.
        dtype: compute dtype; parameters are float32, normalisations, rotations and softmax run in float32.
        scan_blocks: True compiles one block and scans it; False unrolls them, for debugging. Equal outputs.
    """

    config: LTX2ConnectorsConfig
    dtype: jnp.dtype = jnp.float32
    scan_blocks: bool = True

    @nn.compact
    def __call__(
        self, states: Float[Array, "B L C layers"], mask: Int[Array, "B L"] | Bool[Array, "B L"]
    ) -> tuple[Float[Array, "B L C"], Int[Array, "B L"]]:
        """Makes the transformer's prompt.

        Args:
            states: hidden states of the text encoder's embeddings and layers, stacked on the last axis; normalised
                already or not. ``L`` is a multiple of the number of registers.
            mask: not 0 for tokens, 0 for padding.

        Returns:
            The prompt, text first, and its mask: all ones, since registers are seen like text.

        Raises:
            UserError: states of another shape, or a length that is no multiple of the number of registers.
        """
        cfg = self.config
        if states.shape[2:] != (cfg.caption_channels, cfg.text_proj_in_factor) or mask.shape != states.shape[:2]:
            raise UserError(
                f"states of shape {states.shape} with a mask of {mask.shape}: allowed are (texts, tokens, "
                f"{cfg.caption_channels}, {cfg.text_proj_in_factor}) and (texts, tokens); give this model's text "
                "encoder's"
            )
        packed = normalize_packed_states(states, mask).astype(self.dtype)
        packed = packed.reshape(*mask.shape, -1)
        init = torch_uniform(packed.shape[-1])
        x = Linear(cfg.caption_channels, cfg.proj_bias, self.dtype, init, name="text_proj_in")(packed)
        connector = VideoConnector(cfg, self.dtype, self.scan_blocks, name="video_connector")
        return connector(x, mask != 0), jnp.ones(mask.shape, jnp.int32)
