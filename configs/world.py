"""Options of SANA-WM's training: causal blocks of latent frames, each at a noise level of its own.

Defaults are those of the published recipe (NVlabs/Sana, configs/sana_wm/stage1). Whether a clip's first latent frame is
given, and how noise levels are bent, is ``VideoFlowConfig``'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from configs.checks import require
from sana_jax.diffusion.chunk_timesteps import ChunkMixture


@dataclass(frozen=True)
class WorldChunksConfig:
    """Flow matching of a world model in causal blocks. How the levels of a clip's blocks go together is drawn for each
    clip from four ways, in proportion to their weights."""

    block_frames: int = 3
    """Latent frames of a block; a rest that is shorter joins the last one."""
    blocks: Literal["first_plus_one", "uniform", "first_frame"] = "first_plus_one"
    """Whether the first block has a frame more, as many as the others, or the first frame alone."""
    same_t: float = 0.1
    """Weight of one level for all blocks."""
    incremental: float = 0.4
    """Weight of levels that rise from block to block through a drawn level of a block drawn at random."""
    last_chunk_anchor: float = 0.4
    """Weight of levels that rise to a drawn level of the last block."""
    teacher_forcing_clean: float = 0.1
    """Weight of the same, where a random number of leading blocks is clean."""
    sequence: Literal["path_counting", "uniform_below"] = "path_counting"
    """How rising levels are drawn: every rising sequence alike likely; or each block uniformly below the next."""

    def __post_init__(self):
        require("chunk-causal.block-frames", self.block_frames, self.block_frames >= 1, "1 or more")
        weights = self.weights
        for name, weight in weights.items():
            require(f"chunk-causal.{name.replace('_', '-')}", weight, weight >= 0, "0 or more")
        require("chunk-causal", "of no weight", sum(weights.values()) > 0, "a weight above 0")

    @property
    def weights(self) -> dict[str, float]:
        """Of the four ways, by name."""
        names = ("same_t", "incremental", "last_chunk_anchor", "teacher_forcing_clean")
        return {name: getattr(self, name) for name in names}

    @property
    def mixture(self) -> ChunkMixture:
        """The weights, for the function that draws."""
        return ChunkMixture(**self.weights)
