"""A depthwise convolution over a few frames, to both sides of time with one set of weights.

Source: SANA-WM, whose causal short convolution (as in Gated Delta Networks, arXiv 2412.06464) runs over a clip and over
its reverse, with the frame itself counted once.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from kernels.split_frames import all_frames, earlier_frames, later_frames, own_part
from kernels.typing import Array, Float


def short_convolution(
    x: Float[Array, "B T S C"],
    kernel: Float[Array, "K C"],
    chunk_starts: Sequence[int] = (0,),
    previous: Float[Array, "B E S C"] | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "B T S C"], Float[Array, "B E S C"]]:
    """``y[t] = w[K-1]·x[t] + Σ_j w[K-1-j]·(x[t-j] + x[t+j])``, j from 1 to K - 1, in float32, rounded once.

    Earlier frames are those of the whole clip and of ``previous``; later ones are those of the frame's own chunk.

    Args:
        x: T frames of S tokens.
        kernel: K taps per channel; the last is the frame's own.
        chunk_starts: the first frame of every chunk, ascending from 0.
        previous: the E = K - 1 frames before, as this function gave them for the frames before; None for zeros.
        axis_name: inside ``jax.shard_map``, the mesh axis over which frames are split (``kernels.split_frames``), and
            with them those before: there is no ``previous``. ``chunk_starts`` are those of all frames.

    Returns:
        The frames, and the last K - 1 frames of ``previous`` and ``x`` together.
    """
    taps, frames = kernel.shape[0], x.shape[1]
    reach = taps - 1
    if previous is None:
        previous = earlier_frames(x, reach, axis_name)
    known = jnp.concatenate([previous.astype(x.dtype), x], axis=1)
    padded = jnp.concatenate([x, later_frames(x, reach, axis_name)], axis=1)
    work = jnp.promote_types(x.dtype, jnp.float32)
    weights = kernel.astype(work)
    end = all_frames(frames, axis_name)
    chunk = np.searchsorted(np.asarray(chunk_starts), np.arange(end + reach), side="right")
    chunk[end:] = -1  # behind the last frame is no frame
    chunk = own_part(chunk, frames, axis_name, beyond=reach)
    total = x.astype(work) * weights[reach]
    for distance in range(1, taps):
        own = (chunk[distance : distance + frames] == chunk[:frames])[:, None, None]
        earlier = known[:, reach - distance : reach - distance + frames].astype(work)
        later = jnp.where(own, padded[:, distance : distance + frames].astype(work), 0)
        total = total + (earlier + later) * weights[reach - distance]
    return total.astype(x.dtype), known[:, frames:]
