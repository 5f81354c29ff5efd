"""The training state: parameters, their average, the optimizer's memory and the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from configs.schema import RunConfig
from kernels.typing import Array, Int, PyTree
from train.optimizers import make_optimizer, state_shardings
from train.randomness import stream
from train.recipes.base import Recipe
from train.sharding import parameter_shardings, replicated


class TrainState(NamedTuple):
    """What a step reads and returns; the step counts optimizer steps, those left out included."""

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree | None
    opt_state: PyTree


class StatePlan(NamedTuple):
    """How a run's state is made and where it lies, before any of it exists."""

    optimizer: optax.GradientTransformation
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
    optimizer = make_optimizer(config.optimizer, config.steps, abstract_params)

    def init_state(base: PyTree | None) -> TrainState:
        params = initial_params(base)
        # A copy, because the step's buffers are donated and two trees must not share one.
        ema = jax.tree.map(jnp.copy, params) if config.ema.enabled else None
        return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))

    of_params, whole = parameter_shardings(abstract_params, recipe.rules, mesh)
    abstract = jax.eval_shape(init_state, base)
    shardings = TrainState(
        step=replicated(mesh),
        params=of_params,
        ema=of_params if config.ema.enabled else None,
        opt_state=state_shardings(abstract.opt_state, of_params, mesh),
    )
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )
    return StatePlan(optimizer, abstract, jax.jit(init_state, out_shardings=shardings), whole)


def parameter_count(params: PyTree) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def sampled_params(state: TrainState) -> PyTree:
    """The parameters that pictures are drawn with: the average, where the run keeps one."""
    return state.params if state.ema is None else state.ema
