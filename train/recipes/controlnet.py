"""Training a ControlNet beside a base model that stays as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kernels.typing import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from sana_jax.diffusion.samplers import Sampler
from sana_jax.diffusion.sampling import sample_scan
from sana_jax.models.controlnet import SanaControlNet, init_controlnet_params
from sana_jax.models.sana import SanaTransformer
from sana_jax.models.sharding_rules import CONTROLNET, Rule
from sana_jax.pipelines.sampling_function import Control, Encoded, Network, StepGuidance, guided_velocity, is_guided
from train.batch import Batch
from train.recipes.base import Prompts, SamplingFunction
from train.recipes.flow import FlowRecipe

_COPIED = ("patch_embed", "time_embed", "caption_projection", "caption_norm", "transformer_blocks")


@dataclass(frozen=True)
class ControlNetTraining(FlowRecipe):
    """``trained`` is the ControlNet's parameters; ``frozen`` is the base transformer's.

    Attributes:
        transformer: the base model's.
        controlnet: the network that is trained.
        condition: the batch's condition that holds the control picture's latents.
    """

    transformer: SanaTransformer
    controlnet: SanaControlNet
    condition: str = "control"

    rules: ClassVar[tuple[Rule, ...]] = CONTROLNET
    keeps_base: ClassVar[bool] = True
    kind: ClassVar[str] = "controlnet"

    @property
    def conditions(self) -> tuple[str, ...]:
        """The control picture."""
        return (self.condition,)

    def settings(self) -> dict[str, Any]:
        """The ControlNet's shape."""
        return {"controlnet": dataclasses.asdict(self.controlnet.config)}

    def notes(self, learning_rate: float | None, base: PyTree | None) -> list[str]:
        """Nothing to note."""
        return []

    def initialize(self, key: PRNGKeyArray, base: PyTree | None) -> PyTree:
        """The base model's embeddings and first blocks, and zero layers before and behind them."""
        params = init_controlnet_params(self.controlnet, key)
        layers = self.controlnet.config.num_layers
        for name in _COPIED:
            first = layers if name == "transformer_blocks" else None
            params[name] = jax.tree.map(lambda leaf, first=first: jnp.array(leaf[:first], jnp.float32), base[name])
        return params

    def draw(self, seed: int, step: int | Int[Array, ""], drop_caption: Bool[Array, " B"]) -> PyTree:
        """Nothing is random inside the networks."""
        return ()

    def velocity(
        self, trained: PyTree, frozen: PyTree, noisy: Array, timestep: Array, batch: Batch, draws: PyTree
    ) -> Float[Array, "B H W C"]:
        """The base transformer's prediction with what the ControlNet adds to its stream."""
        control = Control(batch.conditions[self.condition].astype(jnp.float32), jnp.float32(1.0))
        conditions = Encoded(batch.prompt_embeds, batch.prompt_attention_mask)
        params = {"transformer": frozen, "controlnet": trained}
        return Network(self.transformer, self.controlnet).velocity(params, noisy, timestep, conditions, control=control)

    def sampling_function(self, sampler: Sampler, num_inference_steps: int, guidance_scale: float) -> SamplingFunction:
        """Guided sampling with the control pictures of ``conditions``."""
        schedule = sampler.schedule(num_inference_steps)
        network = Network(self.transformer, self.controlnet)

        def function(
            trained: PyTree, frozen: PyTree, latents: Array, prompts: Prompts, conditions: Mapping[str, Array]
        ) -> Float[Array, "B H W C"]:
            params = {"transformer": frozen, "controlnet": trained}
            control = Control(conditions[self.condition].astype(jnp.float32), jnp.float32(1.0))
            positive = Encoded(prompts.embeds, prompts.mask)
            negative = Encoded(prompts.null_embeds, prompts.null_mask) if is_guided(guidance_scale) else None

            def velocity(noisy, timestep):
                guidance = StepGuidance(positive, negative, guidance_scale, control=control)
                return guided_velocity(network, params, noisy, timestep, guidance)

            return sample_scan(sampler, schedule, velocity, latents, None).latents

        return function
