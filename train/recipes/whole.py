"""Training the whole transformer: from scratch, or on from a base model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from configs.lora import distilled_warnings
from kernels.typing import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from sana_jax.diffusion.samplers import Sampler
from sana_jax.models.sharding_rules import Rule
from sana_jax.pipelines.families import Transformer, family_of
from train.batch import Batch
from train.networks import network_conditions, predicted_velocity, sharding_rules
from train.recipes.base import SamplingFunction
from train.recipes.flow import FlowRecipe
from train.recipes.sampling import preview_sampling


@dataclass(frozen=True)
class WholeTransformer(FlowRecipe):
    """``trained`` is the transformer's parameters; the base model, if there is one, is only where they begin.

    Attributes:
        transformer: the network.
        guidance_scale: what SANA-Sprint's network is told; None for others.
    """

    transformer: Transformer
    guidance_scale: float | None = field(default=None, kw_only=True)

    keeps_base: ClassVar[bool] = False
    kind: ClassVar[str] = "whole"

    @property
    def conditions(self) -> tuple[str, ...]:
        """Those that the network reads."""
        return network_conditions(self.transformer.config)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Those of the network."""
        return sharding_rules(self.transformer.config)

    def settings(self) -> dict[str, Any]:
        """A whole transformer needs none."""
        return {}

    def notes(self, learning_rate: float | None, base: PyTree | None) -> list[str]:
        """What is unusual."""
        return distilled_warnings(self.transformer.config)

    def initialize(self, key: PRNGKeyArray, base: PyTree | None) -> PyTree:
        """Random parameters, or a copy of the base model's in float32."""
        if base is None:
            return family_of(self.transformer.config).init_params(self.transformer, key)
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), base)

    def draw(self, seed: int, step: int | Int[Array, ""], drop_caption: Bool[Array, " B"]) -> PyTree:
        """Nothing is random inside the network."""
        return ()

    def velocity(
        self, trained: PyTree, frozen: None, noisy: Array, timestep: Array, batch: Batch, draws: PyTree
    ) -> Float[Array, "B *X C"]:
        """The transformer's prediction."""
        scale = self.guidance_scale
        return predicted_velocity(self.transformer, trained, noisy, timestep, batch, guidance_scale=scale)

    def sampling_function(self, sampler: Sampler, num_inference_steps: int, guidance_scale: float) -> SamplingFunction:
        """Guided sampling."""
        sample = preview_sampling(self.transformer, sampler, num_inference_steps, guidance_scale)
        return lambda trained, frozen, latents, prompts, conditions: sample(trained, latents, prompts, conditions)
