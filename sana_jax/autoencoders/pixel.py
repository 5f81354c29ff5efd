"""Autoencoders that do nothing: latents are the pixels. For pictures and videos small enough to model directly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from kernels.typing import Array, Float
from sana_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PixelAutoencoder:
    """Latents are the picture's own pixels times ``scaling_factor``.

    Args:
        channels: 1 for gray pictures, 3 for colour.
        scaling_factor: brings pixels to about unit variance.

    Raises:
        UserError: other channels, or a scaling factor that is not positive.
    """

    channels: int
    scaling_factor: float = 1.0

    spatial_factor: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise UserError(f"channels {self.channels} is not allowed; choose 1 (gray) or 3 (colour)")
        if not 0 < self.scaling_factor < float("inf"):
            raise UserError(f"scaling_factor {self.scaling_factor} is not allowed; choose a positive number, such as 1")

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.channels

    @property
    def image_channels(self) -> int:
        """Channels of the pictures."""
        return self.channels

    def encode(self, images: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Pictures in [-1, 1], channels-last, to latents of the same shape."""
        self._check(images, "images")
        return images * self.scaling_factor

    def decode(self, latents: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Latents to pictures around [-1, 1], channels-last, not clamped."""
        self._check(latents, "latents")
        return latents / self.scaling_factor

    def to_config(self) -> dict[str, Any]:
        """What ``vae/config.json`` holds."""
        return {"_class_name": type(self).__name__, **dataclasses.asdict(self)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The inverse of ``to_config``.

        Raises:
            UserError: a missing or unknown field.
        """
        given = {name: value for name, value in config.items() if name != "_class_name"}
        if "channels" not in given or set(given) - {"channels", "scaling_factor"}:
            raise UserError(
                f"{cls.__name__} configuration has {sorted(given)}; allowed are channels (required) and "
                "scaling_factor: mend its config.json"
            )
        return cls(**given)

    def _check(self, array: Any, name: str) -> None:
        if array.shape[-1] != self.channels:
            raise UserError(
                f"{name} of shape {tuple(array.shape)}; the last axis must be the {self.channels} channels: "
                "bring them to channels-last"
            )


class PixelVideoAutoencoder(PixelAutoencoder):
    """The same for videos: every latent frame is a frame. Arguments and errors as in ``PixelAutoencoder``."""

    temporal_factor: ClassVar[int] = 1
    decoder_history: ClassVar[int] = 0

    def encode(self, videos: Float[Array, "B F H W C"]) -> Float[Array, "B F H W C"]:
        """Videos in [-1, 1], channels-last, to latents of the same shape."""
        return super().encode(self._video(videos, "videos"))

    def decode(self, latents: Float[Array, "B F H W C"]) -> Float[Array, "B F H W C"]:
        """Latents to videos, channels-last, clamped to [-1, 1]."""
        return super().decode(self._video(latents, "latents")).clip(-1, 1)

    def decode_frames(
        self, latents: Float[Array, "B F H W C"], state: tuple[()] | None = None
    ) -> tuple[Float[Array, "B F H W C"], tuple[()]]:
        """The next latents of a video to its next frames; there is nothing to remember of those before."""
        del state
        return self.decode(latents), ()

    def training_params(self) -> tuple[()]:
        """None: there is nothing to learn."""
        return ()

    def last_frame_encoded(self, params: tuple[()], latents: Float[Array, "B F H W C"]) -> Float[Array, "B 1 H W C"]:
        """The last frame, which is its own picture."""
        return latents[:, -1:]

    def _video(self, array: Any, name: str) -> Any:
        if len(array.shape) != 5:
            raise UserError(
                f"{name} of shape {tuple(array.shape)}; allowed is (batch, frames, height, width, {self.channels}): "
                "bring them to that form"
            )
        return array
