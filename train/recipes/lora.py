"""Training a LoRA beside a base model that stays as it is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from configs.lora import LoraConfig, lora_warnings
from kernels.typing import Array, Float, PRNGKeyArray, PyTree
from sana_jax.diffusion.samplers import Sampler
from sana_jax.lora import init_lora, scaled_lora, target_table, with_dropout
from sana_jax.models.sana import SanaTransformer
from sana_jax.models.sharding_rules import SANA, Rule, lora_rules
from sana_jax.nn.linear import LORA
from sana_jax.pipelines.sampling_function import make_sampling_fn, transformer_variables
from train.batch import Batch
from train.randomness import stream
from train.recipes.base import SamplingFunction


@dataclass(frozen=True)
class LoraTransformer:
    """``trained`` is ``{"lora": ...}``, without its scale; ``frozen`` is the base transformer's parameters."""

    transformer: SanaTransformer
    config: LoraConfig

    rules: ClassVar[tuple[Rule, ...]] = lora_rules(SANA)
    keeps_base: ClassVar[bool] = True
    kind: ClassVar[str] = "lora"
    conditions: ClassVar[tuple[str, ...]] = ()

    def settings(self) -> dict[str, Any]:
        """What the LoRA's scale is made of."""
        return {"lora": dataclasses.asdict(self.config)}

    def notes(self, learning_rate: float | None, base: PyTree | None) -> list[str]:
        """Which layers change, and what is unusual."""
        table = target_table(base, self.config.targets, self.config.rank)
        return [*table.splitlines(), *lora_warnings(learning_rate, self.transformer.config)]

    def initialize(self, key: PRNGKeyArray, base: PyTree | None) -> PyTree:
        """A LoRA that changes nothing yet; of ``base`` only the shapes are read."""
        return {LORA: init_lora(base, self.config.targets, self.config.rank, key, self.config.init)}

    def draw(self, seed, step, rows) -> PyTree:
        """A key for each sample's dropout."""
        return jax.random.split(stream(seed, step, "lora_dropout"), rows) if self.config.dropout else ()

    def velocity(
        self, trained: PyTree, frozen: PyTree, noisy: Array, timestep: Array, batch: Batch, draws: PyTree
    ) -> Float[Array, "B H W C"]:
        """The prediction of the base transformer with the LoRA."""
        lora = scaled_lora(trained[LORA], self.config.scale)
        if self.config.dropout and draws is not None:
            lora = with_dropout(lora, self.config.dropout, draws)
        return self.transformer.apply(
            transformer_variables(frozen, lora),
            noisy,
            batch.prompt_embeds,
            timestep * self.transformer.config.timestep_scale,
            encoder_attention_mask=batch.prompt_attention_mask,
        )

    def sampling_function(self, sampler: Sampler, num_inference_steps: int, guidance_scale: float) -> SamplingFunction:
        """Guided sampling with the LoRA."""
        sample = make_sampling_fn(self.transformer, sampler, num_inference_steps, guidance_scale)

        def function(trained, frozen, latents, prompts, conditions):
            return sample(frozen, latents, *prompts, lora=scaled_lora(trained[LORA], self.config.scale))

        return function
