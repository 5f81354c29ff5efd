"""How each network's parameters are cut over a mesh: ordered (path pattern, axis per dimension) pairs, as data.

A pattern matches a parameter's whole path; every parameter matches exactly one. Blocks are stacked: their first
dimension is the layer. Axes: ``fsdp`` cuts a dimension that is gathered before use; ``tensor`` cuts the width of
attention and of the Mix-FFN, so that the second product of each pair (out, point) ends in one reduction. Two costs of
``tensor``: the Mix-FFN's value and gate lie on one axis, so their product exchanges activations between the devices
that hold the halves; and where the axis does not divide the number of heads (70 or 36, 20 or 16), heads are gathered.
"""

from __future__ import annotations

Rule = tuple[str, tuple[str | tuple[str, ...] | None, ...]]

SANA: tuple[Rule, ...] = (
    (r"transformer_blocks/attn[12]/to_[qkv]/kernel", (None, "fsdp", "tensor")),
    (r"transformer_blocks/attn[12]/to_[qkv]/bias", (None, "tensor")),
    (r"transformer_blocks/attn[12]/norm_[qk]/scale", (None, "tensor")),
    (r"transformer_blocks/attn[12]/to_out/kernel", (None, "tensor", "fsdp")),
    (r"transformer_blocks/attn[12]/to_out/bias", (None, None)),
    (r"transformer_blocks/ff/conv_inverted/kernel", (None, "fsdp", "tensor")),
    (r"transformer_blocks/ff/conv_inverted/bias", (None, "tensor")),
    (r"transformer_blocks/ff/conv_depth/kernel", (None, None, None, "tensor")),
    (r"transformer_blocks/ff/conv_depth/bias", (None, "tensor")),
    (r"transformer_blocks/ff/conv_point/kernel", (None, "tensor", "fsdp")),
    (r"transformer_blocks/scale_shift_table", (None, None, None)),
    (r"patch_embed/proj/kernel", (None, "fsdp")),
    (r"(time_embed/(timestep|guidance)_embedder|caption_projection)/linear_1/kernel", ("fsdp", "tensor")),
    (r"(time_embed/(timestep|guidance)_embedder|caption_projection)/linear_1/bias", ("tensor",)),
    (r"(time_embed/(timestep|guidance)_embedder|caption_projection)/linear_2/kernel", ("tensor", "fsdp")),
    # Six vectors per sample come of it: cut by its output, they would be scattered over the devices.
    (r"time_embed/linear/kernel", ("fsdp", None)),
    (r"proj_out/kernel", ("fsdp", None)),
    (r"(patch_embed/proj|(time_embed/.*|caption_projection)/linear_2|time_embed/linear|proj_out)/bias", (None,)),
    (r"caption_norm/scale", (None,)),
    (r"scale_shift_table", (None, None)),
)

# SANA-Video's blocks and embeddings are SANA's; its Mix-FFN has a product over three frames behind it.
SANA_VIDEO: tuple[Rule, ...] = (
    *((pattern.replace("patch_embed/proj", "patch_embedding"), axes) for pattern, axes in SANA),
    (r"transformer_blocks/ff/conv_temp/kernel", (None, "tensor", "fsdp")),
)


def lora_rules(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Where a LoRA's ``lora/<layer>/down`` and ``up`` lie: cut as the layer's kernel is, with the rank whole."""
    kernels = [(pattern.removesuffix("/kernel"), axes) for pattern, axes in rules if pattern.endswith("/kernel")]
    return tuple(
        rule
        for layer, axes in kernels
        if len(axes) <= 3  # depthwise convolutions have no LoRA
        for rule in (
            (f"lora/({layer})/down", (*axes[:-1], None)),
            (f"lora/({layer})/up", (*axes[:-2], None, axes[-1])),
        )
    )


# A ControlNet has the transformer's blocks and embeddings, and no output layer.
_NOT_IN_A_CONTROLNET = (r"proj_out/kernel", r"scale_shift_table")
CONTROLNET: tuple[Rule, ...] = (
    *(rule for rule in SANA if rule[0] not in _NOT_IN_A_CONTROLNET),
    (r"input_block/kernel", ("fsdp", None)),
    (r"input_block/bias", (None,)),
    (r"controlnet_blocks/kernel", (None, "fsdp", None)),
    (r"controlnet_blocks/bias", (None, None)),
)

# The encoders of condition tokens, trained beside the transformer: small, so only their widths are cut.
CONDITION_TOKENS: tuple[Rule, ...] = (
    (r"tokens/\w+/linear_\d+/kernel", (None, "fsdp")),
    (r"tokens/\w+/linear_\d+/bias", (None,)),
    (r"tokens/\w+/null", (None, None)),
    (r"tokens/\w+/attention_weight", ()),
)
