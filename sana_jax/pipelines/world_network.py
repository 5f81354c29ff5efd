"""SANA-WM's transformer, as samplers see it: clean first frames stand before the latents, beside them the camera."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.typing import Array, Float, Int, PyTree
from sana_jax.diffusion.samplers.world_model import BlockVelocity
from sana_jax.diffusion.step_caching import Decision, StepCache
from sana_jax.models.sana_wm import SanaWMTransformer
from sana_jax.pipelines.base_model_file import BaseModelFile
from sana_jax.pipelines.sampling_function import Encoded, transformer_variables, velocity_behind


class WorldGiven(NamedTuple):
    """What a world is made from besides its prompt.

    Attributes:
        frames: clean latent frames that the videos begin with.
        camera_conditions: of all latent frames, see ``sana_jax.camera.CameraInputs``.
        chunk_plucker: the same; None for networks that take no Plücker coordinates.
    """

    frames: Float[Array, "b G H W C"]
    camera_conditions: Float[Array, "b T 20"]
    chunk_plucker: Float[Array, "b T H W P"] | None


class WorldNetwork(NamedTuple):
    """A world model. Arguments of ``velocity`` as ``guided_velocity`` gives them.

    Attributes:
        transformer: the network.
        block_starts: first latent frames of causal blocks, the given frames included; None: bidirectional.
    """

    transformer: SanaWMTransformer
    block_starts: tuple[int, ...] | None = None

    def velocity(
        self,
        params: PyTree,
        latents: Float[Array, "B N H W C"],
        timestep: Float[Array, ""],
        conditions: Encoded,
        identity: None = None,
        given: WorldGiven | None = None,
        lora: PyTree | None = None,
        step_cache: StepCache | None = None,
    ) -> Float[Array, "B N H W C"] | tuple[Float[Array, "B N H W C"], StepCache, Decision]:
        """The velocity of the frames behind the given ones, in float32.

        With ``step_cache`` also the next step's, and what was decided.

        The network sees the given frames at timestep 0. ``given`` is for the batch, or for a part of it that is
        repeated, as guidance does. ``identity`` is not for world models.
        """
        batch = latents.shape[0]
        parts = batch // given.frames.shape[0]
        given = jax.tree.map(lambda array: jnp.concatenate([array] * parts), given)
        start = given.frames.shape[1]
        whole = jnp.concatenate([given.frames, latents], axis=1)
        clean = jnp.arange(whole.shape[1]) < start
        timesteps = jnp.broadcast_to(jnp.where(clean, 0.0, timestep), whole.shape[:2])
        output = self.transformer.apply(
            transformer_variables(params, lora),
            whole,
            conditions.embeds,
            timesteps,
            conditions.mask,
            given.camera_conditions,
            given.chunk_plucker,
            block_starts=self.block_starts,
            step_cache=step_cache,
        )
        return velocity_behind(start, output)

    def token_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(B, N, D) of the tokens of latents (B, T, H, W, C), those that are given included."""
        config = self.transformer.config
        return shape[0], math.prod(n // own for n, own in zip(shape[1:4], config.patch_size)), config.hidden_size


def trained_blocks(trained_from: BaseModelFile | None) -> tuple[int, str] | None:
    """Latent frames of a causal block and how videos are cut, of a run that was trained in such blocks; else None."""
    if trained_from is None or trained_from.kind != "world_chunk_causal":
        return None
    chunks = trained_from.settings["chunk_causal"]
    return chunks["block_frames"], chunks["blocks"]


def block_velocity(
    transformer: SanaWMTransformer,
    params: PyTree,
    lora: PyTree | None,
    conditions: Encoded,
    camera_conditions: Float[Array, "B T 20"],
    chunk_plucker: Float[Array, "B T H W P"] | None,
    first_frame: Int[Array, ""],
) -> BlockVelocity:
    """A world model at one causal block: (latents, timestep of every frame, state) -> (velocity in float32, state).

    Args:
        transformer: the network.
        params: its parameters.
        lora: of them, if there is one.
        conditions: the encoded prompt.
        camera_conditions: of the block's frames.
        chunk_plucker: the same; None for networks that take no Plücker coordinates.
        first_frame: the block's place in the video.
    """
    variables = transformer_variables(params, lora)

    def velocity(latents: Array, timestep: Array, state: PyTree) -> tuple[Array, PyTree]:
        inputs = (latents, conditions.embeds, timestep, conditions.mask, camera_conditions, chunk_plucker)
        output, after = transformer.apply(variables, *inputs, state=state, first_frame=first_frame)
        return output.astype(jnp.float32), after

    return velocity
