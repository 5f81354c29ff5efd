"""Training a LoRA beside a base model that stays as it is."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import jax

from configs.lora import LoraConfig, lora_warnings
from kernels.typing import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from sana_jax.condition_tokens_files import TOKENS, tokens_to_dict
from sana_jax.diffusion.samplers import Sampler
from sana_jax.image_encoders import SiglipImageEncoder
from sana_jax.lora import init_lora, scaled_lora, target_table, with_dropout
from sana_jax.models.condition_tokens import ConditionEncoders, apply_tokens, draw_dropped, init_tokens, null_tokens
from sana_jax.models.sharding_rules import CONDITION_TOKENS, Rule, lora_rules
from sana_jax.nn.linear import LORA
from sana_jax.pipelines.families import Transformer
from sana_jax.pipelines.sampling_function import is_guided
from train.batch import Batch
from train.networks import network_conditions, predicted_velocity, sharding_rules
from train.randomness import stream
from train.recipes.base import SamplingFunction
from train.recipes.flow import FlowRecipe
from train.recipes.sampling import preview_sampling


@dataclass(frozen=True)
class LoraTransformer(FlowRecipe):
    """``trained`` is ``{"lora": ..., "tokens": ...}``; ``frozen`` is the base transformer's parameters.

    Attributes:
        transformer: the base model's.
        config: of the LoRA, whose tree is without its scale.
        encoders: of condition tokens, which are trained beside it; None for none.
        sources: where the data has the conditions from, as its configuration declares them.
        guidance_scale: what SANA-Sprint's network is told; None for others.
    """

    transformer: Transformer
    config: LoraConfig
    encoders: ConditionEncoders | None = None
    sources: tuple[str, ...] = ()
    guidance_scale: float | None = None

    keeps_base: ClassVar[bool] = True
    copies_base: ClassVar[bool] = False
    kind: ClassVar[str] = "lora"

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Those of the network's layers, and of the tokens."""
        return (*lora_rules(sharding_rules(self.transformer.config)), *CONDITION_TOKENS)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Those that the network reads, and those that become tokens."""
        return (*network_conditions(self.transformer.config), *self._token_names)

    @property
    def _token_names(self) -> tuple[str, ...]:
        return () if self.encoders is None else tuple(self.encoders.encoders)

    @cached_property
    def image_encoders(self) -> dict[str, dict[str, Any]]:
        """What made the conditions that are vectors of pictures; asked for once, before the run's first step."""
        found = {}
        for condition in self.sources:
            name, _, kind = condition.partition("=")
            kind, _, directory = kind.partition(":")
            if kind == "siglip":
                encoder = SiglipImageEncoder.from_directory(directory, say=lambda line: None)
                options = {key: encoder.describe()[key] for key in ("dtype", "features", "normalize")}
                found[name] = {"directory": os.path.abspath(directory), "id": encoder.id, **options}
        return found

    def settings(self) -> dict[str, Any]:
        """What the LoRA's scale is made of, and what the tokens are."""
        settings = {"lora": dataclasses.asdict(self.config)}
        if self.encoders is not None:
            settings[TOKENS] = tokens_to_dict(self.encoders, self.image_encoders)
        return settings

    def notes(self, learning_rate: float | None, base: PyTree | None) -> list[str]:
        """Which layers change, and what is unusual."""
        table = target_table(base, self.config.targets, self.config.rank)
        return [*table.splitlines(), *lora_warnings(learning_rate, self.transformer.config)]

    def initialize(self, key: PRNGKeyArray, base: PyTree | None) -> PyTree:
        """A LoRA that changes nothing yet, and tokens without effect; of ``base`` only the shapes are read."""
        lora = init_lora(base, self.config.targets, self.config.rank, key, self.config.init)
        if self.encoders is None:
            return {LORA: lora}
        return {LORA: lora, TOKENS: init_tokens(self.encoders, jax.random.fold_in(key, 1))}

    def draw(self, seed: int, step: int | Int[Array, ""], drop_caption: Bool[Array, " B"]) -> PyTree:
        """A key for each sample's dropout, and which samples lose which condition."""
        draws = {}
        if self.config.dropout:
            draws[LORA] = jax.random.split(stream(seed, step, "lora_dropout"), drop_caption.shape[0])
        if self.encoders is not None:
            keys = {name: stream(seed, step, f"condition_dropout_{name}") for name in self._token_names}
            draws[TOKENS] = draw_dropped(self.encoders, keys, drop_caption)
        return draws

    def velocity(
        self, trained: PyTree, frozen: PyTree, noisy: Array, timestep: Array, batch: Batch, draws: PyTree
    ) -> Float[Array, "B *X C"]:
        """The prediction of the base transformer with the LoRA and the tokens."""
        draws = draws or {}
        lora = scaled_lora(trained[LORA], self.config.scale)
        if LORA in draws:
            lora = with_dropout(lora, self.config.dropout, draws[LORA])
        tokens = None
        if self.encoders is not None:
            tokens = apply_tokens(self.encoders, trained[TOKENS], batch.conditions, draws.get(TOKENS))
        scale = self.guidance_scale
        return predicted_velocity(self.transformer, frozen, noisy, timestep, batch, lora, tokens, guidance_scale=scale)

    def sampling_function(self, sampler: Sampler, num_inference_steps: int, guidance_scale: float) -> SamplingFunction:
        """Guided sampling with the LoRA."""
        sample = preview_sampling(self.transformer, sampler, num_inference_steps, guidance_scale)

        def function(trained, frozen, latents, prompts, conditions):
            more = {}
            if self.encoders is not None:
                more["tokens"] = apply_tokens(self.encoders, trained[TOKENS], conditions)
                if is_guided(guidance_scale):
                    more["null_tokens"] = null_tokens(self.encoders, trained[TOKENS], 1)
            lora = scaled_lora(trained[LORA], self.config.scale)
            return sample(frozen, latents, prompts, conditions, lora=lora, **more)

        return function
