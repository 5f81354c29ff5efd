"""Rotary positions of LTX-2: in seconds and in pixels, from -1 to 1 over a base size, at frequencies up to 15,708.

Every axis has ``D // 6`` frequencies ``π/2 · θ^(k/(D//6 - 1))`` for the whole width D of the token stream, not for a
head; frequency-major and axis-minor they are the angles of the D/2 channel pairs, behind pairs that do not turn where
6 does not divide D. Heads therefore turn at different frequencies. Angles reach 15,708 and more, where float32 has but
a few digits behind the point: the tables are made with NumPy on the host, once for each of the three axes, and are
arguments of the network, which spreads them over the tokens.

Sources: RoFormer (arXiv 2104.09864); LTX-2 (arXiv 2601.03233).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float
from sana_jax.errors import UserError

# Which channels of a head are a pair: k and k + d/2, or 2k and 2k + 1.
SPLIT, INTERLEAVED = "split", "interleaved"
ROPE_TYPES = (SPLIT, INTERLEAVED)


class GridRotation(NamedTuple):
    """Cosines (row 0) and sines (row 1) of a grid's frames, rows and columns at F frequencies, float32."""

    frames: Float[Array, "2 T F"]
    rows: Float[Array, "2 H F"]
    columns: Float[Array, "2 W F"]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns."""
        return (self.frames.shape[1], self.rows.shape[1], self.columns.shape[1])


class HeadRotation(NamedTuple):
    """Cosine and sine of every token's and head's channel pairs, float32."""

    cos: Float[Array, "N h p"]
    sin: Float[Array, "N h p"]


def frequencies(count: int, theta: float) -> Float[np.ndarray, " F"]:
    """``π/2 · θ^(k/(count - 1))``: powers in float64, rounded once to float32."""
    exponents = np.linspace(0.0, 1.0, count, dtype=np.float64) if count > 1 else np.zeros(count)
    return (np.power(np.float64(theta), exponents) * np.pi / 2.0).astype(np.float32)


def _cosines_and_sines(positions: np.ndarray, base: float, frequency: np.ndarray) -> np.ndarray:
    """(2, positions, F) of positions given as fractions of ``base``; every step rounded to float32, as in training."""
    fractions = positions.astype(np.float32) / np.float32(base)
    angles = (np.float32(2) * fractions - np.float32(1))[:, None] * frequency
    angles = angles.astype(np.float64)
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def video_rotation(
    grid: tuple[int, int, int],
    features: int,
    *,
    fps: float,
    first_frame: int = 0,
    theta: float = 10_000.0,
    base: Sequence[int] = (20, 2048, 2048),
    scale_factors: Sequence[int] = (8, 32, 32),
    causal_offset: int = 1,
) -> GridRotation:
    """The rotation of a grid of latents, as NumPy arrays.

    A latent's position is the middle of what it stands for: in time, of the seconds of its 8 frames of pixels (the
    first latent: of its single one); in rows and columns, of its 32 pixels.

    Args:
        grid: latent (frames, rows, columns).
        features: width D of the token stream, even.
        fps: frames of pixels per second.
        first_frame: index of the first latent frame in the whole video.
        theta: ratio of the highest frequency to the lowest.
        base: seconds, rows and columns of pixels at which a fraction is 1.
        scale_factors: frames, rows and columns of pixels per latent.
        causal_offset: 1 where the first latent is one frame of pixels, 0 where it is as many as the others.

    Raises:
        UserError: a position before the video, an empty grid, or a frame rate that is not a positive number.
    """
    frames, rows, columns = grid
    if first_frame < 0:
        raise UserError(f"first_frame={first_frame} is not allowed; positions start at 0")
    if min(grid) < 1:
        raise UserError(f"a grid of {grid} latent frames, rows and columns is empty; give 1 or more of each")
    if not (isinstance(fps, (int, float, np.number)) and math.isfinite(fps) and fps > 0):
        raise UserError(f"fps={fps!r} is not allowed; allowed is a number above 0, such as 16")
    frequency = frequencies(features // 6, theta)

    def bounds(count: int, first: int, scale: int) -> tuple[np.ndarray, np.ndarray]:
        start = np.arange(first, first + count, dtype=np.float32)
        return start * np.float32(scale), (start + np.float32(1)) * np.float32(scale)

    def seconds(pixels: np.ndarray) -> np.ndarray:
        return np.maximum(pixels + np.float32(causal_offset - scale_factors[0]), np.float32(0)) / np.float32(fps)

    begin, end = (seconds(bound) for bound in bounds(frames, first_frame, scale_factors[0]))
    middles = [(begin + end) / np.float32(2)]
    for count, scale in ((rows, scale_factors[1]), (columns, scale_factors[2])):
        begin, end = bounds(count, 0, scale)
        middles.append((begin + end) / np.float32(2))
    return GridRotation(*(_cosines_and_sines(middle, size, frequency) for middle, size in zip(middles, base)))


def text_rotation(
    length: int, num_heads: int, head_dim: int, *, base_length: int, theta: float = 10_000.0
) -> HeadRotation:
    """The rotation of ``length`` text tokens in a row, as NumPy arrays; a fraction is 1 at ``base_length``."""
    frequency = frequencies(num_heads * head_dim // 2, theta)
    table = _cosines_and_sines(np.arange(length, dtype=np.float32), base_length, frequency)
    return HeadRotation(*table.reshape(2, length, num_heads, head_dim // 2))


def spread(rotation: GridRotation, num_heads: int, head_dim: int) -> HeadRotation:
    """A grid's rotation for its tokens, row-major in (frame, row, column).

    Raises:
        UserError: the tables were made for another width.
    """
    grid, pairs = rotation.grid, num_heads * head_dim // 2
    count = rotation.frames.shape[-1]
    if count != num_heads * head_dim // 6:
        raise UserError(
            f"the rotation has {count} frequencies, and a width of {num_heads * head_dim} has "
            f"{num_heads * head_dim // 6}: make it for this network's configuration"
        )
    axes = (rotation.frames[:, :, None, None], rotation.rows[:, None, :, None], rotation.columns[:, None, None, :])
    whole = jnp.stack([jnp.broadcast_to(axis, (2, *grid, count)) for axis in axes], axis=-1)
    whole = whole.reshape(2, math.prod(grid), 3 * count)
    unturned = jnp.zeros((2, math.prod(grid), pairs - 3 * count), jnp.float32).at[0].set(1.0)
    whole = jnp.concatenate([unturned, whole], axis=-1).reshape(2, -1, num_heads, head_dim // 2)
    return HeadRotation(whole[0], whole[1])


def rotate_heads(x: Float[Array, "B N h d"], rotation: HeadRotation, rope_type: str) -> Float[Array, "B N h d"]:
    """Turns every channel pair by its angle, in float32, rounded once to ``x``'s dtype.

    Args:
        x: queries or keys.
        rotation: their angles.
        rope_type: one of ``ROPE_TYPES``.
    """
    wide, (cos, sin) = x.astype(jnp.float32), rotation
    if rope_type == SPLIT:
        first, second = jnp.split(wide, 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    else:
        first, second = wide[..., 0::2], wide[..., 1::2]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x.shape)
    return turned.astype(x.dtype)
