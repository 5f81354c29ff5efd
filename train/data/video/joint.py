"""Clips and pictures in one run: every so many steps a batch of pictures, as clips of one frame.

As SANA-Video is trained (arXiv 2509.24695): pictures are many and good, and keep a video model's frames so.
"""

from __future__ import annotations

import numpy as np

from kernels.typing import Float, Int
from sana_jax.errors import UserError
from train.batch import Batch
from train.data.cached import CachedData, Shape
from train.data.loader import BatchOrder, Plan
from train.data.pinned import DATA, PICTURES

_OF_PICTURES = 1 << 32  # added to the seed, which is below it: the pictures' order is one of its own


class JointOrder:
    """Which samples the n-th batch has: the last of every ``interval`` batches has pictures, the others clips.

    Clips and pictures each come in the order that they would have without the other.
    """

    def __init__(self, clips: BatchOrder, pictures: BatchOrder, first_picture: int, interval: int):
        self._clips, self._pictures, self._first, self._interval = clips, pictures, first_picture, interval

    def plan(self, number: int) -> Plan:
        """The batch of this number, from 0."""
        turn, place = divmod(number, self._interval)
        if place < self._interval - 1:
            return self._clips.plan(turn * (self._interval - 1) + place)
        plan = self._pictures.plan(turn)
        return Plan(plan.indices + self._first, plan.choices)


class JointData:
    """Two data sets as one. Everything but the samples is that of the clips.

    Args:
        clips: latents (T, H, W, C), T above 1.
        pictures: latents (1, H, W, C).
        interval: steps from one batch of pictures to the next, 2 or more.
        pictures_at_once: of a batch of pictures; None for as many as a batch has clips.

    Raises:
        UserError: another interval, or latents that are not of these shapes.
    """

    def __init__(self, clips: CachedData, pictures: CachedData, interval: int, pictures_at_once: int | None = None):
        if interval < 2:
            raise UserError(f"--data.joint-interval {interval} is not allowed; choose 2 or more")
        odd = [shape for shape in clips.buckets if len(shape) != 4 or shape[0] < 2]
        odd += [shape for shape in pictures.buckets if len(shape) != 4 or shape[0] != 1]
        channels = {shape[-1] for shape in (*clips.buckets, *pictures.buckets)}
        if odd or len(channels) > 1:
            shapes = ", ".join("x".join(map(str, shape)) for shape in (*clips.buckets, *pictures.buckets))
            raise UserError(
                f"clips and pictures have latents of the shapes {shapes}; clips need two frames or more, pictures one, "
                "and both the same channels: prepare both with one video model"
            )
        self.clips, self.pictures, self.interval = clips, pictures, interval
        self._pictures_at_once = pictures_at_once
        self.buckets: dict[Shape, Int[np.ndarray, " n"]] = dict(clips.buckets)
        self.buckets |= {shape: np.asarray(own) + len(clips) for shape, own in pictures.buckets.items()}

    @property
    def cached(self) -> dict[str, CachedData]:
        """The caches that the data is read from, by the name of a run's list of their samples."""
        return {DATA: self.clips, PICTURES: self.pictures}

    def __len__(self) -> int:
        return len(self.clips) + len(self.pictures)

    def __getattr__(self, name: str):
        # captions, encodings, validation and previews are those of the clips
        return getattr(self.clips, name)

    def batch_rows(self, shape: Shape, batch_size: int) -> int:
        """Samples of a batch of latents of this shape, where one of clips has ``batch_size``."""
        return batch_size if shape in self.clips.buckets else self._pictures_at_once or batch_size

    def order(self, seed: int, batch_size: int) -> JointOrder:
        """Which samples the n-th batch has."""
        clips = BatchOrder(self.clips.buckets, seed, batch_size)
        rows = self._pictures_at_once or batch_size
        pictures = BatchOrder(self.pictures.buckets, seed + _OF_PICTURES, rows)
        return JointOrder(clips, pictures, len(self.clips), self.interval)

    def batch(self, indices: Int[np.ndarray, " B"], choices: Float[np.ndarray, "B 2"] | None = None) -> Batch:
        """As ``CachedData.batch``, of clips alone or of pictures alone.

        Raises:
            ValueError: of both.
        """
        of_pictures = np.asarray(indices) >= len(self.clips)
        if of_pictures.all():
            return self.pictures.batch(np.asarray(indices) - len(self.clips), choices)
        if of_pictures.any():
            raise ValueError("one batch has clips and pictures; take its samples from one bucket")
        return self.clips.batch(indices, choices)

    def describe(self) -> str:
        """One line for the start of a run."""
        rows = "" if self._pictures_at_once is None else f"{self._pictures_at_once} "
        return (
            f"{self.clips.describe()}; one step in {self.interval} has {rows}pictures as clips of one frame: "
            f"{self.pictures.describe()}"
        )
