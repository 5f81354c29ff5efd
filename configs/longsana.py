"""Options of LongSANA's training (SANA-Video, arXiv 2509.24695, §4): one dataclass for each stage.

Defaults are those of the published recipes. The stages' steps, batch and optimizer are a preset's: for ODE
initialisation 10,000 steps of AdamW at 2e-5 with betas (0.9, 0.999); for self-forcing, on 64 devices with a batch of
one, AdamW at 1e-5 (generator) and 2e-6 (fake score) with betas (0, 0.999) and a moving average of 0.99 from step 200;
for streaming the same, 30,000 steps; gradients clipped at a norm of 10 in all of them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

from configs.checks import require
from sana_jax.diffusion.samplers import LongSanaSampler, WorldStreamSampler
from sana_jax.diffusion.samplers.longsana import BLOCK_FRAMES, DENOISING_STEPS, FLOW_SHIFT, causal_block_starts
from sana_jax.diffusion.samplers.world_model import chunk_starts

REST_FIRST = "rest_first"
Blocks = Literal["rest_first", "first_plus_one", "uniform", "first_frame"]


class _Causal:
    """What the stages of a few-step generator have in common, whose fields say how it is sampled."""

    @property
    def is_world(self) -> bool:
        """Whether it is for SANA-WM's student, and not for LongSANA's."""
        return self.flow_shift is None

    def block_starts(self, num_frames: int) -> tuple[int, ...]:
        """First latent frame of every causal block of a video."""
        if self.blocks == REST_FIRST:
            return causal_block_starts(num_frames, self.block_frames)
        return chunk_starts(num_frames, self.block_frames, self.blocks)

    @property
    def sampler(self) -> LongSanaSampler | WorldStreamSampler:
        """The generator's."""
        cached = getattr(self, "num_cached_blocks", None)
        options = {"block_frames": self.block_frames, "num_cached_blocks": cached}
        if not self.is_world:
            return LongSanaSampler(self.flow_shift, self.timesteps, **options)
        return WorldStreamSampler(self.timesteps, blocks=self.blocks, sink=getattr(self, "sink", False), **options)

    def _check_causal(self, prefix: str) -> None:
        steps, shift = self.timesteps, self.flow_shift
        falls = all(later < earlier for earlier, later in itertools.pairwise(steps))
        within = bool(steps) and steps[0] <= 1000 and steps[-1] > 0
        allowed = "timesteps that fall, at most 1000 and above 0"
        require(f"{prefix}.timesteps", " ".join(map(str, steps)) or "(none)", falls and within, allowed)
        require(f"{prefix}.flow-shift", shift, shift is None or 0 < shift < math.inf, "above 0, or None for SANA-WM")
        require(f"{prefix}.block-frames", self.block_frames, self.block_frames >= 1, "1 or more")
        allowed = "rest_first with a flow shift (LongSANA), and another without (SANA-WM)"
        require(f"{prefix}.blocks", self.blocks, (self.blocks == REST_FIRST) != self.is_world, allowed)


@dataclass(frozen=True)
class ChunkCausalConfig:
    """Flow matching in causal blocks, from a bidirectional model: each block has its own noise level."""

    block_frames: int = BLOCK_FRAMES
    """Latent frames of a block; the first block takes the remainder of the clip."""
    strategy: Literal["incremental", "uniform"] = "incremental"
    """How the levels of blocks are drawn: rising from block to block, every rising sequence through a drawn level
    alike; or each by itself."""
    same_timestep_prob: float = 0.0
    """Share of batches in which all blocks of a clip have one level."""
    image_to_video: bool = False
    """Keep the first latent frame nearly or wholly clean, as where a picture is given; no loss falls on it."""
    noise_multiplier: float = 0.0
    """Then its level is uniform below this share of all levels; 0 leaves it clean."""

    def __post_init__(self):
        require("chunk-causal.block-frames", self.block_frames, self.block_frames >= 1, "1 or more")
        share = self.same_timestep_prob
        require("chunk-causal.same-timestep-prob", share, 0 <= share <= 1, "0 to 1")
        share, used = self.noise_multiplier, self.image_to_video
        require("chunk-causal.noise-multiplier", share, 0 <= share <= 1, "0 to 1")
        require("chunk-causal.noise-multiplier", share, used or not share, "0 without --chunk-causal.image-to-video")


