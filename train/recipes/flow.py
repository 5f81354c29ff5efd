"""What recipes that train one network by flow matching have in common."""

from __future__ import annotations

from typing import ClassVar

import optax
from jax.sharding import Mesh

from configs.schema import RunConfig
from kernels.typing import PyTree
from train.objectives.flow_matching import FlowMatching
from train.optimizers import make_optimizer
from train.recipes.base import NullEncoding
from train.step import StepFunction, make_train_step


class FlowRecipe:
    """One optimizer, one kind of step, an average of all that is trained."""

    keeps_base: ClassVar[bool]
    copies_base: ClassVar[bool] = True

    def averaged(self, trained: PyTree) -> PyTree:
        """All of it."""
        return trained

    def frozen(self, base: PyTree | None, mesh: Mesh) -> PyTree | None:
        """The base model's parameters, where they stay."""
        return base if self.keeps_base else None

    def optimizer(self, config: RunConfig, trained: PyTree) -> optax.GradientTransformation:
        """The configured one."""
        return make_optimizer(config.optimizer, config.steps, trained)

    def step_functions(
        self, config: RunConfig, optimizer: optax.GradientTransformation, null_encoding: NullEncoding
    ) -> tuple[StepFunction, ...]:
        """One."""
        return (make_train_step(FlowMatching(self, config.flow, *null_encoding), optimizer, config),)
