"""SANA-WM's networks as the objectives call them: beside the prompt they are told the camera's path.

The first latent frame is given: it is clean, its time is 0, nothing changes it and no loss falls on it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int, PyTree
from sana_jax.models.context_parallel import split_where_possible
from sana_jax.models.sana_wm import SanaWMState, SanaWMTransformer, init_state
from sana_jax.models.sana_wm_state import cache_frames


class WorldCaptions(NamedTuple):
    """Encoded prompts and their masks, the camera's path and the first frame, of whole videos."""

    embeds: Float[Array, "B L Ctext"]
    mask: Int[Array, "B L"]
    camera_conditions: Float[Array, "B T 20"]
    chunk_plucker: Float[Array, "B T H W P"] | None
    """None for networks that take no Plücker coordinates."""
    given: Float[Array, "B 1 H W C"]


def score_network(transformer: SanaWMTransformer, block_starts: tuple[int, ...] | None):
    """A ``ScoreNetwork``: bidirectional, or with ``block_starts`` in causal blocks.

    Frames are split over the context axis of the mesh, where it has one; those of ``block_network`` are not.
    """

    def velocity(
        params: PyTree,
        noisy: Float[Array, "B T H W C"],
        timestep: Float[Array, " B"] | Float[Array, "B T"],
        captions: WorldCaptions,
    ) -> Float[Array, "B T H W C"]:
        inputs = (noisy, captions.embeds, _of_frames(timestep, noisy), captions.mask)
        camera = (captions.camera_conditions, captions.chunk_plucker)
        network = split_where_possible(transformer)
        return network.apply({"params": params}, *inputs, *camera, block_starts=block_starts)

    return velocity


def block_network(transformer: SanaWMTransformer):
    """A ``BlockNetwork``; of the camera's path it takes the block's part."""

    def velocity(
        params: PyTree,
        noisy: Float[Array, "B T H W C"],
        timestep: Float[Array, " B"] | Float[Array, "B T"],
        captions: WorldCaptions,
        state: SanaWMState,
        first_frame: int | Int[Array, ""],
    ) -> tuple[Float[Array, "B T H W C"], SanaWMState]:
        def own(array):
            return jax.lax.dynamic_slice_in_dim(array, first_frame, noisy.shape[1], axis=1)

        camera = jax.tree.map(own, (captions.camera_conditions, captions.chunk_plucker))
        inputs = (noisy, captions.embeds, _of_frames(timestep, noisy), captions.mask)
        return transformer.apply({"params": params}, *inputs, *camera, state=state, first_frame=first_frame)

    return velocity


def _of_frames(timestep: Float[Array, " B"] | Float[Array, "B T"], noisy: Float[Array, "B T H W C"]) -> Array:
    """A time for every frame; the network itself cuts it to a whole number."""
    return jnp.broadcast_to(timestep[:, None] if timestep.ndim == 1 else timestep, noisy.shape[:2])


def empty_state(
    transformer: SanaWMTransformer,
    rows: int,
    frames: int,
    grid: tuple[int, int],
    block_starts: tuple[int, ...],
    num_cached_blocks: int | None,
    sink: bool,
) -> SanaWMState:
    """The state before the first block of videos of ``frames`` latent frames, cut at ``block_starts``."""
    room = cache_frames(np.diff((*block_starts, frames)).tolist(), num_cached_blocks, sink)
    softmax_dtype = transformer.dtype if transformer.softmax_dtype is None else transformer.softmax_dtype
    dtypes = {"dtype": transformer.dtype, "softmax_dtype": softmax_dtype}
    return init_state(transformer.config, rows, grid, room, num_cached_blocks, sink, **dtypes)
