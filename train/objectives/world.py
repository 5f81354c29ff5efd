"""Flow matching of a world model in causal blocks, each at a noise level of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from configs.world import WorldChunksConfig
from kernels.typing import Array, Int, PyTree
from sana_jax.diffusion.chunk_timesteps import ChunkTimesteps, sample_timesteps
from sana_jax.diffusion.samplers.world_model import chunk_starts
from train.batch import Batch
from train.objectives.base import SampleLosses
from train.objectives.flow_matching import Draws, FlowMatching
from train.randomness import stream


@dataclass(frozen=True)
class WorldChunkCausal(FlowMatching):
    """``FlowMatching`` with an index for each latent frame, the same within a block.

    Which clips have their first frame given is drawn beside it, as ``FlowMatching`` does: that frame alone is clean
    then, whatever the level of its block.

    Attributes:
        chunks: blocks, and how their levels go together.
    """

    chunks: WorldChunksConfig = field(default_factory=WorldChunksConfig)

    def timesteps(self, num_frames: int) -> ChunkTimesteps:
        """How the indices of a clip's frames are drawn."""
        return ChunkTimesteps(
            num_frames,
            block_starts(num_frames, self.chunks),
            "mixture",
            self.density,
            sequence=self.chunks.sequence,
            mixture=self.chunks.mixture,
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


def block_starts(num_frames: int, chunks: WorldChunksConfig) -> tuple[int, ...]:
    """First latent frame of every block of a clip."""
    return chunk_starts(num_frames, chunks.block_frames, chunks.blocks)
