"""Chunk-causal pre-training: flow matching with a noise level for each block, in a network whose blocks are causal."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax.numpy as jnp

from configs.longsana import ChunkCausalConfig
from kernels.typing import Array, Bool, Float, Int, PyTree
from sana_jax.diffusion.chunk_timesteps import ChunkTimesteps, sample_timesteps
from sana_jax.diffusion.samplers.longsana import causal_block_starts
from train.batch import Batch
from train.objectives.base import SampleLosses
from train.objectives.flow_matching import Draws, FlowMatching
from train.randomness import stream


@dataclass(frozen=True)
class ChunkCausal(FlowMatching):
    """``FlowMatching`` with an index for each latent frame, the same within a block and rising from block to block.

    The recipe's network gets the timesteps as (B, T) and must run with ``block_starts`` of the clip's frames.

    With ``image_to_video`` the first frame of every clip is given: it has an index of its own, which is 0 or small, and
    it is out of the loss, as in NVlabs/Sana, train_video_scripts/train_video_ivjoint_chunk.py. A picture, a clip of one
    frame, has none given.

    Attributes:
        chunks: blocks and how their levels are drawn.
    """

    chunks: ChunkCausalConfig = field(default_factory=ChunkCausalConfig)

    def block_starts(self, num_frames: int) -> tuple[int, ...]:
        """First latent frame of every block of a clip."""
        return causal_block_starts(num_frames, self.chunks.block_frames)

    def gives_first(self, num_frames: int) -> bool:
        """Whether the first frame of clips of this length is given."""
        return self.chunks.image_to_video and num_frames > 1

    def timesteps(self, num_frames: int) -> ChunkTimesteps:
        """How the indices of a clip's frames are drawn."""
        c, given = self.chunks, self.gives_first(num_frames)
        return ChunkTimesteps(
            num_frames,
            self.block_starts(num_frames),
            c.strategy,
            self.density,
            same_timestep_prob=c.same_timestep_prob,
            image_to_video=given,
            noise_multiplier=c.noise_multiplier if given else 0.0,
        )

    def draw(self, seed: int, step: int | Int[Array, ""], batch: Batch) -> Draws:
        """What is random at one step, for a whole batch; ``index`` is (B, T)."""
        rows, frames = batch.latents.shape[:2]
        index = sample_timesteps(stream(seed, step, "timestep"), rows, self.timesteps(frames))
        given = jnp.ones(rows, bool) if self.gives_first(frames) else None
        return super().draw(seed, step, batch)._replace(index=index, first_given=given)

    def levels_of_given(self, levels: Float[Array, "B *T"], given: Bool[Array, "B T"]) -> Float[Array, "B T"]:
        """As drawn: a given frame's index says how clean it is."""
        return levels

    def losses(self, trained: PyTree, frozen: PyTree | None, batch: Batch, draws: Draws) -> SampleLosses:
        """Each sample's loss, and the mean of its frames' noise levels."""
        losses = super().losses(trained, frozen, batch, draws)
        return losses._replace(sigma=losses.sigma.mean(axis=1))
