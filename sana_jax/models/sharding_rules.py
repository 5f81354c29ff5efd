"""How each network's parameters are cut over a mesh: ordered (path pattern, axis per dimension) pairs, as data.

A pattern matches a parameter's whole path; every parameter matches exactly one. Axes: ``fsdp`` cuts the dimension that
is contracted before use, ``tensor`` cuts heads and hidden width, so that each half of a pair of products (q/k/v and
out, inverted and point) needs one reduction. Blocks are stacked: their first dimension is the layer.
"""

from __future__ import annotations

Rule = tuple[str, tuple[str | None, ...]]

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
