"""What a pipeline and a trainer ask of an autoencoder."""

from __future__ import annotations

from typing import Any, Protocol

import jax.numpy as jnp

from kernels.typing import Array, Float, PyTree
from sana_jax.errors import UserError

LOG_VARIANCES = (-30.0, 20.0)  # an encoder's are clamped to these


class Autoencoder(Protocol):
    """Pictures to the latents that a transformer sees, and back; both channels-last.

    ``spatial_factor`` is how many picture rows one latent row stands for, ``latent_channels`` is C of the latents and
    ``image_channels`` is 1 for gray pictures, 3 for colour. Scaling belongs to the autoencoder: what ``encode`` returns
    is of about unit variance.
    """

    spatial_factor: int
    latent_channels: int
    image_channels: int

    def encode(self, images: Float[Array, "B H W P"]) -> Float[Array, "B h w C"]:
        """Pictures in [-1, 1] to latents."""
        ...

    def decode(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W P"]:
        """Latents to pictures around [-1, 1], not clamped."""
        ...

    def to_config(self) -> dict[str, Any]:
        """What ``vae/config.json`` holds, ``_class_name`` included."""
        ...


class VideoAutoencoder(Protocol):
    """Videos to the latents that a transformer sees, and back; both channels-last.

    ``temporal_factor`` is how many frames one latent frame stands for. The first stands for one frame alone, so videos
    have ``1 + k·temporal_factor`` frames. ``decoder_history`` is how many latent frames before a latent frame its
    decoded frames depend on, None where nobody has said. The other attributes are as in ``Autoencoder``.
    """

    spatial_factor: int
    temporal_factor: int
    latent_channels: int
    image_channels: int
    decoder_history: int | None

    def encode(self, videos: Float[Array, "B F H W P"]) -> Float[Array, "B T h w C"]:
        """Videos in [-1, 1] to latents."""
        ...

    def decode(self, latents: Float[Array, "B T h w C"]) -> Float[Array, "B F H W P"]:
        """Latents to videos, clamped to [-1, 1]."""
        ...

    def decode_frames(
        self, latents: Float[Array, "B T h w C"], state: PyTree | None = None
    ) -> tuple[Float[Array, "B F H W P"], PyTree]:
        """The next latent frames of a video to their frames; ``state`` is what the ones before gave, None to begin."""
        ...

    def training_params(self) -> PyTree:
        """The parameters that ``last_frame_encoded`` takes."""
        ...

    def last_frame_encoded(self, params: PyTree, latents: Float[Array, "B T h w C"]) -> Float[Array, "B 1 h w C"]:
        """The last frame of a video, encoded as a picture: a pure function, for training on growing videos."""
        ...

    def to_config(self) -> dict[str, Any]:
        """What ``vae/config.json`` holds, ``_class_name`` included."""
        ...


def latent_frames(frames: int, temporal_factor: int) -> int:
    """The latent frames of a video of so many frames: ``1 + (frames - 1) / temporal_factor``.

    Raises:
        UserError: that is not a whole number of 1 or more; the nearest numbers of frames that are allowed are named.
    """
    if frames < 1 or (frames - 1) % temporal_factor:
        below = 1 + (frames - 1) // temporal_factor * temporal_factor
        near = f"{below} or {below + temporal_factor}" if below > 0 else "1"
        raise UserError(
            f"{frames} frames; a video has 1 + {temporal_factor}·k of them (k = 0, 1, ...), the nearest are {near}: "
            "choose one of these"
        )
    return 1 + (frames - 1) // temporal_factor


def pixel_frames(latent_frames: int, temporal_factor: int) -> int:
    """The frames of a video of so many latent frames, the inverse of ``latent_frames``."""
    return 1 + (latent_frames - 1) * temporal_factor


def mean_and_log_variance(
    moments: Float[Array, "B T h w 2*C"],
) -> tuple[Float[Array, "B T h w C"], Float[Array, "B T h w C"]]:
    """The two halves of what the encoder gives; the second clamped to [-30, 20]."""
    mean, log_variance = jnp.split(moments, 2, -1)
    return mean, jnp.clip(log_variance, *LOG_VARIANCES)


def check_video(name: str, x: Array, channels: int, factor: int) -> None:
    """Raises ``UserError`` unless ``x`` is (batch, frames, height, width, channels), sizes multiples of ``factor``."""
    if len(x.shape) != 5 or x.shape[-1] != channels or 0 in x.shape:
        raise UserError(
            f"{name} of shape {tuple(x.shape)}; allowed is (batch, frames, height, width, {channels}), none of them 0: "
            "bring them to that form"
        )
    height, width = x.shape[2:4]
    if height % factor or width % factor:
        raise UserError(
            f"{name} of {height}x{width}; height and width must be multiples of {factor}: resize or crop them"
        )


def check_frames(frames: int, temporal_factor: int, begins: bool) -> None:
    """Raises ``UserError`` for a number of frames that is not allowed where a video begins, or where it goes on."""
    if begins:
        latent_frames(frames, temporal_factor)
    elif frames % temporal_factor:
        below = frames // temporal_factor * temporal_factor
        near = f"{below} or {below + temporal_factor}" if below else f"{temporal_factor}"
        raise UserError(
            f"{frames} frames that follow others; allowed are multiples of {temporal_factor}, the nearest are {near}: "
            "choose one of these"
        )
