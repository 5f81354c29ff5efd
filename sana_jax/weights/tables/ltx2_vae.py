"""``AutoencoderKLLTX2Video``: ``vae/diffusion_pytorch_model.safetensors``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sana_jax.weights.rules import Rule, linear
from sana_jax.weights.tables.wan import CONV_3D

if TYPE_CHECKING:  # the autoencoders import this table
    from sana_jax.autoencoders.ltx2_config import LTX2AutoencoderConfig


def ltx2_vae_rules(config: LTX2AutoencoderConfig) -> tuple[Rule, ...]:
    """The rules of an autoencoder of any shape."""
    del config  # the tree's own shapes say which rules apply
    return (
        Rule("statistics/mean", "latents_mean"),
        Rule("statistics/std", "latents_std"),
        *_half("encoder", "down_blocks", "downsamplers"),
        *_half("decoder", "up_blocks", "upsamplers"),
    )


def _half(half: str, blocks: str, resamplers: str) -> Iterator[Rule]:
    # a published convolution has its weights one level further down than its name
    for name in ("conv_in", "conv_out"):
        yield from linear(f"{half}/{name}", f"{half}.{name}.conv", CONV_3D)
    stage = f"{half}.{blocks}.{{block}}"
    for i in (1, 2):
        ours, theirs = f"{half}/mid_block_resnets_{{i}}", f"{half}.mid_block.resnets.{{i}}"
        yield from linear(f"{ours}/conv{i}", f"{theirs}.conv{i}.conv", CONV_3D)
        ours = f"{half}/{blocks}_{{block}}_resnets_{{i}}"
        yield from linear(f"{ours}/conv{i}", f"{stage}.resnets.{{i}}.conv{i}.conv", CONV_3D)
    ours = f"{half}/{blocks}_{{block}}_{resamplers}_{{i}}/conv"
    yield from linear(ours, f"{stage}.{resamplers}.{{i}}.conv.conv", CONV_3D)
