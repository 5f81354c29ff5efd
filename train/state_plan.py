"""How a run's state is made and where it lies, before any of it exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from configs.schema import RunConfig
from kernels.typing import PyTree
from train.optimizers import state_shardings
from train.randomness import stream
from train.recipes.base import Recipe
from train.sharding import parameter_shardings, replicated
from train.state import TrainState


class StatePlan(NamedTuple):
    """A run's state as shapes, and how it is made."""

    optimizer: Any
    abstract: TrainState
    """ShapeDtypeStructs with shardings."""
    initialize: Callable[[PyTree | None], TrainState]
    """Makes the state of step 0 from the base model's parameters, each part directly on its devices; jitted."""
    whole: list[str]
    """Parameters that stay whole along an axis that does not divide them."""


def plan_state(config: RunConfig, recipe: Recipe, base: PyTree | None, mesh: Mesh) -> StatePlan:
    """Lays out the state of a run over a mesh.

    Args:
        config: the run.
        recipe: what it trains.
        base: the base model's parameters as shapes with shardings; None without one.
        mesh: the devices.

    Raises:
        UserError: optimizer settings that do not fit the parameters.
    """

    def initial_params(base: PyTree | None) -> PyTree:
        return recipe.initialize(stream(config.seed, 0, "parameters"), base)

    abstract_params = jax.eval_shape(initial_params, base)
    optimizer = recipe.optimizer(config, abstract_params)

    def init_state(base: PyTree | None) -> TrainState:
        params = initial_params(base)
        # A copy, because the step's buffers are donated and two trees must not share one.
        ema = jax.tree.map(jnp.copy, recipe.averaged(params)) if config.ema.enabled else None
        return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))

    of_params, whole = parameter_shardings(abstract_params, recipe.rules, mesh)
    abstract = jax.eval_shape(init_state, base)
    shardings = TrainState(
        step=replicated(mesh),
        params=of_params,
        ema=recipe.averaged(of_params) if config.ema.enabled else None,
        opt_state=state_shardings(abstract.opt_state, of_params, mesh),
    )
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )
    return StatePlan(optimizer, abstract, jax.jit(init_state, out_shardings=shardings), whole)
