"""A step that does not count leaves every optimizer's state as it was; Adam and clipping are optax's."""

from __future__ import annotations

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.optimizer import OptimizerConfig
from tests.train.digits_problem import quickly
from train.optimizers import make_optimizer
from train.optimizers.left_out import clip_by_global_norm, scale_by_adam

SHAPES = {"blocks": {"kernel": (2, 8, 12), "bias": (2, 12)}, "head": {"kernel": (12, 3)}}


def normal(seed: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


@pytest.mark.parametrize("name", typing.get_args(typing.get_type_hints(OptimizerConfig)["name"]))
def test_a_step_that_does_not_count(name):
    config = dataclasses.replace(OptimizerConfig(), name=name, learning_rate=0.1, warmup_steps=0)
    params = normal(0)
    optimizer = make_optimizer(config, 10, params)

    def steps():
        _, state = optimizer.update(normal(1), optimizer.init(params), params, finite=jnp.bool_(True))
        bad = jax.tree.map(lambda grad: grad * jnp.nan, normal(2))
        _, kept = optimizer.update(bad, state, params, finite=jnp.bool_(False))
        _, moved = optimizer.update(normal(2), state, params, finite=jnp.bool_(True))
        return state, kept, moved

    state, kept, moved = quickly(steps)
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    changed = jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), moved, state))
    assert any(changed)


def test_adam_is_that_of_optax():
    ours, theirs = scale_by_adam(0.9, 0.95, 1e-6), optax.scale_by_adam(0.9, 0.95, 1e-6)
    states = [adam.init(normal(0)) for adam in (ours, theirs)]
    for step in range(3):
        found = [adam.update(normal(step, 1e-3), state) for adam, state in zip((ours, theirs), states)]
        states = [state for _, state in found]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), *found)


@pytest.mark.parametrize("largest", [0.5, 1e3])
def test_clipping_is_that_of_optax(largest):
    grads = normal(3)
    found = [
        clip(largest).update(grads, optax.EmptyState())[0] for clip in (clip_by_global_norm, optax.clip_by_global_norm)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *found)
    clipped = bool((found[0]["head"]["kernel"] != grads["head"]["kernel"]).any())
    assert clipped == (largest < 1)
