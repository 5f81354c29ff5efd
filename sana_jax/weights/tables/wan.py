"""``AutoencoderKLWan``, Wan 2.1: ``vae/diffusion_pytorch_model.safetensors``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sana_jax.weights.layouts import CONV, POINTWISE, Layout
from sana_jax.weights.rules import Rule, linear

if TYPE_CHECKING:  # the autoencoders import this table
    from sana_jax.autoencoders.wan_config import WanConfig

# (out, in, kt, kh, kw) <-> (kt, kh, kw, in, out)
CONV_3D = Layout("3-D conv", lambda theirs: theirs.transpose(2, 3, 4, 1, 0), lambda ours: ours.transpose(4, 3, 0, 1, 2))
# (out, in, 1, 1, 1) <-> (in, out)
POINTWISE_3D = Layout("3-D pointwise", lambda t: t[:, :, 0, 0, 0].T, lambda ours: ours.T[:, :, None, None, None])
# (out, in, kt, 1, 1) <-> (kt, in, out)
TEMPORAL = Layout(
    "temporal conv", lambda t: t[..., 0, 0].transpose(2, 1, 0), lambda ours: ours.transpose(2, 1, 0)[..., None, None]
)
# a norm's scale: (C, 1, 1, 1) or, of pictures, (C, 1, 1) <-> (C,)
GAMMA_3D = Layout("gamma of frames", lambda theirs: theirs[:, 0, 0, 0], lambda ours: ours[:, None, None, None])
GAMMA_2D = Layout("gamma of pictures", lambda theirs: theirs[:, 0, 0], lambda ours: ours[:, None, None])


def wan_rules(config: WanConfig) -> tuple[Rule, ...]:
    """The rules of an autoencoder of any shape."""
    del config  # the tree's own shapes say which rules apply
    return (
        *linear("encoder/quant_conv", "quant_conv", POINTWISE_3D),
        *linear("decoder/post_quant_conv", "post_quant_conv", POINTWISE_3D),
        *_half("encoder"),
        *_half("decoder"),
        *_residual("encoder/down_blocks_{block}", "encoder.down_blocks.{block}"),
        *_resample("encoder/down_blocks_{block}", "encoder.down_blocks.{block}"),
        *_residual("decoder/up_blocks_{block}_resnets_{i}", "decoder.up_blocks.{block}.resnets.{i}"),
        *_resample("decoder/up_blocks_{block}_upsamplers_{i}", "decoder.up_blocks.{block}.upsamplers.{i}"),
    )


def _half(half: str) -> Iterator[Rule]:
    yield from linear(f"{half}/conv_in", f"{half}.conv_in", CONV_3D)
    yield from linear(f"{half}/conv_out", f"{half}.conv_out", CONV_3D)
    yield Rule(f"{half}/norm_out/gamma", f"{half}.norm_out.gamma", GAMMA_3D)
    yield from _residual(f"{half}/mid_block/resnets_{{i}}", f"{half}.mid_block.resnets.{{i}}")
    ours, theirs = f"{half}/mid_block/attentions_{{i}}", f"{half}.mid_block.attentions.{{i}}"
    yield Rule(f"{ours}/norm/gamma", f"{theirs}.norm.gamma", GAMMA_2D)
    for layer in ("to_qkv", "proj"):
        yield from linear(f"{ours}/{layer}", f"{theirs}.{layer}", POINTWISE)


def _residual(ours: str, theirs: str) -> Iterator[Rule]:
    for i in (1, 2):
        yield Rule(f"{ours}/norm{i}/gamma", f"{theirs}.norm{i}.gamma", GAMMA_3D)
        yield from linear(f"{ours}/conv{i}", f"{theirs}.conv{i}", CONV_3D)
    yield from linear(f"{ours}/conv_shortcut", f"{theirs}.conv_shortcut", POINTWISE_3D)


def _resample(ours: str, theirs: str) -> Iterator[Rule]:
    yield from linear(f"{ours}/resample", f"{theirs}.resample.1", CONV)
    yield from linear(f"{ours}/time_conv", f"{theirs}.time_conv", TEMPORAL)
