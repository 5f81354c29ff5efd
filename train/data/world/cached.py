"""Clips with a camera from a cache: ``CachedData`` whose batches have what the network is told of the camera."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from kernels.typing import Float, Int
from train.batch import Batch
from train.data.cached import CachedData, Shape
from train.data.world.cameras import CameraShape
from train.data.world.paths import INTRINSICS, POSES


class CachedWorlds:
    """The clips of a cache that has poses and intrinsics; any number of threads may ask for batches at once.

    Args:
        clips: the cache.
        camera: what the network is told.
    """

    def __init__(self, clips: CachedData, camera: CameraShape):
        self.clips, self.camera = clips, camera

    @cached_property
    def validation(self) -> CachedWorlds | None:
        """The clips that are kept from training; None where there are none."""
        held_out = self.clips.validation
        return None if held_out is None else CachedWorlds(held_out, self.camera)

    @property
    def cached(self) -> dict[str, CachedData]:
        """The cache that the data is read from, by the name of a run's list of its samples."""
        return self.clips.cached

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def buckets(self) -> Mapping[Shape, Int[np.ndarray, " n"]]:
        """The samples' indices by the shape (T, H, W, C) of their latents."""
        return self.clips.buckets

    @property
    def preview_shape(self) -> Shape:
        """The commonest of these shapes."""
        return self.clips.preview_shape

    def condition_shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """The shapes of further inputs, without the batch axis, of samples with latents of this shape."""
        return self.camera.condition_shapes(shape)

    def batch(self, indices: Int[np.ndarray, " B"], choices: Float[np.ndarray, "B 2"] | None = None) -> Batch:
        """As ``CachedData.batch``, with the camera's conditions."""
        batch = self.clips.batch(indices, choices)
        path = batch.conditions
        conditions = self.camera.conditions(path[POSES], path[INTRINSICS], batch.latents.shape[1:])
        return batch._replace(conditions=conditions)

    def poses(self, index: int) -> tuple[Float[np.ndarray, "F 4 4"], Float[np.ndarray, "F 4"]]:
        """Poses and intrinsics of a sample's pixel frames."""
        path = self.clips.batch(np.asarray([index])).conditions
        return path[POSES][0], path[INTRINSICS][0]

    @property
    def captions(self) -> list[str]:
        """The distinct captions, the most frequent first."""
        return self.clips.captions

    def caption_of(self, index: int) -> str:
        """A sample's first caption."""
        return self.clips.caption_of(index)

    def encode(self, captions: Sequence[str]) -> tuple[Float[np.ndarray, "B L C"], Int[np.ndarray, "B L"]]:
        """Embeddings and masks of texts that the cache has."""
        return self.clips.encode(captions)

    def null_encoding(self) -> tuple[Float[np.ndarray, "1 L C"], Int[np.ndarray, "1 L"]]:
        """The encoding of no text."""
        return self.clips.null_encoding()

    def describe(self) -> str:
        """One line for the start of a run."""
        return f"{self.clips.describe()}, each with the camera's path"
