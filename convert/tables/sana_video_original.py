"""SANA-Video and LongSANA as NVlabs save them: original name -> ``SanaVideoTransformer3DModel``'s."""

from __future__ import annotations

from convert.renames import Rename, both
from convert.tables import sana_original

DROPPED = sana_original.DROPPED


def video_transformer_table() -> tuple[Rename, ...]:
    """Every tensor of the transformer: SANA's, but for the patch embedding and the convolution over frames."""
    embedders = [rename for rename in sana_original.embedders(guidance=False) if "x_embedder" not in rename.original]
    return (
        *both("x_embedder.proj", "patch_embedding"),
        *embedders,
        *sana_original.block("blocks.{layer}", "transformer_blocks.{layer}"),
        Rename("blocks.{layer}.mlp.t_conv.weight", ("transformer_blocks.{layer}.ff.conv_temp.weight",)),
        Rename("final_layer.scale_shift_table", ("scale_shift_table",)),
        *both("final_layer.linear", "proj_out"),
    )
