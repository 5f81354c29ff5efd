from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.schema import EmaConfig, OptimizerConfig
from sana_jax import UserError
from tests.train.tiny_run import TinyRun, tiny_config, tiny_run
from train.sharding import parameter_paths
from train.state import parameter_count


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
