"""How each network's parameters are cut over a mesh: ordered (path pattern, axis per dimension) pairs, as data.

A pattern matches a parameter's whole path; every parameter matches exactly one. Blocks are stacked: their first
dimension is the layer. Axes: ``fsdp`` cuts a dimension that is gathered before use; ``tensor`` cuts the width of
attention and of the Mix-FFN, so that the second product of each pair (out, point) ends in one reduction. Two costs of
``tensor``: the Mix-FFN's value and gate lie on one axis, so their product exchanges activations between the devices
that hold the halves; and where the axis does not divide the number of heads (70 or 36, 20 or 16), heads are gathered.

``train`` reads the rules of the networks that it trains. Pipelines open their weights on one device: ``LTX2`` and
``LTX2_CONNECTORS`` are for programs that lay SANA-WM's refiner over a mesh of their own, as ``quantized_rules`` of
``sana_jax.quantization.trees`` is for quantised weights.
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

# LTX-2's blocks have attention, with a gate per head in some models, and a plain feed-forward network.
_LTX2_BLOCK: tuple[Rule, ...] = (
    (r"attn[12]/to_[qkv]/kernel", (None, "fsdp", "tensor")),
    (r"attn[12]/to_[qkv]/bias", (None, "tensor")),
    (r"attn[12]/norm_[qk]/scale", (None, "tensor")),
    (r"attn[12]/to_gate_logits/kernel", (None, "fsdp", None)),
    (r"attn[12]/to_gate_logits/bias", (None, None)),
    (r"attn[12]/to_out/kernel", (None, "tensor", "fsdp")),
    (r"attn[12]/to_out/bias", (None, None)),
    (r"ff/linear_1/kernel", (None, "fsdp", "tensor")),
    (r"ff/linear_1/bias", (None, "tensor")),
    (r"ff/linear_2/kernel", (None, "tensor", "fsdp")),
    (r"ff/linear_2/bias", (None, None)),
)
LTX2: tuple[Rule, ...] = (
    *((f"transformer_blocks/{pattern}", axes) for pattern, axes in _LTX2_BLOCK),
    (r"transformer_blocks/scale_shift_table", (None, None, None)),
    (r"proj_in/kernel", (None, "fsdp")),
    (r"(time_embed/timestep_embedder|caption_projection)/linear_1/kernel", ("fsdp", "tensor")),
    (r"(time_embed/timestep_embedder|caption_projection)/linear_1/bias", ("tensor",)),
    (r"(time_embed/timestep_embedder|caption_projection)/linear_2/kernel", ("tensor", "fsdp")),
    # As in SANA: of the few times come vectors that every device needs.
    (r"time_embed/linear/kernel", ("fsdp", None)),
    (r"proj_out/kernel", ("fsdp", None)),
    (r"(proj_in|(time_embed/.*|caption_projection)/linear_2|time_embed/linear|proj_out)/bias", (None,)),
    (r"scale_shift_table", (None, None)),
)
LTX2_CONNECTORS: tuple[Rule, ...] = (
    *((f"video_connector/transformer_blocks/{pattern}", axes) for pattern, axes in _LTX2_BLOCK),
    (r"video_connector/learnable_registers", (None, "fsdp")),
    (r"text_proj_in/kernel", ("fsdp", "tensor")),
    (r"text_proj_in/bias", ("tensor",)),
)


# SANA-WM's two kinds of block. Queries, keys and values of self-attention lie on one axis, and keys and values of
# cross-attention, so that cutting it exchanges activations as for the Mix-FFN's halves; gates have an output per head.
_WM = r"(delta|softmax)_blocks"
SANA_WM: tuple[Rule, ...] = (
    (rf"{_WM}/attn1/to_(qkv|gate|q_camera|k_camera|v_camera)/kernel", (None, "fsdp", "tensor")),
    (rf"{_WM}/attn1/to_(qkv|gate|q_camera|k_camera|v_camera)/bias", (None, "tensor")),
    (rf"{_WM}/attn1/to_(out|out_camera)/kernel", (None, "tensor", "fsdp")),
    (rf"{_WM}/attn1/to_(beta|decay)/kernel", (None, "fsdp", None)),
    (rf"{_WM}/attn1/(to_(beta|decay)/bias|decay_rate_log|decay_bias)", (None, None)),
    (rf"{_WM}/attn1/norm_[qk](_camera)?/scale", (None, "tensor")),
    (rf"{_WM}/attn1/conv_[qkv](_camera)?_kernel", (None, None, "tensor")),
    (rf"{_WM}/attn2/to_(q|kv)/kernel", (None, "fsdp", "tensor")),
    (rf"{_WM}/attn2/to_(q|kv)/bias", (None, "tensor")),
    (rf"{_WM}/attn2/norm_[qk]/scale", (None, "tensor")),
    (rf"{_WM}/attn2/to_out/kernel", (None, "tensor", "fsdp")),
    (rf"{_WM}/plucker_proj/kernel", (None, "fsdp", None)),
    (rf"{_WM}/(attn1/to_out(_camera)?|attn2/to_out|plucker_proj|ff_2)/bias", (None, None)),
    (rf"{_WM}/(ff/conv_inverted|ff_1)/kernel", (None, "fsdp", "tensor")),
    (rf"{_WM}/(ff/conv_inverted|ff_1)/bias", (None, "tensor")),
    (rf"{_WM}/ff/conv_depth/kernel", (None, None, None, "tensor")),
    (rf"{_WM}/ff/conv_depth/bias", (None, "tensor")),
    (rf"{_WM}/(ff/conv_point|ff/conv_temp|ff_2)/kernel", (None, "tensor", "fsdp")),
    (rf"{_WM}/scale_shift_table", (None, None, None)),
    (r"(patch|plucker|raymap)_embedding/kernel", (None, "fsdp")),
    (r"(patch|plucker|raymap)_embedding/bias", (None,)),
    *(rule for rule in SANA if not rule[0].startswith(("transformer_blocks", r"patch_embed", r"(patch_embed"))),
    (r"(time_embed/.*/linear_2|caption_projection/linear_2|time_embed/linear|proj_out)/bias", (None,)),
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
