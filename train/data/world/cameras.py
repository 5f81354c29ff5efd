"""What a batch's cameras become for the network, on the host."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kernels.typing import Float
from sana_jax.camera import camera_inputs
from sana_jax.models.sana_wm import SanaWMConfig
from train.batch import CAMERA, PLUCKER


class CameraShape(NamedTuple):
    """What a network is told of a camera.

    Attributes:
        temporal_factor: pixel frames per latent frame.
        spatial_factor: pixels per side of a latent pixel.
        plucker: whether it takes Plücker coordinates.
    """

    temporal_factor: int
    spatial_factor: int
    plucker: bool

    @classmethod
    def of(cls, network: SanaWMConfig, autoencoder) -> CameraShape:
        """Of a network and the autoencoder of its latents."""
        return cls(autoencoder.temporal_factor, autoencoder.spatial_factor, network.use_chunk_plucker_post_attn)

    def condition_shapes(self, latents: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of a sample's conditions, of latents (T, H, W, C)."""
        found: dict[str, tuple[int, ...]] = {CAMERA: (latents[0], 20)}
        return found | {PLUCKER: (*latents[:3], 6 * self.temporal_factor)} if self.plucker else found

    def conditions(
        self,
        c2w: Float[np.ndarray, "B F 4 4"],
        intrinsics: Float[np.ndarray, "B F 4"],
        latents: tuple[int, ...],
    ) -> dict[str, np.ndarray]:
        """The conditions of some samples with latents (T, H, W, C).

        Args:
            c2w: of every pixel frame.
            intrinsics: in pixels of the clip.
            latents: shape of a sample's latents.
        """
        height, width = (length * self.spatial_factor for length in latents[1:3])
        made = [
            camera_inputs(
                *each,
                height=height,
                width=width,
                temporal_factor=self.temporal_factor,
                spatial_factor=self.spatial_factor,
            )
            for each in zip(c2w, intrinsics)
        ]
        found = {CAMERA: np.stack([each.conditions for each in made])}
        return found | {PLUCKER: np.stack([each.chunk_plucker for each in made])} if self.plucker else found
