"""The networks of LongSANA's and SANA-WM's distillation as functions of their parameters, and what they are told.

They are passed to the losses as functions, so that these know nothing of the network's class, of adapters, or of where
the parameters lie.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax.numpy as jnp

from kernels.typing import Array, Bool, Float, Int, PyTree
from sana_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS, x0_from_velocity
from sana_jax.diffusion.samplers.longsana import nearest_sigma
from sana_jax.errors import UserError
from sana_jax.models.sana_video import SanaVideoState, SanaVideoTransformer, init_state
from sana_jax.models.sana_wm import SanaWMState, SanaWMTransformer
from train.batch import CAMERA, FRAME_VALID, PLUCKER, Batch
from train.objectives.longsana import world

State = SanaVideoState | SanaWMState
Transformer = SanaVideoTransformer | SanaWMTransformer


class Captions(NamedTuple):
    """Encoded prompts and their masks."""

    embeds: Float[Array, "B L Ctext"]
    mask: Int[Array, "B L"]

    @property
    def given(self) -> None:
        """No frame of the video is given."""
        return None

    def for_rows(self, rows: int) -> Captions:
        """The captions, those of one prompt repeated for every row."""
        return Captions(*(jnp.broadcast_to(array, (rows, *array.shape[1:])) for array in self))


Told = Captions | world.WorldCaptions


def captions_of(batch: Batch) -> Told:
    """What networks are told of a batch: the prompts and, where there is a camera, its path and the first frame.

    Raises:
        UserError: clips of different lengths in one batch, with frames that are not to be counted.
    """
    prompts = Captions(batch.prompt_embeds, batch.prompt_attention_mask)
    if CAMERA not in batch.conditions:
        return prompts
    if FRAME_VALID in batch.conditions:
        raise UserError(
            "distillation takes clips of one length, and this data has clips that are filled up with frames which are "
            "not counted; leave the short ones out"
        )
    plucker = batch.conditions.get(PLUCKER)
    return world.WorldCaptions(*prompts, batch.conditions[CAMERA], plucker, batch.latents[:, :1])


def made_frames(told: Told, frames: int, first_frame: int | Int[Array, ""] = 0) -> Bool[Array, " T"] | None:
    """Which frames, from ``first_frame`` of the video on, are to be made; None where none is given."""
    return None if told.given is None else first_frame + jnp.arange(frames) >= told.given.shape[1]


class ScoreNetwork(Protocol):
    """Whole videos to their velocity."""

    def __call__(
        self,
        params: PyTree,
        noisy: Float[Array, "B T H W C"],
        timestep: Float[Array, " B"] | Float[Array, "B T"],
        captions: Told,
    ) -> Float[Array, "B T H W C"]:
        """The velocity."""
        ...


class BlockNetwork(Protocol):
    """One block to its velocity, and the state after it."""

    def __call__(
        self,
        params: PyTree,
        noisy: Float[Array, "B T H W C"],
        timestep: Float[Array, " B"] | Float[Array, "B T"],
        captions: Told,
        state: State,
        first_frame: int | Int[Array, ""],
    ) -> tuple[Float[Array, "B T H W C"], State]:
        """The velocity and the state."""
        ...


def whole_timestep(timestep: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """What the network is told of a time: cut to a whole number, as the published networks do before they embed it."""
    return jnp.floor(timestep)


def sigma_at(timestep: Float[Array, "*S"], flow_shift: float | None) -> Float[Array, "*S"]:
    """The noise level of a time, float32: from the table of a flow shift, or timestep/1000 for None."""
    if flow_shift is None:
        return jnp.asarray(timestep, jnp.float32) / NUM_TRAIN_TIMESTEPS
    return nearest_sigma(timestep, flow_shift)


def score_network(transformer: Transformer, block_starts: tuple[int, ...] | None = None) -> ScoreNetwork:
    """The transformer on whole videos: bidirectional, or with ``block_starts`` in causal blocks."""
    if isinstance(transformer, SanaWMTransformer):
        return world.score_network(transformer, block_starts)

    def velocity(params, noisy, timestep, captions):
        inputs = (noisy, captions.embeds, whole_timestep(timestep), captions.mask)
        return transformer.apply({"params": params}, *inputs, block_starts=block_starts)

    return velocity


def block_network(transformer: Transformer) -> BlockNetwork:
    """The transformer on one block of a longer video."""
    if isinstance(transformer, SanaWMTransformer):
        return world.block_network(transformer)

    def velocity(params, noisy, timestep, captions, state, first_frame):
        inputs = (noisy, captions.embeds, whole_timestep(timestep), captions.mask)
        return transformer.apply({"params": params}, *inputs, state=state, first_frame=first_frame)

    return velocity


def predicted_x0(
    network: ScoreNetwork,
    params: PyTree,
    noisy: Float[Array, "B T H W C"],
    timestep: Float[Array, " B"] | Float[Array, "B T"],
    captions: Told,
    flow_shift: float | None,
) -> Float[Array, "B T H W C"]:
    """x0 = x − σ·velocity in float32, σ as ``sigma_at`` with the network's own flow shift."""
    velocity = network(params, noisy, timestep, captions)
    return x0_from_velocity(noisy, velocity, sigma_at(timestep, flow_shift))


def empty_state(
    transformer: Transformer,
    latents_shape: tuple[int, ...],
    block_starts: tuple[int, ...],
    num_cached_blocks: int | None = None,
    sink: bool = False,
) -> State:
    """The state before the first block of videos of this shape, (B, T, H, W, C), cut at ``block_starts``."""
    rows, frames, height, width, _ = latents_shape
    _, patch_height, patch_width = transformer.config.patch_size
    grid = (height // patch_height, width // patch_width)
    if isinstance(transformer, SanaWMTransformer):
        return world.empty_state(transformer, rows, frames, grid, block_starts, num_cached_blocks, sink)
    return init_state(transformer.config, rows, grid, num_cached_blocks, dtype=transformer.dtype)