@dataclass(frozen=True)
class OdeInitializationConfig(_Causal):
    """Regression onto the teacher's ODE trajectories, which gives the few-step generator its start."""

    timesteps: tuple[int, ...] = DENOISING_STEPS
    """Where the trajectories were kept, from noise on; the clean end is kept as well. The sampler's steps."""
    flow_shift: float | None = FLOW_SHIFT
    """Of the table in which the noise level of a timestep is looked up; the sampler's. None: the level is
    timestep/1000, as SANA-WM's."""
    block_frames: int = BLOCK_FRAMES
    """Latent frames of a causal block."""
    blocks: Blocks = REST_FIRST
    """Where the clip's remainder goes: to the first block (rest_first, LongSANA); or, for SANA-WM, whether the first
    block has a frame more, as many as the others, or the first frame alone, and the last block takes the rest."""
    clean_first_frame: bool = False
    """Give the first latent frame clean, as where a picture is given."""

    def __post_init__(self):
        self._check_causal("ode")
        given = self.clean_first_frame
        require("ode.no-clean-first-frame", "", given or not self.is_world, "left out for SANA-WM, which is given it")


@dataclass(frozen=True)
class StreamConfig:
    """Windows of a long video that grows over many steps: the state of its blocks is kept from window to window."""

    total_frames: int = 261
    """Latent frames of a video, after which a new one begins with a new prompt; 261 are a minute."""
    window_frames: int = 21
    """Latent frames that the scores compare at once, and of the first window."""
    overlap_frames: int = 1
    """Frames of a later window that are not new: 1, the last frame of what there is, encoded as a picture. No loss
    falls on it."""

    def __post_init__(self):
        overlap, window = self.overlap_frames, self.window_frames
        require("self-forcing.stream.overlap-frames", overlap, overlap == 1, "1, a single picture")
        require("self-forcing.stream.window-frames", window, window > overlap, f"above {overlap}, as 21")
        require("self-forcing.stream.total-frames", self.total_frames, self.total_frames >= window, f"{window} or more")


