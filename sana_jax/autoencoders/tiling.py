"""Encoding and decoding in overlapping tiles, for pictures whose activations would not fit into memory at once.

A tile is run by itself, blended linearly into its neighbours above and to the left, and copied to the result, which is
assembled on the host. Beside the result and the input only one tile's activations and the overlapping edges of the
tiles before it exist. Only height and width are cut: the last three axes are height, width and channels, and whatever
stands before them (batch, frames) goes through whole.

A network that looks at the whole picture, as DC-AE's attention does, sees only its tile: the result is close to the
untiled one, not equal to it. It is what diffusers' tiling gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from kernels.typing import Array, Float
from sana_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a picture is cut, in picture pixels: (height, width).

    Attributes:
        size: of a tile; the last ones of a row and of a column may be smaller.
        stride: from one tile's edge to the next one's; what is left of ``size`` is blended.
    """

    size: tuple[int, int] = (512, 512)
    stride: tuple[int, int] = (448, 448)

    def __post_init__(self) -> None:
        for size, stride in zip(self.size, self.stride):
            if not 0 < stride <= size:
                raise UserError(f"tiles of {self.size} with stride {self.stride}: allowed is 1 to the tile's size")

    @classmethod
    def for_factor(cls, factor: int) -> Tiles:
        """The default tiles, with a stride of whole latents: 448, or 384 for a factor of 128."""
        size, stride = max(512, factor), max(448 // factor, 1) * factor
        return cls((size, size), (stride, stride))

    def in_latents(self, factor: int) -> Tiles:
        """The same in latents.

        Raises:
            UserError: size or stride is not a multiple of the factor.
        """
        if any(length % factor for length in (*self.size, *self.stride)):
            raise UserError(
                f"tiles of {self.size} with stride {self.stride}; allowed are multiples of the autoencoder's factor "
                f"{factor}: choose such"
            )
        return Tiles(tuple(s // factor for s in self.size), tuple(s // factor for s in self.stride))

    def announcement(self, doing: str, height: int, width: int) -> str:
        """The line that says that a picture of this size is cut, and why."""
        size, stride = ("x".join(map(str, pair)) for pair in (self.size, self.stride))
        cut = f"{height}x{width} pixels in tiles of {size} every {stride}"
        return f"{doing} {cut}, to bound memory; tiling=False does not"

    def cut(self, height: int, width: int) -> bool:
        """Whether a picture of this size is more than one tile."""
        return height > self.size[0] or width > self.size[1]


@dataclasses.dataclass(frozen=True)
class FrameTiles:
    """How a video is cut along time, in frames.

    Attributes:
        size: of a piece, without the frame that a piece begins with.
        stride: from one piece's first frame to the next one's; what is left of ``size`` is blended.
    """

    size: int = 96
    stride: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.size:
            raise UserError(f"pieces of {self.size} frames every {self.stride}: allowed is 1 to the piece's size")

    def in_latents(self, factor: int) -> FrameTiles:
        """The same in latent frames.

        Raises:
            UserError: size or stride is not a multiple of the factor.
        """
        if self.size % factor or self.stride % factor:
            raise UserError(
                f"pieces of {self.size} frames every {self.stride}; allowed are multiples of the autoencoder's factor "
                f"{factor}: choose such"
            )
        return FrameTiles(self.size // factor, self.stride // factor)


def decode_in_time(
    decode: Callable[[Array], Array], latents: Float[Array, "B T h w C"], factor: int, tiles: FrameTiles
) -> np.ndarray:
    """Decodes latent frames piece by piece, each blended into the one before; on the host.

    A piece has one latent frame more than its size, as a video has; of all but the first one the last frame is dropped,
    which the decoder saw without what follows it.

    Args:
        decode: latents (B, t, h, w, C) to frames (B, 1 + (t-1)·factor, H, W, P); called once per piece.
        latents: the whole.
        factor: frames per latent frame.
        tiles: how to cut.
    """
    cut, overlap = tiles.in_latents(factor), tiles.size - tiles.stride
    frames = 1 + (latents.shape[1] - 1) * factor
    canvas = edge = None
    for first in range(0, max(1, latents.shape[1] - 1), cut.stride):
        piece = np.array(decode(latents[:, first : first + cut.size + 1]))
        if edge is None:
            canvas, place = np.empty((piece.shape[0], frames, *piece.shape[2:]), piece.dtype), 0
        else:
            piece, place = piece[:, :-1], 1 + first * factor
            _blend(edge, piece, axis=-4)
        edge = _last(piece, overlap, axis=-4)
        room = canvas[:, place : 1 + first * factor + tiles.stride]
        room[...] = piece[:, : room.shape[1]]
    return canvas


def tiled_decode(
    decode: Callable[[Array], Array],
    latents: Float[Array, "*B h w C"],
    factor: int,
    tiles: Tiles,
    narrowest: int = 1,
) -> np.ndarray:
    """Decodes latents tile by tile.

    Args:
        decode: latents (..., h, w, C) to pictures (..., h·factor, w·factor, P); called once per tile.
        latents: the whole.
        factor: pixels per latent.
        tiles: how to cut.
        narrowest: latents that a tile has at least. What is left of a row or a column, if it is fewer, is taken from
            the tile before, which reaches to the end as well.

    Returns:
        The pictures, on the host, of the dtype that ``decode`` gives.
    """
    height, width = latents.shape[-3] * factor, latents.shape[-2] * factor
    return _assemble(decode, latents, tiles.in_latents(factor), tiles, (height, width), narrowest)


def tile_starts(length: int, size: int, stride: int, narrowest: int = 1) -> list[int]:
    """Where the tiles of a row of ``length`` begin; of those that are too narrow only the ones that nothing covers."""
    starts = list(range(0, length, stride))
    covered = len(starts) > 1 and starts[-2] + size >= length
    return starts[:-1] if covered and length - starts[-1] < narrowest else starts


def tiled_encode(
    encode: Callable[[Array], Array], images: Float[Array, "*B H W P"], factor: int, tiles: Tiles
) -> np.ndarray:
    """Encodes pictures tile by tile; the inverse shapes of ``tiled_decode``.

    A tile at the edge is padded with zeros to a multiple of the factor, and latents that stand for less than ``factor``
    pixels of the picture are dropped.
    """

    def encode_padded(tile: np.ndarray) -> Array:
        missing = [-length % factor for length in tile.shape[-3:-1]]
        return encode(np.pad(tile, [(0, 0)] * (tile.ndim - 3) + [(0, missing[0]), (0, missing[1]), (0, 0)]))

    height, width = images.shape[-3] // factor, images.shape[-2] // factor
    return _assemble(encode_padded, images, tiles, tiles.in_latents(factor), (height, width))


def _assemble(
    run: Callable[[np.ndarray], Array],
    source: Array,
    cut: Tiles,
    placed: Tiles,
    size: tuple[int, int],
    narrowest: int = 1,
) -> np.ndarray:
    """Cuts ``source`` by ``cut``, runs the pieces and places the results by ``placed`` on a canvas of ``size``."""
    source = np.asarray(source)
    overlap = [tile - stride for tile, stride in zip(placed.size, placed.stride)]
    tops = tile_starts(source.shape[-3], cut.size[0], cut.stride[0], narrowest)
    starts = tile_starts(source.shape[-2], cut.size[1], cut.stride[1], narrowest)
    canvas = None
    edges_above: list[np.ndarray] = []
    for i, top in enumerate(tops):
        edges: list[np.ndarray] = []
        edge_left = None
        for j, start in enumerate(starts):
            piece = source[..., top : top + cut.size[0], start : start + cut.size[1], :]
            tile = np.array(run(piece))
            # Neighbours are taken as they are after their own blending, above first.
            if i > 0:
                _blend(edges_above[j], tile, axis=-3)
            if j > 0:
                _blend(edge_left, tile, axis=-2)
            if canvas is None:
                canvas = np.empty((*tile.shape[:-3], *size, tile.shape[-1]), tile.dtype)
            y, x = i * placed.stride[0], j * placed.stride[1]
            bottom = None if top == tops[-1] else y + placed.stride[0]
            right = None if start == starts[-1] else x + placed.stride[1]
            room = canvas[..., y:bottom, x:right, :]
            room[...] = tile[..., : room.shape[-3], : room.shape[-2], :]
            edges.append(_last(tile, overlap[0], axis=-3))
            edge_left = _last(tile, overlap[1], axis=-2)
        edges_above = edges
    return canvas


def _last(tile: np.ndarray, count: int, axis: int) -> np.ndarray:
    """A copy of the last ``count`` rows or columns, or of all if there are fewer."""
    length = tile.shape[axis]
    return np.take(tile, range(max(0, length - count), length), axis)


def _blend(before: np.ndarray, tile: np.ndarray, axis: int) -> None:
    """Fades from the last rows or columns of the tile before into the first of ``tile``, in place."""
    extent = min(before.shape[axis], tile.shape[axis])
    if extent == 0:
        return
    shape = [1] * tile.ndim
    shape[axis] = extent
    weight = (np.arange(extent) / extent).astype(tile.dtype).reshape(shape)
    first = tuple(slice(0, extent) if i == tile.ndim + axis else slice(None) for i in range(tile.ndim))
    tile[first] = _last(before, extent, axis) * (1 - weight) + tile[first] * weight
