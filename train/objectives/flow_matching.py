"""The flow-matching objective of SANA and SANA-Video: predict ``noise - x0`` at a random noise level.

Random draws are made for the whole batch at once and travel with it, so that neither accumulation nor the mesh
changes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from configs.schema import FlowConfig, VideoFlowConfig
from kernels.typing import Array, Bool, Float, Int, PyTree
from sana_jax.diffusion.flow import add_noise, flow_matching_loss, noise_level, velocity_target
from sana_jax.diffusion.timesteps import TimestepDensity, sample_timestep_index
from sana_jax.errors import UserError
from train.batch import FRAME_VALID, Batch
from train.objectives.base import SampleLosses, VelocityNetwork
from train.randomness import stream

# settings of a density, as its messages have them: the options that give them
_OPTIONS = {"mean": "logit-mean", "std": "logit-std", "p_low": "p-low", "p_high": "p-high", "mode_scale": "mode-scale"}
_SETTING = re.compile(r"\b(p_low|p_high|mode_scale|(mean|std)(?==))(?!\w)")


class Draws(NamedTuple):
    """Everything random about one batch."""

    index: Int[Array, " B"] | Int[Array, "B T"]
    noise: Float[Array, "B *X C"]
    drop_caption: Bool[Array, " B"]
    network: PyTree = ()
    """What is random inside the network: the recipe's own."""
    first_given: Bool[Array, " B"] | None = None
    """Which clips have their first latent frame given; None where none ever has."""


@dataclass(frozen=True)
class FlowMatching:
    """Mean squared error of the predicted velocity.

    A clip whose first latent frame is given has that frame clean, at timestep 0, and out of the loss, as the image of
    image to video. A sample counts with ``batch.conditions["loss_weight"]`` where the data has it, else with 1; where
    it has ``frame_valid``, frames that are padding do not count. Indices may be of each latent frame.

    Attributes:
        recipe: the network, from the trained parameters and those of the base model.
        config: density, shift, caption dropout and, for clips, the share with a given first frame.
        null_embeds: the text encoder's encoding of no text (1, L, Ctext), which a dropped caption becomes.
        null_mask: its mask (1, L).
    """

    recipe: VelocityNetwork
    config: FlowConfig
    null_embeds: Float[Array, "1 L Ctext"]
    null_mask: Int[Array, "1 L"]

    @property
    def density(self) -> TimestepDensity:
        """The density of noise levels. Raises UserError for settings that the named density does not read."""
        c = self.config
        try:
            return TimestepDensity(
                c.density, c.logit_mean, c.logit_std, p_low=c.p_low, p_high=c.p_high, mode_scale=c.mode_scale
            )
        except UserError as error:  # in the words of the command line
            raise UserError(_SETTING.sub(lambda name: f"--flow.{_OPTIONS[name[0]]}", str(error))) from error

    def draw(self, seed: int, step: int | Int[Array, ""], batch: Batch) -> Draws:
        """What is random at one step, for a whole batch."""
        rows = batch.latents.shape[0]
        drop_caption = jax.random.bernoulli(stream(seed, step, "caption_dropout"), self.config.caption_dropout, (rows,))
        return Draws(
            index=sample_timestep_index(stream(seed, step, "timestep"), (rows,), self.density),
            noise=jax.random.normal(stream(seed, step, "noise"), batch.latents.shape, jnp.float32),
            drop_caption=drop_caption,
            network=self.recipe.draw(seed, step, drop_caption),
            first_given=self._draw_given(seed, step, batch),
        )

    def _draw_given(self, seed: int, step: int | Int[Array, ""], batch: Batch) -> Bool[Array, " B"] | None:
        """Which clips have their first frame given. One of a single frame, a picture, has none left to learn then."""
        share = self.config.image_to_video if isinstance(self.config, VideoFlowConfig) else 0.0
        shape = batch.latents.shape
        if not share or len(shape) != 5 or shape[1] == 1:
            return None
        return jax.random.bernoulli(stream(seed, step, "first_given"), share, shape[:1])

    def levels_of_given(self, levels: Float[Array, "B *T"], given: Bool[Array, "B T"]) -> Float[Array, "B T"]:
        """Noise levels, or times, of all frames: 0 where a frame is given."""
        return jnp.where(given, 0.0, levels)

    def losses(self, trained: PyTree, frozen: PyTree | None, batch: Batch, draws: Draws) -> SampleLosses:
        """Each sample's loss, (B,) in float32."""
        level = noise_level(draws.index, self.config.flow_shift)
        latents = batch.latents.astype(jnp.float32)
        sigma, timestep, counted = level.sigma, level.timestep.astype(jnp.float32), None
        if draws.first_given is not None:
            given = draws.first_given[:, None] & (jnp.arange(latents.shape[1]) == 0)
            sigma, timestep = (self.levels_of_given(of_frames(values), given) for values in (sigma, timestep))
            counted = ~given
        if (valid := batch.conditions.get(FRAME_VALID)) is not None:
            counted = valid.astype(bool) if counted is None else counted & valid.astype(bool)
        noisy = add_noise(latents, draws.noise, sigma)
        embeds = jnp.where(draws.drop_caption[:, None, None], self.null_embeds, batch.prompt_embeds)
        mask = jnp.where(draws.drop_caption[:, None], self.null_mask, batch.prompt_attention_mask)
        captioned = batch._replace(prompt_embeds=embeds, prompt_attention_mask=mask)
        velocity = self.recipe.velocity(trained, frozen, noisy, timestep, captioned, draws.network)
        loss = flow_matching_loss(velocity, velocity_target(latents, draws.noise), counted)
        return SampleLosses(loss * batch.conditions.get("loss_weight", 1.0), level.sigma)


def of_frames(values: Float[Array, " B"] | Float[Array, "B T"]) -> Float[Array, "B *T"]:
    """With an axis of frames."""
    return values if values.ndim == 2 else values[:, None]