@dataclass(frozen=True)
class SelfForcingConfig(_Causal):
    """Distribution matching on the generator's own videos: a generator, a fake score that learns, a real one that
    stays.

    Steps alternate: one of the generator, then ``critic_steps`` of the fake score.
    """

    generator: str | None = None
    """The model that the generator begins as, usually a run of ODE initialisation, or of self-forcing before streaming;
    None: as the base model. The base model is the real score; what the fake score begins as is ``fake_score``."""
    fake_score: str | None = None
    """A run of self-forcing whose fake score this one's goes on from; None: it begins as the base model."""
    timesteps: tuple[int, ...] = DENOISING_STEPS
    """The steps of the generator."""
    flow_shift: float | None = FLOW_SHIFT
    """Of the generator's table, in which noise levels of timesteps are looked up; scores are given samples noised by
    it. None: the level is timestep/1000, as SANA-WM's."""
    score_flow_shift: float | None = 8.0
    """Of the score networks' own table, from which their clean predictions are made: the base model's in sampling.
    None with a flow shift of None."""
    block_frames: int = BLOCK_FRAMES
    """Latent frames of a block."""
    blocks: Blocks = REST_FIRST
    """Where the video's remainder goes: to the first block (rest_first, LongSANA); or, for SANA-WM, whether the first
    block has a frame more, as many as the others, or the first frame alone, and the last block takes the rest."""
    num_cached_blocks: int | None = None
    """How many earlier blocks a block sees; None for all."""
    sink: bool = False
    """SANA-WM: whether the first block is always one of them."""
    fresh_noise: bool = True
    """New noise after each of the generator's steps but the last, as published. False: the noise of the step before,
    which is how SANA-WM is sampled."""
    same_exit_step: bool = True
    """One exit step for all blocks of a video; otherwise one for each."""
    always_last_step: bool = False
    """Always exit at the last step."""
    state_from_last_step: bool = False
    """After the exit step go on to the last, without gradients, for the state that the next block sees."""
    critic_steps: int = 5
    """Steps of the fake score for each of the generator."""
    critic_learning_rate: float | None = None
    """Peak learning rate of the fake score; None for the generator's, which is --optimizer.learning-rate."""
    guidance: float = 3.0
    """The real score is cond + guidance·(cond - uncond): 3 is a classifier-free guidance scale of 4."""
    timestep_shift: float = 5.0
    """Bends the times at which scores compare towards noise."""
    least_timestep: int = 20
    """The earliest of them, after the shift."""
    greatest_timestep: int = 980
    """The latest."""
    least_normalizer: float = 0.0
    """What the gradient is divided by at least; 1e-6 in SANA-WM's recipe."""
    above_exit_step: bool = False
    """Draw the generator's times, before the shift, no lower than the timestep of the exit step."""
    stream: StreamConfig | None = None
    """Train on windows of a growing video; None for whole videos of one window."""

    def __post_init__(self):
        self._check_causal("self-forcing")
        require("self-forcing.timestep-shift", self.timestep_shift, 0 < self.timestep_shift < math.inf, "above 0")
        shift, allowed = self.score_flow_shift, "above 0, and None with --self-forcing.flow-shift None"
        fits = (shift is None) == self.is_world and (shift is None or 0 < shift < math.inf)
        require("self-forcing.score-flow-shift", shift, fits, allowed)
        least = self.least_normalizer
        require("self-forcing.least-normalizer", least, 0 <= least < math.inf, "0 or more")
        self._check_world()
        cached = self.num_cached_blocks
        require("self-forcing.num-cached-blocks", cached, cached is None or cached >= 1, "1 or more, or None for all")
        require("self-forcing.critic-steps", self.critic_steps, self.critic_steps >= 1, "1 or more")
        rate = self.critic_learning_rate
        require("self-forcing.critic-learning-rate", rate, rate is None or 0 < rate < 1, "above 0 and below 1, or None")
        require("self-forcing.guidance", self.guidance, self.guidance >= 0, "0 or more")
        least, greatest = self.least_timestep, self.greatest_timestep
        require("self-forcing.least-timestep", least, 0 <= least < greatest, "0 or more and below the greatest")
        require("self-forcing.greatest-timestep", greatest, greatest <= 1000, "at most 1000")
        last, allowed = self.always_last_step, "left out where --self-forcing.always-last-step"
        require("self-forcing.no-same-exit-step", "", self.same_exit_step or not last, allowed)
        require("self-forcing.state-from-last-step", "", not (self.state_from_last_step and last), allowed)
        allowed = "left out without --self-forcing.same-exit-step"
        require("self-forcing.above-exit-step", "", self.same_exit_step or not self.above_exit_step, allowed)

    def _check_world(self) -> None:
        """What one of the two generators alone has."""
        windows = self.num_cached_blocks is not None
        require("self-forcing.sink", "", not self.sink or (self.is_world and windows), "for SANA-WM with cached blocks")
        allowed = "for SANA-WM, whose sampler adds no noise"
        require("self-forcing.no-fresh-noise", "", self.fresh_noise or self.is_world, allowed)
        require("self-forcing.stream", "of windows", self.stream is None or not self.is_world, "for LongSANA alone")

    @property
    def cycle(self) -> tuple[str, ...]:
        """The kinds of step, in turn."""
        return ("generator", *("critic",) * self.critic_steps)
