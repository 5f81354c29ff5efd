"""How PyTorch orders the axes of an array that we order otherwise. Every layout is exact in both directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """Two functions of an array, each the other's inverse; they reorder and give views where NumPy can.

    ``name`` is for messages.
    """

    name: str
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]

    def shape_in_theirs(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """PyTorch's shape of an array that has ``shape`` with us."""
        # one value that stands for all: takes no memory, whatever the shape
        return self.to_theirs(np.broadcast_to(np.bool_(False), shape)).shape


FRAME_TAPS = 3  # of the video networks' convolutions over frames

SAME = Layout("same", lambda theirs: theirs, lambda ours: ours)
# Linear: (out, in) <-> (in, out)
LINEAR = Layout("linear", lambda theirs: theirs.T, lambda ours: ours.T)
# a convolution of 1x1 is a linear layer: (out, in, 1, 1) <-> (in, out)
POINTWISE = Layout("pointwise", lambda theirs: theirs[:, :, 0, 0].T, lambda ours: ours.T[:, :, None, None])
# (C, 1, kh, kw) <-> (kh, kw, C)
DEPTHWISE = Layout("depthwise", lambda t: t[:, 0].transpose(1, 2, 0), lambda o: o.transpose(2, 0, 1)[:, None])
# (out, in, kh, kw) <-> (kh, kw, in, out)
CONV = Layout("conv", lambda theirs: theirs.transpose(2, 3, 1, 0), lambda ours: ours.transpose(3, 2, 0, 1))

# a depthwise convolution over one axis: (C, 1, k) <-> (k, C)
DEPTHWISE_1D = Layout("depthwise 1-D", lambda theirs: theirs[:, 0].T, lambda ours: ours.T[:, None])

# a convolution over frames alone as a product over (frame, channel): (out, in, kt, 1) <-> (kt·in, out)
OVER_FRAMES = Layout(
    "over frames",
    lambda theirs: theirs[:, :, :, 0].transpose(2, 1, 0).reshape(-1, theirs.shape[0]),
    lambda ours: ours.reshape(FRAME_TAPS, -1, ours.shape[-1]).transpose(2, 1, 0)[..., None],
)


def patch(patch_size: int) -> Layout:
    """A p x p convolution of stride p as a product over (row, column, channel): (out, C, p, p) <-> (p·p·C, out)."""

    def to_theirs(ours: np.ndarray) -> np.ndarray:
        return ours.reshape(patch_size, patch_size, -1, ours.shape[-1]).transpose(3, 2, 0, 1)

    return Layout("patch", lambda theirs: theirs.transpose(2, 3, 1, 0).reshape(-1, theirs.shape[0]), to_theirs)


def video_patch(patch_size: tuple[int, int, int]) -> Layout:
    """``patch`` in frames, rows and columns: (out, C, pt, ph, pw) <-> (pt·ph·pw·C, out)."""

    def to_theirs(ours: np.ndarray) -> np.ndarray:
        return ours.reshape(*patch_size, -1, ours.shape[-1]).transpose(4, 3, 0, 1, 2)

    def to_ours(theirs: np.ndarray) -> np.ndarray:
        return theirs.transpose(2, 3, 4, 1, 0).reshape(-1, theirs.shape[0])

    return Layout("video patch", to_ours, to_theirs)


def grouped_pointwise(groups: int) -> Layout:
    """A 1x1 convolution in groups as one product for each: (groups·out, in, 1, 1) <-> (groups, in, out)."""

    def to_ours(theirs: np.ndarray) -> np.ndarray:
        return theirs[:, :, 0, 0].reshape(groups, -1, theirs.shape[1]).swapaxes(1, 2)

    def to_theirs(ours: np.ndarray) -> np.ndarray:
        return ours.swapaxes(1, 2).reshape(-1, ours.shape[1])[:, :, None, None]

    return Layout("grouped pointwise", to_ours, to_theirs)
