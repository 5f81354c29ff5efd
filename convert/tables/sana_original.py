"""SANA, SANA-1.5 and SANA-Sprint as NVlabs save them (``.pth``): original name -> ``SanaTransformer2DModel``'s."""

from __future__ import annotations

from convert.renames import Rename, both

# The null caption of training, the position table, and Sprint's weighting of its loss: no weights of the network.
DROPPED = (r"y_embedder\.y_embedding", r"pos_embed", r"logvar_linear\.(weight|bias)")


def embedders(*, guidance: bool) -> tuple[Rename, ...]:
    """What lies before the blocks. With a guidance embedder the published time embedder has one level less."""
    time = "time_embed" if guidance else "time_embed.emb"
    return (
        *both("x_embedder.proj", "patch_embed.proj"),
        *both("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
        *both("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
        Rename("attention_y_norm.weight", ("caption_norm.weight",)),
        *both("t_embedder.mlp.0", f"{time}.timestep_embedder.linear_1"),
        *both("t_embedder.mlp.2", f"{time}.timestep_embedder.linear_2"),
        *both("cfg_embedder.mlp.0", f"{time}.guidance_embedder.linear_1"),
        *both("cfg_embedder.mlp.2", f"{time}.guidance_embedder.linear_2"),
        *both("t_block.1", "time_embed.linear"),
    )


def block(original: str, published: str) -> tuple[Rename, ...]:
    """One block; q, k and v of self-attention are one tensor in the original, and so are k and v of cross-attention."""
    attention, cross, ff = f"{original}.attn", f"{original}.cross_attn", f"{original}.mlp"
    to_q, to_k, to_v = (f"{published}.attn1.to_{name}" for name in "qkv")
    return (
        Rename(f"{original}.scale_shift_table", (f"{published}.scale_shift_table",)),
        *both(f"{attention}.qkv", to_q, to_k, to_v),
        Rename(f"{attention}.q_norm.weight", (f"{published}.attn1.norm_q.weight",)),
        Rename(f"{attention}.k_norm.weight", (f"{published}.attn1.norm_k.weight",)),
        *both(f"{attention}.proj", f"{published}.attn1.to_out.0"),
        *both(f"{cross}.q_linear", f"{published}.attn2.to_q"),
        *both(f"{cross}.kv_linear", f"{published}.attn2.to_k", f"{published}.attn2.to_v"),
        Rename(f"{cross}.q_norm.weight", (f"{published}.attn2.norm_q.weight",)),
        Rename(f"{cross}.k_norm.weight", (f"{published}.attn2.norm_k.weight",)),
        *both(f"{cross}.proj", f"{published}.attn2.to_out.0"),
        *both(f"{ff}.inverted_conv.conv", f"{published}.ff.conv_inverted"),
        *both(f"{ff}.depth_conv.conv", f"{published}.ff.conv_depth"),
        Rename(f"{ff}.point_conv.conv.weight", (f"{published}.ff.conv_point.weight",)),
        # The same feed-forward with its 1x1 convolutions saved as matrices (reinforcement learning checkpoints).
        Rename(f"{ff}.inverted_conv.linear.weight", (f"{published}.ff.conv_inverted.weight",), pointwise=True),
        Rename(f"{ff}.inverted_conv.linear.bias", (f"{published}.ff.conv_inverted.bias",)),
        Rename(f"{ff}.point_conv.linear.weight", (f"{published}.ff.conv_point.weight",), pointwise=True),
    )


def transformer_table(*, guidance: bool) -> tuple[Rename, ...]:
    """Every tensor of the transformer; ``guidance`` for SANA-Sprint."""
    return (
        *embedders(guidance=guidance),
        *block("blocks.{layer}", "transformer_blocks.{layer}"),
        Rename("final_layer.scale_shift_table", ("scale_shift_table",)),
        *both("final_layer.linear", "proj_out"),
    )
