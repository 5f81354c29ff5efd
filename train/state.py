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
from sana_jax.models.sana import SanaTransformer, init_params
from sana_jax.models.sharding_rules import Rule
from train.optimizers import make_optimizer
from train.randomness import stream
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
    initialize: Callable[[], TrainState]
    """Makes the state of step 0, each part directly on its devices."""
    whole: list[str]
    """Parameters that stay whole along an axis that does not divide them."""


def plan_state(config: RunConfig, transformer: SanaTransformer, rules: tuple[Rule, ...], mesh: Mesh) -> StatePlan:
    """Lays out the state of a run over a mesh.

    Raises:
        UserError: optimizer settings that do not fit the parameters.
    """

    def initial_params() -> PyTree:
        return init_params(transformer, stream(config.seed, 0, "parameters"))

    abstract_params = jax.eval_shape(initial_params)
    optimizer = make_optimizer(config.optimizer, config.steps, abstract_params)

    def init_state() -> TrainState:
        params = initial_params()
        # A copy, because the step's buffers are donated and two trees must not share one.
        ema = jax.tree.map(jnp.copy, params) if config.ema.enabled else None
        return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))

    everywhere = replicated(mesh)
    of_params, whole = parameter_shardings(abstract_params, rules, mesh)
    abstract = jax.eval_shape(init_state)
    shardings = TrainState(
        step=everywhere,
        params=of_params,
        ema=of_params if config.ema.enabled else None,
        opt_state=optax.tree_utils.tree_map_params(
            optimizer,
            # a frozen parameter has a MaskedNode, which is no leaf, in the place of its moments
            lambda leaf, sharding: leaf if _is_masked(leaf) else sharding,
            abstract.opt_state,
            of_params,
            transform_non_params=lambda _: everywhere,
            is_leaf=_is_masked,
        ),
    )
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )
    return StatePlan(optimizer, abstract, jax.jit(init_state, out_shardings=shardings), whole)


def _is_masked(leaf) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def parameter_count(params: PyTree) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
