"""What a pipeline and a trainer ask of an autoencoder."""

from __future__ import annotations

from typing import Any, Protocol

from kernels.typing import Array, Float


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
