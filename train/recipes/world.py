"""SANA-WM's training in causal blocks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from configs.schema import RunConfig
from configs.world import WorldChunksConfig
from kernels.typing import Array, Float, PyTree
from sana_jax.diffusion.samplers import Sampler
from train.batch import Batch
from train.networks import predicted_velocity
from train.objectives.world import WorldChunkCausal, block_starts
from train.recipes.base import NullEncoding, SamplingFunction
from train.recipes.sampling import world_sampling
from train.recipes.whole import WholeTransformer
from train.step import StepFunction, make_train_step


@dataclass(frozen=True)
class WorldChunkCausalTraining(WholeTransformer):
    """Flow matching in causal blocks, with a noise level for each; ``trained`` is the transformer's parameters.

    Attributes:
        chunks: blocks and their levels.
    """

    chunks: WorldChunksConfig = dataclasses.field(default_factory=WorldChunksConfig)

    kind: ClassVar[str] = "world_chunk_causal"

    def blocks(self, num_frames: int) -> tuple[int, ...]:
        """First latent frames of the blocks."""
        return block_starts(num_frames, self.chunks)

    def settings(self) -> dict[str, Any]:
        """The blocks."""
        return {"chunk_causal": dataclasses.asdict(self.chunks)}

    def notes(self, learning_rate: float | None, base: PyTree | None) -> list[str]:
        """What the blocks are."""
        return [
            f"causal blocks of {self.chunks.block_frames} latent frames ({self.chunks.blocks}), each with a level of "
            "noise of its own: previews are drawn in these blocks"
        ]

    def velocity(
        self, trained: PyTree, frozen: None, noisy: Array, timestep: Array, batch: Batch, draws: PyTree
    ) -> Float[Array, "B T H W C"]:
        """The prediction of the network in causal blocks."""
        starts = self.blocks(noisy.shape[1])
        return predicted_velocity(self.transformer, trained, noisy, timestep, batch, block_starts=starts)

    def step_functions(
        self, config: RunConfig, optimizer: Any, null_encoding: NullEncoding
    ) -> tuple[StepFunction, ...]:
        """One."""
        objective = WorldChunkCausal(self, config.flow, *null_encoding, chunks=self.chunks)
        return (make_train_step(objective, optimizer, config),)

    def sampling_function(self, sampler: Sampler, num_inference_steps: int, guidance_scale: float) -> SamplingFunction:
        """Guided sampling of whole clips, in causal blocks that share their noise level."""
        sample = world_sampling(self.transformer, sampler, num_inference_steps, guidance_scale, self.blocks)
        return lambda trained, frozen, latents, prompts, conditions: sample(trained, latents, prompts, conditions)
