"""``SanaWMTransformer3DModel``: ``transformer/diffusion_pytorch_model.safetensors`` of SANA-WM.

The original file ``dit/sana_wm_1600m_720p.safetensors`` has the same names, but for the embedder of times, two arrays
that the network does not use and, in early versions, a prefix; the table is chosen by the names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from sana_jax.models.sana_wm_config import SanaWMConfig
from sana_jax.weights.layouts import DEPTHWISE, DEPTHWISE_1D, OVER_FRAMES, POINTWISE, video_patch
from sana_jax.weights.rules import Rule, linear, norm

EARLY_PREFIX = "_inner."
# an unused buffer of every block, which the published class saves
NOT_PARAMETERS = (r"blocks\.\d+\.attn\.recall_gate",)
DROPPED = (r"_inner\..*\.recall_gate", r"(_inner\.)?pos_embed", r"(_inner\.)?y_embedder\.y_embedding")
_TIME_LAYERS = {"published": ("linear_1", "linear_2"), "original": ("mlp.0", "mlp.2")}

_ATTENTION = {
    "to_qkv": "qkv",
    "to_out": "proj",
    "to_gate": "output_gate",
    "to_beta": "beta_proj",
    "to_decay": "gate_proj",
    "to_q_camera": "q_proj_cam",
    "to_k_camera": "k_proj_cam",
    "to_v_camera": "v_proj_cam",
    "to_out_camera": "out_proj_cam",
}
_ATTENTION_NORMS = {
    "norm_q": "q_norm",
    "norm_k": "k_norm",
    "norm_q_camera": "q_norm_cam",
    "norm_k_camera": "k_norm_cam",
}


def transformer_rules(config: SanaWMConfig, names: Collection[str] = ()) -> tuple[Rule, ...]:
    """The rules of SANA-WM.

    Args:
        config: the network's shape, which says which layers are of which kind.
        names: the checkpoint's names, which say how they are spelt; none for those of diffusers 0.42.1.
    """
    prefix = EARLY_PREFIX if any(name.startswith(EARLY_PREFIX) for name in names) else ""
    spelling = "original" if f"{prefix}t_embedder.mlp.0.weight" in names else "published"
    embedder = "time_embed/timestep_embedder"
    patch = video_patch(config.patch_size)
    rules = (
        *linear("patch_embedding", "x_embedder.proj", patch),
        *linear("plucker_embedding", "plucker_embedder.proj", patch),
        *linear("raymap_embedding", "raymap_embedder.proj", patch),
        *linear(f"{embedder}/linear_1", f"t_embedder.{_TIME_LAYERS[spelling][0]}"),
        *linear(f"{embedder}/linear_2", f"t_embedder.{_TIME_LAYERS[spelling][1]}"),
        *linear("time_embed/linear", "t_block.1"),
        *linear("caption_projection/linear_1", "y_embedder.y_proj.fc1"),
        *linear("caption_projection/linear_2", "y_embedder.y_proj.fc2"),
        *norm("caption_norm", "attention_y_norm"),
        *_blocks("delta_blocks", config.delta_layers),
        *_blocks("softmax_blocks", config.softmax_layers),
        Rule("scale_shift_table", "final_layer.scale_shift_table"),
        *linear("proj_out", "final_layer.linear"),
    )
    return tuple(dataclasses.replace(rule, theirs=f"{prefix}{rule.theirs}") for rule in rules)


def _blocks(ours: str, layers: tuple[int, ...]) -> Iterator[Rule]:
    """The rules of all blocks of one kind, whose numbers are given."""
    theirs = "blocks.{layer}"
    rules = [Rule(f"{ours}/scale_shift_table", f"{theirs}.scale_shift_table")]
    rules += linear(f"{ours}/plucker_proj", f"{theirs}.plucker_proj")
    for mine, name in _ATTENTION.items():
        rules += linear(f"{ours}/attn1/{mine}", f"{theirs}.attn.{name}")
    for mine, name in _ATTENTION_NORMS.items():
        rules += norm(f"{ours}/attn1/{mine}", f"{theirs}.attn.{name}")
    rules += [
        Rule(f"{ours}/attn1/decay_rate_log", f"{theirs}.attn.A_log"),
        Rule(f"{ours}/attn1/decay_bias", f"{theirs}.attn.dt_bias"),
    ]
    for letter in "qkv":
        for mine, name in (("", ""), ("_camera", "_cam")):
            path = f"{ours}/attn1/conv_{letter}{mine}_kernel"
            rules.append(Rule(path, f"{theirs}.attn.conv_{letter}{name}.weight", DEPTHWISE_1D))
    for mine, name in (("to_q", "q_linear"), ("to_kv", "kv_linear"), ("to_out", "proj")):
        rules += linear(f"{ours}/attn2/{mine}", f"{theirs}.cross_attn.{name}")
    for letter in "qk":
        rules += norm(f"{ours}/attn2/norm_{letter}", f"{theirs}.cross_attn.{letter}_norm")
    rules += linear(f"{ours}/ff/conv_inverted", f"{theirs}.mlp.inverted_conv.conv", POINTWISE)
    rules += linear(f"{ours}/ff/conv_depth", f"{theirs}.mlp.depth_conv.conv", DEPTHWISE)
    rules += linear(f"{ours}/ff/conv_point", f"{theirs}.mlp.point_conv.conv", POINTWISE)
    rules += linear(f"{ours}/ff/conv_temp", f"{theirs}.mlp.t_conv", OVER_FRAMES)
    for layer in (1, 2):
        rules += linear(f"{ours}/ff_{layer}", f"{theirs}.mlp.fc{layer}")
    return (dataclasses.replace(rule, layers=layers) for rule in rules)
