"""``SanaVideoTransformer3DModel``: ``transformer/diffusion_pytorch_model.safetensors`` of SANA-Video and LongSANA."""

from __future__ import annotations

from sana_jax.models.sana_video import SanaVideoConfig
from sana_jax.weights.layouts import OVER_FRAMES, video_patch
from sana_jax.weights.rules import Rule, linear
from sana_jax.weights.tables.sana import BLOCK, embedder_rules


def transformer_rules(config: SanaVideoConfig) -> tuple[Rule, ...]:
    """The rules of SANA-Video: SANA's, a 3-D patch embedding, and the Mix-FFN's convolution over frames."""
    return (
        *linear("patch_embedding", "patch_embedding", video_patch(config.patch_size)),
        *embedder_rules(guidance=False),
        *BLOCK,
        *linear("transformer_blocks/ff/conv_temp", "transformer_blocks.{layer}.ff.conv_temp", OVER_FRAMES),
        Rule("scale_shift_table", "scale_shift_table"),
        *linear("proj_out", "proj_out"),
    )
