"""Chunk-causal pre-training: flow matching with a noise level for each block, in a network whose blocks are causal."""

from __future__ import annotations

from dataclasses import dataclass, field

from configs.longsana import ChunkCausalConfig
from kernels.typing import Array, Int, PyTree
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

    Attributes:
        chunks: blocks and how their levels are drawn.
    """

    chunks: ChunkCausalConfig = field(default_factory=ChunkCausalConfig)

    def block_starts(self, num_frames: int) -> tuple[int, ...]:
        """First latent frame of every block of a clip."""
        return causal_block_starts(num_frames, self.chunks.block_frames)

    def timesteps(self, num_frames: int) -> ChunkTimesteps:
        """How the indices of a clip's frames are drawn."""
        c = self.chunks
        return ChunkTimesteps(
            num_frames,
            self.block_starts(num_frames),
            c.strategy,
            self.density,
            same_timestep_prob=c.same_timestep_prob,
            image_to_video=c.image_to_video,
            noise_multiplier=c.noise_multiplier,
        )

    def draw(self, seed: int, step: int | Int[Array, ""], batch: Batch) -> Draws:
        """What is random at one step, for a whole batch; ``index`` is (B, T)."""
        rows, frames = batch.latents.shape[:2]
        index = sample_timesteps(stream(seed, step, "timestep"), rows, self.timesteps(frames))
        return super().draw(seed, step, batch)._replace(index=index)

    def losses(self, trained: PyTree, frozen: PyTree | None, batch: Batch, draws: Draws) -> SampleLosses:
        """Each sample's loss, and the mean of its frames' noise levels."""
        losses = super().losses(trained, frozen, batch, draws)
        return losses._replace(sigma=losses.sigma.mean(axis=1))
