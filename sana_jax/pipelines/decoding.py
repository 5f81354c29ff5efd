"""From latent videos to what a call returns of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels.typing import Array, Float
from sana_jax.autoencoders import VideoAutoencoder
from sana_jax.errors import UserError
from sana_jax.images import to_pil
from sana_jax.pipelines.base import OutputType
from sana_jax.pipelines.checks import check_finite

_STREAMING_CONTEXT = 1  # latent frames that are decoded again before a block, for decoders that are not causal


def as_latents(latents: Float[Array, "B T H W C"]) -> Float[np.ndarray, "B C T H W"]:
    """Latent videos in the order of axes that pipelines return."""
    return np.ascontiguousarray(np.moveaxis(np.asarray(latents), -1, 1))


def decodes_blocks(autoencoder: Any) -> bool:
    """Whether an autoencoder decodes frames as they come."""
    causal = getattr(getattr(autoencoder, "config", None), "decoder_causal", True)
    return hasattr(autoencoder, "decode_frames") and (causal or getattr(autoencoder, "streaming_context", 0) > 0)


def stream_blocks(autoencoder: Any, name: Any) -> None:
    """Has a decoder that is not causal decode block by block, which a line says; ``name`` is the model's."""
    if not decodes_blocks(autoencoder) and hasattr(autoencoder, "streaming_context"):
        autoencoder.streaming_context = _STREAMING_CONTEXT
        print(
            f"{name}: the decoder is not causal; every block is decoded with {_STREAMING_CONTEXT} latent frame before "
            "it again, which comes close to the whole video's frames"
        )


def check_decodes_blocks(autoencoder: Any, pipeline: str) -> None:
    """Raises ``UserError`` for an autoencoder that ``pipeline``, which decodes frames as they come, cannot use."""
    if not decodes_blocks(autoencoder):
        raise UserError(
            f"{pipeline} with the autoencoder {type(autoencoder).__name__}, which decodes whole videos alone; allowed "
            "is one that is causal, or LTX2VideoAutoencoder with streaming_context=1 or 2: set it"
        )


def decoded_videos(
    autoencoder: VideoAutoencoder,
    latents: Float[Array, "B T h w C"],
    output_type: OutputType,
    made: str,
    finish: Callable[[Float[np.ndarray, "F H W 3"]], Float[np.ndarray, "F H W 3"]],
) -> Float[np.ndarray, "B F H W 3"] | list[list[Any]]:
    """Latent videos, decoded one after another: an array in [0, 1] for ``"np"``, lists of PIL images for ``"pil"``.

    Args:
        autoencoder: draws them.
        latents: normalised as the transformers see them.
        output_type: ``"np"`` or ``"pil"``.
        made: what the pipeline makes, for messages.
        finish: what becomes of a video's frames around [-1, 1].

    Raises:
        UserError: values that are not finite.
    """
    videos = []
    for index in range(latents.shape[0]):
        decoded = np.asarray(autoencoder.decode(latents[index : index + 1]), np.float32)
        check_finite("decoding", decoded, made)
        videos.append(np.clip(finish(decoded[0]) / 2 + 0.5, 0.0, 1.0))
    return np.stack(videos) if output_type == "np" else [[to_pil(frame) for frame in video] for video in videos]
