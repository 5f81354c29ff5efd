"""``AutoencoderDC``: ``vae/diffusion_pytorch_model.safetensors``.

Batch norms of the published in and mix members also store ``num_batches_tracked``, how many batches their statistics
were gathered from. No network uses it, so it is not a parameter of ours; ``convert`` keeps it beside the parameters, so
that an export gives it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sana_jax.weights.layouts import CONV, DEPTHWISE, POINTWISE, grouped_pointwise
from sana_jax.weights.rules import Rule, linear, norm

if TYPE_CHECKING:  # the autoencoders import this table
    from sana_jax.autoencoders.dc_ae_config import DCAEConfig

COUNT = "num_batches_tracked"
NOT_PARAMETERS = (rf".*\.{COUNT}",)


def dc_ae_rules(config: DCAEConfig) -> tuple[Rule, ...]:
    """The rules of every member of the family."""
    return (*_half(config, "encoder", "down_blocks"), *_half(config, "decoder", "up_blocks"))


def _half(config: DCAEConfig, half: str, blocks: str) -> Iterator[Rule]:
    stages = config.stages(half)
    for layer in ("conv_in", "conv_out"):
        # Where the first stage has no blocks, the outermost layer changes resolution and has one level more.
        outermost = layer == ("conv_in" if half == "encoder" else "conv_out")
        level = "/conv" if outermost and not stages[0].layers else ""
        yield from linear(f"{half}/{layer}{level}", f"{half}.{layer}{level.replace('/', '.')}", CONV)
    if half == "decoder":
        yield from norm("decoder/norm_out", "decoder.norm_out")
    ours, theirs = f"{half}/{blocks}_{{stage}}_{{block}}", f"{half}.{blocks}.{{stage}}.{{block}}"
    for layer in ("conv", "conv1", "conv2"):
        yield from linear(f"{ours}/{layer}", f"{theirs}.{layer}", CONV)
    yield from _norm(f"{ours}/norm", f"{theirs}.norm")
    for layer in ("to_q", "to_k", "to_v", "to_out"):
        yield from linear(f"{ours}/attn/{layer}", f"{theirs}.attn.{layer}")
    yield from _norm(f"{ours}/attn/norm_out", f"{theirs}.attn.norm_out")
    yield Rule(
        f"{ours}/attn/to_qkv_multiscale_{{scale}}/proj_in/kernel",
        f"{theirs}.attn.to_qkv_multiscale.{{scale}}.proj_in.weight",
        DEPTHWISE,
    )
    for i, stage in enumerate(stages):
        yield Rule(
            f"{half}/{blocks}_{i}_{{block}}/attn/to_qkv_multiscale_{{scale}}/proj_out/kernel",
            f"{half}.{blocks}.{i}.{{block}}.attn.to_qkv_multiscale.{{scale}}.proj_out.weight",
            grouped_pointwise(3 * (stage.channels // config.attention_head_dim)),
        )
    for layer, layout in (("conv_inverted", POINTWISE), ("conv_depth", DEPTHWISE), ("conv_point", POINTWISE)):
        yield from linear(f"{ours}/conv_out/{layer}", f"{theirs}.conv_out.{layer}", layout)
    yield from norm(f"{ours}/conv_out_norm", f"{theirs}.conv_out.norm")


def _norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    """An RMS norm, or a batch norm with its statistics."""
    return (
        *norm(ours, theirs),
        Rule(f"{ours}/mean", f"{theirs}.running_mean"),
        Rule(f"{ours}/var", f"{theirs}.running_var"),
    )
