"""Every network that can be compared, by its published class."""

from __future__ import annotations

from collections.abc import Callable

from convert.families import Network
from convert.verify.networks import (
    Inputs,
    Pass,
    Whole,
    autoencoder_passes,
    controlnet_passes,
    text_encoder_passes,
    transformer_passes,
    video_autoencoder_passes,
    video_transformer_passes,
)
from convert.verify.world_networks import connectors_passes, ltx2_passes, world_model_passes

PASSES: dict[str, Callable[[Network, Inputs, bool], tuple[list[Pass], list[Whole]]]] = {
    "SanaTransformer2DModel": transformer_passes,
    "SanaVideoTransformer3DModel": video_transformer_passes,
    "SanaWMTransformer3DModel": world_model_passes,
    "SanaControlNetModel": controlnet_passes,
    "SanaWMLTX2RefinerTransformer3DModel": ltx2_passes,
    "LTX2VideoTransformer3DModel": ltx2_passes,
    "LTX2TextConnectors": connectors_passes,
    "AutoencoderDC": autoencoder_passes,
    "AutoencoderKLWan": video_autoencoder_passes,
    "AutoencoderKLLTX2Video": video_autoencoder_passes,
    "Gemma2Model": text_encoder_passes,
    "Gemma3ForConditionalGeneration": text_encoder_passes,
    "Gemma3TextModel": text_encoder_passes,
}
