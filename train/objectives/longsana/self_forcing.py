"""Self-forcing: losses of the generator and of the fake score, on videos that the generator makes.

``trained`` is the tree

    {"transformer": the generator, "fake": the fake score}

and ``frozen`` the real score's parameters. The data gives prompts and, for SANA-WM, the camera's path and the first
frame; of its other latents only the shape is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from configs.longsana import SelfForcingConfig
from kernels.typing import Array, Bool, Float, Int, PyTree, Shaped
from sana_jax.diffusion.flow import add_noise
from sana_jax.diffusion.samplers import LongSanaSampler, WorldStreamSampler
from sana_jax.errors import UserError
from train.batch import Batch
from train.objectives.base import PhaseLosses
from train.objectives.longsana.critic import critic_loss
from train.objectives.longsana.dmd import (
    distribution_gradient,
    dmd_loss,
    guided_prediction,
    score_level,
    score_timestep,
)
from train.objectives.longsana.networks import (
    BlockNetwork,
    Captions,
    ScoreNetwork,
    State,
    Told,
    Transformer,
    block_network,
    captions_of,
    empty_state,
    made_frames,
    predicted_x0,
    score_network,
    sigma_at,
)
from train.objectives.longsana.rollout import RolloutDraws, RolloutSettings, draw_rollout, rollout
from train.randomness import stream

# Captions of the real score, where it is told another motion score than the others.
REAL_EMBEDS, REAL_MASK = "real_prompt_embeds", "real_prompt_attention_mask"


class ScoreDraws(NamedTuple):
    """What is random about how scores see a video."""

    level: Float[Array, " B"]
    """U[0, 1), of the time: one for all frames."""
    noise: Float[Array, "B T H W C"]


class SelfForcingDraws(NamedTuple):
    """What is random about a step of either kind."""

    rollout: RolloutDraws
    score: ScoreDraws


class SeenByScores(NamedTuple):
    """A video noised for the score networks."""

    noisy: Float[Array, "B T H W C"]
    timestep: Float[Array, " B"] | Float[Array, "B T"]
    """Of every frame where some are given, whose time is 0."""
    sigma: Float[Array, " B"]
    """Of the frames that are not given."""


@dataclass(frozen=True)
class SelfForcing:
    """Losses of both phases and their draws.

    Attributes:
        generator: the causal network that learns; see ``block_network``.
        fake_score: the bidirectional network that learns the generator's videos; see ``score_network``.
        real_score: the one that knows the data.
        empty_state: the state before a video's first block, from the latents' shape (B, T, H, W, C).
        config: steps, guidance and times.
        negative: encoding (1, L, Ctext) and mask (1, L) of the negative prompt, for the real score's guidance.
    """

    generator: BlockNetwork
    fake_score: ScoreNetwork
    real_score: ScoreNetwork
    empty_state: Callable[[tuple[int, ...]], PyTree]
    config: SelfForcingConfig
    negative: Captions

    @classmethod
    def of_transformers(
        cls,
        generator: Transformer,
        score: Transformer,
        config: SelfForcingConfig,
        negative: Captions,
    ) -> SelfForcing:
        """With transformers as networks, both scores of one shape."""

        def state(shape):
            return empty_state(generator, shape, config.block_starts(shape[1]), config.num_cached_blocks, config.sink)

        scores = score_network(score)
        return cls(block_network(generator), scores, scores, state, config, negative)

    @property
    def sampler(self) -> LongSanaSampler | WorldStreamSampler:
        """The generator's."""
        return self.config.sampler

    # -- randomness --------------------------------------------------------------------------------------------------

    def draw_generator(self, seed: int, step: int | Int[Array, ""], batch: Batch) -> SelfForcingDraws:
        """What is random at a step of the generator: streams ``generator_*``."""
        return self.draw("generator", seed, step, batch.latents.shape)

    def draw_critic(self, seed: int, step: int | Int[Array, ""], batch: Batch) -> SelfForcingDraws:
        """What is random at a step of the fake score: streams ``critic_*``."""
        return self.draw("critic", seed, step, batch.latents.shape)

    def draw(
        self,
        phase: str,
        seed: int,
        step: int | Int[Array, ""],
        shape: tuple[int, ...],
        new_frames: int | None = None,
    ) -> SelfForcingDraws:
        """The draws of a rollout of ``new_frames`` frames (all without), and of the scores for ``shape``.

        Streams: ``{phase}_start``, ``_between``, ``_context``, ``_exit``, ``_level``, ``_noise``.
        """
        c = self.config
        rolled = (shape[0], new_frames or shape[1], *shape[2:])
        blocks = len(c.block_starts(rolled[1]))
        settings = RolloutSettings(
            same_for_all_blocks=c.same_exit_step,
            always_last=c.always_last_step,
            fresh_noise=c.fresh_noise,
            context_noise=self.sampler.context_sigma > 0,
        )
        rolled_out = draw_rollout(seed, step, phase, rolled, blocks, len(c.timesteps), settings)
        level = jax.random.uniform(stream(seed, step, f"{phase}_level"), shape[:1], jnp.float32)
        noise = jax.random.normal(stream(seed, step, f"{phase}_noise"), shape, jnp.float32)
        return SelfForcingDraws(rolled_out, ScoreDraws(level, noise))

    # -- losses ------------------------------------------------------------------------------------------------------

    def generator_losses(self, trained: PyTree, frozen: PyTree, batch: Batch, draws: SelfForcingDraws) -> PhaseLosses:
        """The generator's loss on whole videos; gradients are for ``trained["transformer"]`` alone."""
        captions = captions_of(batch)
        video, _ = self.roll_out(trained["transformer"], captions, self.empty_state(batch.latents.shape), draws.rollout)
        return self.matching_losses(trained, frozen, video, captions, real_captions_of(batch), draws)

    def critic_losses(self, trained: PyTree, batch: Batch, draws: SelfForcingDraws) -> PhaseLosses:
        """The fake score's loss on whole videos; gradients are for ``trained["fake"]`` alone."""
        captions, fixed = captions_of(batch), jax.lax.stop_gradient(trained["transformer"])
        video, _ = self.roll_out(fixed, captions, self.empty_state(batch.latents.shape), draws.rollout)
        return self.denoising_losses(trained, video, captions, draws)

    def roll_out(
        self,
        params: PyTree,
        captions: Told,
        state: State,
        draws: RolloutDraws,
        first_frame: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T H W C"], State]:
        """As many frames as the draws have, from frame ``first_frame`` of the video on; see ``rollout``."""
        return rollout(
            self.generator,
            params,
            captions,
            state,
            draws,
            self.sampler,
            self.config.block_starts(draws.start.shape[1]),
            first_frame=first_frame,
            state_from_last_step=self.config.state_from_last_step,
        )

    def matching_losses(
        self,
        trained: PyTree,
        frozen: PyTree,
        video: Float[Array, "B T H W C"],
        captions: Told,
        real_captions: Told,
        draws: SelfForcingDraws,
        mask: Shaped[Array, "B *M"] | None = None,
    ) -> PhaseLosses:
        """The distribution-matching loss of a video, with gradients to whatever made the video.

        Args:
            trained: the tree above.
            frozen: the real score's parameters.
            video: the generator's.
            captions: the prompts.
            real_captions: the prompts as the real score is told them.
            draws: what is random.
            mask: which elements count; None for all that are not given.
        """
        lowest = self._lowest_level(draws)
        mask = _counted(captions, video) if mask is None else mask
        seen = self.seen_by_scores(jax.lax.stop_gradient(video), draws.score, lowest, captions)
        real, fake = self.compare(jax.lax.stop_gradient(trained["fake"]), frozen, seen, captions, real_captions)
        gradient, normalizer = distribution_gradient(video, real, fake, self.config.least_normalizer)
        losses = dmd_loss(video, gradient, mask)
        norm = jnp.sqrt(jnp.square(gradient).mean(tuple(range(1, gradient.ndim))))
        return PhaseLosses(losses, seen.sigma, {"dmd": losses, "gradient": norm, "normalizer": normalizer})

    def denoising_losses(
        self,
        trained: PyTree,
        video: Float[Array, "B T H W C"],
        captions: Told,
        draws: SelfForcingDraws,
        mask: Shaped[Array, "B *M"] | None = None,
    ) -> PhaseLosses:
        """The fake score's loss on a video; arguments as in ``matching_losses``."""
        video = jax.lax.stop_gradient(video)
        mask = _counted(captions, video) if mask is None else mask
        seen = self.seen_by_scores(video, draws.score, captions=captions)
        x0 = self.score_x0(self.fake_score, trained["fake"], seen, captions)
        losses = critic_loss(x0, seen.noisy, video, draws.score.noise, seen.sigma, mask)
        return PhaseLosses(losses, seen.sigma, {"denoising": losses})

    def seen_by_scores(
        self,
        video: Float[Array, "B T H W C"],
        draws: ScoreDraws,
        lowest: int | Int[Array, ""] = 0,
        captions: Told | None = None,
    ) -> SeenByScores:
        """The video noised to the drawn times by the generator's table, but for the frames that are given."""
        c = self.config
        level = score_level(draws.level, lowest)
        timestep = score_timestep(level, c.timestep_shift, c.least_timestep, c.greatest_timestep)
        sigma = sigma_at(timestep, c.flow_shift)
        made = None if captions is None else made_frames(captions, video.shape[1])
        if made is None:
            return SeenByScores(add_noise(video, draws.noise, sigma), timestep, sigma)
        of_frames, levels = (jnp.where(made, value[:, None], 0.0) for value in (timestep, sigma))
        return SeenByScores(add_noise(video, draws.noise, levels), of_frames, sigma)

    def score_x0(
        self, network: ScoreNetwork, params: PyTree, seen: SeenByScores, captions: Told
    ) -> Float[Array, "B T H W C"]:
        """A score network's clean prediction, with its own table."""
        return predicted_x0(network, params, seen.noisy, seen.timestep, captions, self.config.score_flow_shift)

    def compare(
        self, fake: PyTree, real: PyTree, seen: SeenByScores, captions: Told, real_captions: Told
    ) -> tuple[Float[Array, "B T H W C"], Float[Array, "B T H W C"]]:
        """The clean predictions of the real score, guided, and of the fake one, which sees the prompts alone."""
        rows, own, negative = seen.timestep.shape[0], real_captions, self.negative
        if own.mask.shape[1] != negative.mask.shape[1]:
            raise UserError(
                f"the negative prompt has {negative.mask.shape[1]} tokens and the prompts {own.mask.shape[1]}; encode "
                "both with the same number"
            )
        negative = own._replace(**negative.for_rows(rows)._asdict())  # of the same camera
        both = jax.tree.map(lambda own, negative: jnp.concatenate([own, negative.astype(own.dtype)]), own, negative)
        twice = jax.tree.map(lambda array: jnp.concatenate([array, array]), seen)
        conditional, unconditional = jnp.split(self.score_x0(self.real_score, real, twice, both), 2)
        return (
            guided_prediction(conditional, unconditional, self.config.guidance),
            self.score_x0(self.fake_score, fake, seen, captions),
        )

    def _lowest_level(self, draws: SelfForcingDraws) -> Int[Array, ""] | int:
        if not self.config.above_exit_step:
            return 0
        return jnp.asarray(self.config.timesteps)[draws.rollout.exit_step[0, 0]]


def real_captions_of(batch: Batch) -> Told:
    """The prompts as the real score is told them: its own, where the data has them."""
    own, captions = batch.conditions, captions_of(batch)
    return captions._replace(embeds=own[REAL_EMBEDS], mask=own[REAL_MASK]) if REAL_EMBEDS in own else captions


def _counted(captions: Told, video: Float[Array, "B T H W C"]) -> Bool[Array, "B T"] | None:
    """Which frames losses fall on; None for all."""
    made = made_frames(captions, video.shape[1])
    return None if made is None else jnp.broadcast_to(made, video.shape[:2])
