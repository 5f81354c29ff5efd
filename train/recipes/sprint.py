"""Distilling a base model to a student that draws in one to four steps (SANA-Sprint, arXiv 2503.09641)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from jax.sharding import Mesh

from configs.schema import RunConfig
from configs.sprint import SprintConfig
from kernels.typing import PRNGKeyArray, PyTree
from sana_jax.diffusion.samplers import SCM
from sana_jax.models.sana import SanaTransformer
from sana_jax.models.sharding_rules import SANA, Rule
from train.objectives.sprint import Sprint, init_trained
from train.phases import PhaseOptimizers
from train.recipes.base import NullEncoding, SamplingFunction
from train.recipes.sampling import consistency_sampling
from train.sprint_step import averaged, make_sprint_optimizers, make_sprint_steps
from train.step import StepFunction

# Kernels are (heads, taps, inputs, outputs), cut by their inputs: the last convolution has one output.
_BESIDE: tuple[Rule, ...] = (
    (r"logvar/kernel", (None, None)),
    (r"logvar/bias", (None,)),
    (r"heads/\w+/kernel", (None, None, "fsdp", None)),
    (r"heads/\w+/(bias|scale)", (None, None)),
    (r"vectors/\w+/left", (None, None)),
    (r"vectors/\w+/right", (None, None, None)),
)


@dataclass(frozen=True)
class SprintTraining:
    """``trained`` is the tree of ``train.objectives.sprint``; ``frozen`` is the teacher's parameters.

    Attributes:
        transformer: the student, the network that is sampled.
        teacher: the base model's.
        config: of the losses.
    """

    transformer: SanaTransformer
    teacher: SanaTransformer
    config: SprintConfig

    rules: ClassVar[tuple[Rule, ...]] = (*((f"transformer/({path})", axes) for path, axes in SANA), *_BESIDE)
    keeps_base: ClassVar[bool] = True
    copies_base: ClassVar[bool] = True
    kind: ClassVar[str] = "sprint"
    conditions: ClassVar[tuple[str, ...]] = ()

    def settings(self) -> dict[str, Any]:
        """What the sampler has to know."""
        return {"sigma_data": self.config.sigma_data}

    def notes(self, learning_rate: float | None, base: PyTree | None) -> list[str]:
        """What is learnt from what."""
        terms = [f"{self.config.scm_weight:g} x consistency"] if self.config.scm_weight else []
        if self.config.adversarial:
            heads = f"{len(self.config.head_blocks)} heads on the teacher's blocks"
            terms.append(f"{self.config.adversarial_weight:g} x adversarial ({heads}), steps of both in turn")
        return [f"distilling to few steps: {' + '.join(terms)}"]

    def initialize(self, key: PRNGKeyArray, base: PyTree | None) -> PyTree:
        """The teacher with an input for the guidance scale, and fresh heads."""
        return init_trained(self._losses((None, None)), key, base)

    def averaged(self, trained: PyTree) -> PyTree:
        """The student."""
        return averaged(trained)

    def frozen(self, base: PyTree, mesh: Mesh) -> PyTree:
        """The teacher's parameters."""
        return base

    def optimizer(self, config: RunConfig, trained: PyTree) -> PhaseOptimizers:
        """One for the student and one for the heads."""
        return make_sprint_optimizers(config, self.config, trained)

    def step_functions(
        self, config: RunConfig, optimizer: PhaseOptimizers, null_encoding: NullEncoding
    ) -> tuple[StepFunction, ...]:
        """The student's and the discriminator's."""
        return make_sprint_steps(self._losses(null_encoding), optimizer, config)

    def sampling_function(self, sampler: SCM, num_inference_steps: int, guidance_scale: float) -> SamplingFunction:
        """Sampling in few steps; the noise between them depends on the starting noise alone."""
        sample = consistency_sampling(self.transformer, sampler, num_inference_steps, guidance_scale)
        return lambda trained, frozen, *inputs: sample(trained["transformer"], *inputs)

    def _losses(self, null_encoding: NullEncoding | tuple[None, None]) -> Sprint:
        return Sprint(self.transformer, self.teacher, self.config, *null_encoding)


def student_config(teacher: Any) -> Any:
    """The shape of the student of a teacher's shape."""
    return dataclasses.replace(teacher, guidance_embeds=True)
