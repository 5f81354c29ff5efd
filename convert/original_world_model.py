"""SANA-WM's original file of weights, ``dit/sana_wm_1600m_720p.safetensors``: its names and its configuration."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from convert.renames import Rename, RenamedSource
from convert.tables.sana_wm_original import world_model_table
from sana_jax.errors import CheckpointError
from sana_jax.models.sana_wm_config import CLASS_NAME
from sana_jax.weights.messages import describe_array
from sana_jax.weights.safetensors_files import TensorSource
from sana_jax.weights.tables.sana_wm import DROPPED, EARLY_PREFIX

FLOW_SHIFT = 9.8
# width -> heads of attention to the caption, which cannot be seen in the weights
CROSS_HEADS = {2240: 20}
_MARK = re.compile(r"(_inner\.)?blocks\.\d+\.attn\.q_proj_cam\.weight")


def is_world_model(source: TensorSource) -> bool:
    """Whether the names are SANA-WM's, in any spelling."""
    return any(_MARK.fullmatch(name) for name in source.tensors)


def renamed_world_model(source: TensorSource) -> RenamedSource:
    """The tensors under the names of ``SanaWMTransformer3DModel``."""
    table = world_model_table()
    early = [dataclasses.replace(rename, original=f"{EARLY_PREFIX}{rename.original}") for rename in table]
    early += [
        Rename(name, (name.removeprefix(EARLY_PREFIX),)) for name in source.tensors if name.startswith(EARLY_PREFIX)
    ]
    return RenamedSource(source, (*table, *early), DROPPED)


def infer_world_model_config(source: RenamedSource) -> dict[str, Any]:
    """The ``config.json`` that a SANA-WM of these names and shapes has.

    Raises:
        CheckpointError: a tensor that says something about the shape is missing or has an impossible shape.
    """
    names = source.tensors

    def shape(name: str, axes: int) -> tuple[int, ...]:
        info = names.get(name)
        if info is None or len(info.shape) != axes or 0 in info.shape:
            found = "is missing" if info is None else f"is {describe_array(info)}"
            raise CheckpointError(
                f"{source.location}: {name} {found}; it says how the network is built: download it again"
            )
        return info.shape

    width, channels, *patch = shape("x_embedder.proj.weight", 5)
    if width not in CROSS_HEADS:
        raise CheckpointError(
            f"{source.location}: width {width} is not a published one ({', '.join(map(str, CROSS_HEADS))}), and the "
            "number of cross-attention's heads cannot be seen in the weights: convert it to a diffusers directory with "
            "a config.json first"
        )
    layers = len({match[1] for name in names if (match := re.match(r"blocks\.(\d+)\.", name))})
    convolved = [f"blocks.{layer}.attn.conv_k.weight" in names for layer in range(layers)]
    if not any(convolved):
        raise CheckpointError(
            f"{source.location}: no block has a short convolution, so that it cannot be seen which of them have "
            "softmax attention: convert it to a diffusers directory with a config.json first"
        )
    (heads,) = shape("blocks.0.attn.A_log", 1)
    mix_ffn = "blocks.0.mlp.inverted_conv.conv.weight" in names
    hidden = (
        shape("blocks.0.mlp.inverted_conv.conv.weight", 4)[0] // 2
        if mix_ffn
        else shape("blocks.0.mlp.fc1.weight", 2)[0]
    )
    plucker = "plucker_embedder.proj.weight" in names
    first = convolved.index(True)
    return {
        "_class_name": CLASS_NAME,
        "in_channels": channels,
        "num_layers": layers,
        "hidden_size": width,
        "num_attention_heads": CROSS_HEADS[width],
        "patch_size": patch,
        "softmax_every_n": convolved.index(False) + 1 if not all(convolved) else 0,
        "linear_head_dim": width // heads,
        "ffn_type": "GLUMBConvTemp" if mix_ffn else "mlp",
        "conv_kernel_size": shape(f"blocks.{first}.attn.conv_k.weight", 3)[2],
        "k_conv_only": f"blocks.{first}.attn.conv_q.weight" not in names,
        "qk_norm": "blocks.0.attn.q_norm.weight" in names,
        "cross_norm": "blocks.0.cross_attn.q_norm.weight" in names,
        "y_norm": "attention_y_norm.weight" in names,
        "use_chunk_plucker_post_attn": plucker,
        "chunk_plucker_channels": shape("plucker_embedder.proj.weight", 5)[1] if plucker else 48,
        "chunk_plucker_post_attn_blocks": sum(name.endswith(".plucker_proj.weight") for name in names),
        "caption_channels": shape("y_embedder.y_proj.fc1.weight", 2)[1],
        "mlp_ratio": hidden / width,
    }
