"""3-D rotary positions of video tokens: which angle each channel pair of a head is turned by, for frame, row, column.

A head of size d gives ``2·(d // 6)`` channels to the row, as many to the column, and the rest to the frame, in the
order frame, row, column (112: 40, 36, 36). Pair i of an axis with D channels turns by ``position · θ^(-2i/D)``.
Source: RoFormer (arXiv 2104.09864), in the split of Wan (arXiv 2503.20314), as SANA-Video (arXiv 2509.24695) has it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int
from sana_jax.errors import UserError

THETA = 10_000.0


class Rotation(NamedTuple):
    """Cosine and sine of every token's angles, one column per channel pair, float32."""

    cos: Float[Array, "N p"]
    sin: Float[Array, "N p"]


def axis_channels(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head for (frame, row, column)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def check_positions(first_frame: int, grid: tuple[int, int, int], max_positions: int) -> None:
    """Raises ``UserError`` where a token would lie beyond the table of rotary positions.

    Args:
        first_frame: position of the first latent frame.
        grid: (frames, rows, columns) of tokens.
        max_positions: positions per axis that the model has (``rope_max_seq_len``).
    """
    frames, rows, columns = grid
    if first_frame < 0:
        raise UserError(f"first_frame={first_frame} is not allowed; positions start at 0")
    for axis, needed in (("frames", first_frame + frames), ("rows", rows), ("columns", columns)):
        if needed > max_positions:
            raise UserError(
                f"{needed} {axis} of tokens exceed the {max_positions} rotary positions that the model has "
                f"(rope_max_seq_len); make the video at most {max_positions} {axis} of tokens long"
            )


def rope_3d(
    grid: tuple[int, int, int],
    head_dim: int,
    *,
    first_frame: int | Int[Array, ""] = 0,
    max_positions: int = 1024,
) -> Rotation:
    """The rotation of a grid of tokens, row-major in (frame, row, column).

    Args:
        grid: (frames, rows, columns) of tokens.
        head_dim: size of a head, even.
        first_frame: position of the first frame. It may be traced; then positions beyond the table cannot be refused
            here, and give NaN instead of the angles of other positions: call ``check_positions`` beforehand.
        max_positions: positions per axis.

    Raises:
        UserError: more positions than the model has.
    """
    frames, rows, columns = grid
    known = isinstance(first_frame, (int, np.integer))
    check_positions(int(first_frame) if known else 0, grid, max_positions)
    tables = [_axis_table(channels, max_positions) for channels in axis_channels(head_dim)]
    pairs = [table[0].shape[-1] for table in tables]

    def whole(part: int) -> Float[Array, "N p"]:
        frame, row, column = (table[part] for table in tables)
        if known:
            frame = jnp.asarray(frame[first_frame : first_frame + frames])
        else:
            positions = first_frame + jnp.arange(frames)
            positions = jnp.where(positions < 0, max_positions, positions)  # negative ones would count from the end
            frame = jnp.take(jnp.asarray(frame), positions, axis=0, mode="fill", fill_value=jnp.nan)
        parts = (frame[:, None, None], row[None, :rows, None], column[None, None, :columns])
        spread = [jnp.broadcast_to(part, (*grid, size)) for part, size in zip(parts, pairs)]
        return jnp.concatenate(spread, axis=-1).reshape(frames * rows * columns, sum(pairs))

    return Rotation(whole(0), whole(1))


@functools.cache
def _axis_table(channels: int, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine (positions, channels/2), computed in float64 and rounded once to float32."""
    frequencies = 1.0 / THETA ** (np.arange(0, channels, 2, dtype=np.float64) / channels)
    angles = np.outer(np.arange(positions, dtype=np.float64), frequencies)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
