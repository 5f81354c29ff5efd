"""``SanaTransformer2DModel`` and ``SanaControlNetModel``: ``transformer/diffusion_pytorch_model.safetensors``."""

from __future__ import annotations

from sana_jax.models.sana import SanaConfig
from sana_jax.weights.layouts import DEPTHWISE, POINTWISE, patch
from sana_jax.weights.rules import Rule, linear, norm

_BLOCK, _THEIR_BLOCK = "transformer_blocks", "transformer_blocks.{layer}"

BLOCK = (
    Rule(f"{_BLOCK}/scale_shift_table", f"{_THEIR_BLOCK}.scale_shift_table"),
    *(
        rule
        for attention in ("attn1", "attn2")
        for rule in (
            *linear(f"{_BLOCK}/{attention}/to_q", f"{_THEIR_BLOCK}.{attention}.to_q"),
            *linear(f"{_BLOCK}/{attention}/to_k", f"{_THEIR_BLOCK}.{attention}.to_k"),
            *linear(f"{_BLOCK}/{attention}/to_v", f"{_THEIR_BLOCK}.{attention}.to_v"),
            *linear(f"{_BLOCK}/{attention}/to_out", f"{_THEIR_BLOCK}.{attention}.to_out.0"),
            *norm(f"{_BLOCK}/{attention}/norm_q", f"{_THEIR_BLOCK}.{attention}.norm_q"),
            *norm(f"{_BLOCK}/{attention}/norm_k", f"{_THEIR_BLOCK}.{attention}.norm_k"),
        )
    ),
    *linear(f"{_BLOCK}/ff/conv_inverted", f"{_THEIR_BLOCK}.ff.conv_inverted", POINTWISE),
    *linear(f"{_BLOCK}/ff/conv_depth", f"{_THEIR_BLOCK}.ff.conv_depth", DEPTHWISE),
    *linear(f"{_BLOCK}/ff/conv_point", f"{_THEIR_BLOCK}.ff.conv_point", POINTWISE),
)


def _before_the_blocks(config: SanaConfig) -> tuple[Rule, ...]:
    patches = linear("patch_embed/proj", "patch_embed.proj", patch(config.patch_size))
    return (*patches, *embedder_rules(guidance=config.guidance_embeds))


def embedder_rules(*, guidance: bool) -> tuple[Rule, ...]:
    """The embedders of time and caption, which SANA-Video has too."""
    # Without a guidance embedder the published time embedder has one level more.
    time = "time_embed" if guidance else "time_embed.emb"
    embedders = ("timestep_embedder", "guidance_embedder")
    return (
        *(
            rule
            for embedder in embedders
            for layer in ("linear_1", "linear_2")
            for rule in linear(f"time_embed/{embedder}/{layer}", f"{time}.{embedder}.{layer}")
        ),
        *linear("time_embed/linear", "time_embed.linear"),
        *linear("caption_projection/linear_1", "caption_projection.linear_1"),
        *linear("caption_projection/linear_2", "caption_projection.linear_2"),
        *norm("caption_norm", "caption_norm"),
    )


def transformer_rules(config: SanaConfig) -> tuple[Rule, ...]:
    """The rules of SANA, SANA-1.5 and SANA-Sprint."""
    return (
        *_before_the_blocks(config),
        *BLOCK,
        Rule("scale_shift_table", "scale_shift_table"),
        *linear("proj_out", "proj_out"),
    )


def controlnet_rules(config: SanaConfig) -> tuple[Rule, ...]:
    """The rules of a ControlNet: the transformer's blocks with a zero-initialised layer before and after each."""
    return (
        *_before_the_blocks(config),
        *BLOCK,
        *linear("input_block", "input_block"),
        *linear("controlnet_blocks", "controlnet_blocks.{layer}"),
    )
