from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.schema import EmaConfig, OptimizerConfig
from sana_jax import UserError
from tests.train.tiny_run import TinyRun, tiny_config, tiny_run
from train.main import _first_state
from train.optimizers import evaluation_params
from train.phases import Phase, make_phase_optimizers
from train.sharding import make_mesh, parameter_paths
from train.state import parameter_count
from train.state_plan import plan_state


@pytest.fixture(scope="module")
def run() -> TinyRun:
    return tiny_run(tiny_config())


@pytest.fixture(scope="module")
def state(run):
    return run.initialize()


def test_the_state_is_what_was_planned(run, state):
    assert jax.tree.structure(state) == jax.tree.structure(run.plan.abstract)
    for leaf, planned in zip(jax.tree.leaves(state), jax.tree.leaves(run.plan.abstract)):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (planned.shape, planned.dtype, planned.sharding)
    assert int(state.step) == 0
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema))} == {jnp.dtype("float32")}
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.opt_state))


def test_the_average_starts_at_the_parameters_in_buffers_of_its_own(state):
    for own, average in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema)):
        assert np.array_equal(own, average)
        assert own.unsafe_buffer_pointer() != average.unsafe_buffer_pointer()


def test_initialisation_is_a_function_of_the_seed():
    first, again, other = (tiny_run(tiny_config(seed=seed)).initialize().params for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    kernels = [path for path in parameter_paths(first) if path.endswith("kernel")]
    assert not any(np.array_equal(parameter_paths(first)[path], parameter_paths(other)[path]) for path in kernels)


def test_the_average_and_frozen_parameters_cost_no_memory_that_is_not_needed():
    def size(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    with_average, without = (
        tiny_run(tiny_config(ema=EmaConfig(enabled=enabled))).plan.abstract for enabled in (True, False)
    )
    assert size(with_average.ema) == parameter_count(with_average.params)
    assert without.ema is None

    frozen = tiny_run(tiny_config(optimizer=OptimizerConfig(frozen=("transformer_blocks/.*",)))).plan.abstract
    blocks = size(frozen.params["transformer_blocks"])
    scalars = sum(leaf.ndim == 0 for leaf in jax.tree.leaves(frozen.opt_state))
    assert size(frozen.opt_state) == 2 * (parameter_count(frozen.params) - blocks) + scalars


def test_patterns_are_checked_before_anything_is_computed():
    with pytest.raises(UserError, match="matches no parameter"):
        tiny_run(tiny_config(optimizer=OptimizerConfig(frozen=("blocks",))))


class TwoNetworks:
    """What a plan asks of a recipe, for two networks that begin as ones."""

    rules = ((r".*", (None,)),)

    def __init__(self, options: OptimizerConfig):
        self.options = options

    def initialize(self, key, base):
        return {name: {"kernel": jnp.ones(3)} for name in ("transformer", "fake")}

    def averaged(self, trained):
        return {"transformer": trained["transformer"]}

    def optimizer(self, config, trained):
        parts = {"generator": ("transformer",), "critic": ("fake",)}
        return make_phase_optimizers([Phase(name, own, self.options, 9) for name, own in parts.items()], trained)


@pytest.mark.parametrize("name", ["schedule_free_adamw", "prodigy", "adamw"])
@pytest.mark.parametrize("begins", [("transformer",), ("fake",), ("transformer", "fake")])
def test_optimizers_begin_where_other_runs_ended(name, begins):
    """Some remember where the parameters were: schedule-free went back there with its first step."""
    rate = 1.0 if name == "prodigy" else 1e-3
    options = OptimizerConfig(name=name, learning_rate=rate, clip_norm=None)
    config = tiny_config(optimizer=options, ema=EmaConfig())
    plan = plan_state(config, TwoNetworks(options), None, make_mesh(config.mesh))
    other = {"kernel": jnp.asarray([5.0, 6.0, 7.0])}
    start = SimpleNamespace(name="start", weights=lambda abstract: SimpleNamespace(params=other))
    fake = SimpleNamespace(directory="fake", weights=lambda abstract: jax.tree.map(jnp.copy, other))
    chosen = (start if "transformer" in begins else None, fake if "fake" in begins else None)
    state = _first_state(plan, None, None, *chosen, lambda line: None)

    assert jax.tree.structure(state) == jax.tree.structure(plan.abstract)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)  # the step's buffers are donated
    for phase in plan.optimizer.phases:
        (part,) = phase.parts
        own, opt_state = {part: state.params[part]}, state.opt_state[phase.name]
        began = np.asarray(other["kernel"] if part in begins else jnp.ones(3))
        np.testing.assert_array_equal(own[part]["kernel"], began)
        np.testing.assert_allclose(evaluation_params(opt_state, own)[part]["kernel"], began, rtol=1e-6)
        updates, opt_state = plan.optimizer.transformations[phase.name].update(own, opt_state, own, finite=True)
        moved = jax.tree.map(jnp.add, own, updates)
        np.testing.assert_allclose(moved[part]["kernel"], began, atol=2e-3)
        if name == "prodigy":
            np.testing.assert_array_equal(optax.tree_utils.tree_get(opt_state, "params0")[part]["kernel"], began)
