"""From latent videos to what a call returns of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels.typing import Array, Float
from sana_jax.autoencoders import VideoAutoencoder
from sana_jax.images import to_pil
from sana_jax.pipelines.base import OutputType
from sana_jax.pipelines.checks import check_finite


def as_latents(latents: Float[Array, "B T H W C"]) -> Float[np.ndarray, "B C T H W"]:
    """Latent videos in the order of axes that pipelines return."""
    return np.ascontiguousarray(np.moveaxis(np.asarray(latents), -1, 1))


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
