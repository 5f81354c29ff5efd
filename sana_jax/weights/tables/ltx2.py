"""``SanaWMLTX2RefinerTransformer3DModel``, ``LTX2VideoTransformer3DModel`` and ``LTX2TextConnectors``.

``transformer/`` and ``connectors/diffusion_pytorch_model.safetensors`` of SANA-WM's refiner and of LTX-2. Their audio
halves are not built and not read: ``AUDIO`` has the names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sana_jax.weights.rules import Rule, linear, norm
from sana_jax.weights.tables.sana import embedder_rules

if TYPE_CHECKING:
    from sana_jax.models.ltx2_config import LTX2Config
    from sana_jax.models.ltx2_connectors import LTX2ConnectorsConfig

# The audio stream's layers, and those between it and the video stream.
AUDIO = (r".*audio.*", r"av_cross_attn_.*", r".*a2v_cross_attn.*")

_BLOCK, _THEIR_BLOCK = "transformer_blocks", "transformer_blocks.{layer}"


def _attention(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        *linear(f"{ours}/to_q", f"{theirs}.to_q"),
        *linear(f"{ours}/to_k", f"{theirs}.to_k"),
        *linear(f"{ours}/to_v", f"{theirs}.to_v"),
        *linear(f"{ours}/to_gate_logits", f"{theirs}.to_gate_logits"),
        *linear(f"{ours}/to_out", f"{theirs}.to_out.0"),
        *norm(f"{ours}/norm_q", f"{theirs}.norm_q"),
        *norm(f"{ours}/norm_k", f"{theirs}.norm_k"),
    )


def _feed_forward(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (*linear(f"{ours}/linear_1", f"{theirs}.net.0.proj"), *linear(f"{ours}/linear_2", f"{theirs}.net.2"))


def transformer_rules(config: LTX2Config) -> tuple[Rule, ...]:
    """The rules of the video half of the transformer."""
    del config  # the tree's own shapes say which rules apply
    return (
        *linear("proj_in", "proj_in"),
        *embedder_rules(guidance=False),
        Rule(f"{_BLOCK}/scale_shift_table", f"{_THEIR_BLOCK}.scale_shift_table"),
        *_attention(f"{_BLOCK}/attn1", f"{_THEIR_BLOCK}.attn1"),
        *_attention(f"{_BLOCK}/attn2", f"{_THEIR_BLOCK}.attn2"),
        *_feed_forward(f"{_BLOCK}/ff", f"{_THEIR_BLOCK}.ff"),
        Rule("scale_shift_table", "scale_shift_table"),
        *linear("proj_out", "proj_out"),
    )


def connectors_rules(config: LTX2ConnectorsConfig) -> tuple[Rule, ...]:
    """The rules of the projection of the text's states, and of the video connector."""
    del config
    connector = "video_connector"
    return (
        *linear("text_proj_in", "text_proj_in"),
        Rule(f"{connector}/learnable_registers", f"{connector}.learnable_registers"),
        *_attention(f"{connector}/{_BLOCK}/attn1", f"{connector}.{_THEIR_BLOCK}.attn1"),
        *_feed_forward(f"{connector}/{_BLOCK}/ff", f"{connector}.{_THEIR_BLOCK}.ff"),
    )
