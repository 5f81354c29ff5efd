"""The networks of LongSANA's training as functions of their parameters, and how they are told the time.

They are passed to the losses as functions, so that these know nothing of the network's class, of adapters, or of where
the parameters lie.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax.numpy as jnp

from kernels.typing import Array, Float, Int, PyTree
from sana_jax.diffusion.flow import x0_from_velocity
from sana_jax.diffusion.samplers.longsana import nearest_sigma
from sana_jax.models.sana_video import SanaVideoState, SanaVideoTransformer, init_state


class Captions(NamedTuple):
    """Encoded prompts and their masks."""

    embeds: Float[Array, "B L Ctext"]
    mask: Int[Array, "B L"]

    def for_rows(self, rows: int) -> Captions:
        """The captions, those of one prompt repeated for every row."""
        return Captions(*(jnp.broadcast_to(array, (rows, *array.shape[1:])) for array in self))


class ScoreNetwork(Protocol):
    """Whole videos to their velocity."""

    def __call__(
        self,
        params: PyTree,
        noisy: Float[Array, "B T H W C"],
        timestep: Float[Array, " B"] | Float[Array, "B T"],
        captions: Captions,
    ) -> Float[Array, "B T H W C"]:
        """The velocity."""
        ...


class BlockNetwork(Protocol):
    """One block to its velocity, and the state after it."""

    def __call__(
        self,
        params: PyTree,
        noisy: Float[Array, "B T H W C"],
        timestep: Float[Array, " B"],
        captions: Captions,
        state: SanaVideoState,
        first_frame: int | Int[Array, ""],
    ) -> tuple[Float[Array, "B T H W C"], SanaVideoState]:
        """The velocity and the state."""
        ...


def whole_timestep(timestep: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """What the network is told of a time: cut to a whole number, as the published networks do before they embed it."""
    return jnp.floor(timestep)


def score_network(transformer: SanaVideoTransformer, block_starts: tuple[int, ...] | None = None) -> ScoreNetwork:
    """The transformer on whole videos: bidirectional, or with ``block_starts`` in causal blocks."""

    def velocity(params, noisy, timestep, captions):
        inputs = (noisy, captions.embeds, whole_timestep(timestep), captions.mask)
        return transformer.apply({"params": params}, *inputs, block_starts=block_starts)

    return velocity


def block_network(transformer: SanaVideoTransformer) -> BlockNetwork:
    """The transformer on one block of a longer video."""

    def velocity(params, noisy, timestep, captions, state, first_frame):
        inputs = (noisy, captions.embeds, whole_timestep(timestep), captions.mask)
        return transformer.apply({"params": params}, *inputs, state=state, first_frame=first_frame)

    return velocity


def predicted_x0(
    network: ScoreNetwork,
    params: PyTree,
    noisy: Float[Array, "B T H W C"],
    timestep: Float[Array, " B"] | Float[Array, "B T"],
    captions: Captions,
    flow_shift: float,
) -> Float[Array, "B T H W C"]:
    """x0 = x − σ·velocity in float32, σ from the table of the network's own flow shift."""
    velocity = network(params, noisy, timestep, captions)
    return x0_from_velocity(noisy, velocity, nearest_sigma(timestep, flow_shift))


def empty_state(
    transformer: SanaVideoTransformer, latents_shape: tuple[int, ...], num_cached_blocks: int | None = None
) -> SanaVideoState:
    """The state before the first block of videos of this shape, (B, T, H, W, C)."""
    rows, _, height, width, _ = latents_shape
    _, patch_height, patch_width = transformer.config.patch_size
    grid = (height // patch_height, width // patch_width)
    return init_state(transformer.config, rows, grid, num_cached_blocks, dtype=transformer.dtype)
