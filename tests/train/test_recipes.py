from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.controlnet import ControlNetConfig
from configs.lora import LoraConfig
from sana_jax import UserError
from tests.kernels.shapes import relative_error
from tests.train.tiny_run import QUICKLY, mesh_config, tiny_config
from train.batch import Batch
from train.data import DigitsData
from train.objectives.flow_matching import FlowMatching
from train.optimizers import make_optimizer
from train.recipes import make_recipe
from train.recipes.whole import WholeTransformer
from train.sharding import make_mesh, parameter_paths, parameter_shardings
from train.state import TrainState
from train.state_plan import plan_state
from train.step import make_train_step

KINDS = {"lora": {"lora": LoraConfig(rank=3, alpha=5.0, targets=("all_linear_and_pointwise",))}, "whole": {}}
KEPT = jnp.zeros(8, bool)  # no sample loses its caption
KINDS["controlnet"] = {"controlnet": ControlNetConfig(num_layers=1)}


@pytest.fixture(scope="module")
def base():
    """Random parameters of the tiny network, none of them zero."""
    recipe = make_recipe(tiny_config())
    shapes = jax.eval_shape(lambda: recipe.initialize(jax.random.key(0), None))
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.normal(0, 0.2, leaf.shape), "float32") for leaf in leaves])


@pytest.fixture(scope="module")
def batch() -> Batch:
    data = DigitsData(tiny_config().data)
    latents, embeds, mask = map(jnp.asarray, data.batch(np.arange(8))[:3])
    control = jax.random.normal(jax.random.key(1), latents.shape)
    return Batch(latents, embeds, mask, {"control": control})


def quick(function):
    return jax.jit(function, compiler_options=QUICKLY)


def parts(kind):
    config = tiny_config(**KINDS[kind])
    recipe = make_recipe(config)
    null = map(jnp.asarray, DigitsData(config.data).null_encoding())
    return config, recipe, FlowMatching(recipe, config.flow, *null)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_trained_parameter_has_its_place_on_a_mesh(base, kind):
    _, recipe, _ = parts(kind)
    trained = jax.eval_shape(lambda: recipe.initialize(jax.random.key(0), base))
    shardings, _ = parameter_shardings(trained, recipe.rules, make_mesh(mesh_config()))
    assert parameter_paths(shardings).keys() == parameter_paths(trained).keys()


@pytest.mark.parametrize("kind", list(KINDS))
def test_training_starts_at_the_base_model(base, batch, kind):
    _, recipe, _ = parts(kind)
    trained = recipe.initialize(jax.random.key(0), base)
    timestep = jnp.linspace(1, 999, 8)
    draws = recipe.draw(0, 0, KEPT)
    found = quick(recipe.velocity)(trained, base, batch.latents, timestep, batch, draws)
    expected = quick(WholeTransformer(recipe.transformer).velocity)(base, None, batch.latents, timestep, batch, ())
    assert relative_error(found, expected) <= 1e-6  # two programs, which XLA fuses each in its own way


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_step_changes_what_is_trained_and_nothing_else(base, batch, kind):
    config, recipe, objective = parts(kind)
    plan = plan_state(config, recipe, base, make_mesh(mesh_config()))
    state = plan.initialize.lower(base).compile(QUICKLY)(base)
    before = jax.tree.map(np.array, base)
    step = jax.jit(make_train_step(objective, plan.optimizer, config), compiler_options=QUICKLY)
    frozen = base if recipe.keeps_base else None
    after, metrics = step(state, frozen, batch)
    after, metrics = step(after, frozen, batch)  # the first one's learning rate is small, and zero layers hide others
    assert bool(metrics.finite)
    assert float(metrics.grad_norm) > 0
    moved = [
        path
        for path, leaf in parameter_paths(after.params).items()
        if not np.array_equal(leaf, parameter_paths(state.params)[path])
    ]
    assert len(moved) > 0.5 * len(parameter_paths(state.params))
    assert jax.tree.all(jax.tree.map(np.array_equal, base, before))


def test_a_whole_network_copies_its_base(base):
    recipe = parts("whole")[1]
    trained = recipe.initialize(jax.random.key(0), jax.tree.map(lambda leaf: leaf.astype("bfloat16"), base))
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b.astype("bfloat16")), trained, base))


def test_the_optimizer_of_a_lora_has_no_state_for_the_base(base):
    config, recipe, _ = parts("lora")
    trained = recipe.initialize(jax.random.key(0), base)
    state = make_optimizer(config.optimizer, config.steps, trained).init(trained)
    size = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert size == 2 * sum(leaf.size for leaf in jax.tree.leaves(trained))


def test_dropout_is_drawn_for_each_step_and_off_without_draws(base, batch):
    config = tiny_config(lora=LoraConfig(rank=2, dropout=0.5))
    recipe = make_recipe(config)
    trained = jax.tree.map(lambda leaf: leaf + 0.1, recipe.initialize(jax.random.key(0), base))
    timestep = jnp.full(8, 500.0)

    def velocity(draws):
        return np.asarray(quick(recipe.velocity)(trained, base, batch.latents, timestep, batch, draws))

    first, again, other = (velocity(recipe.draw(0, step, KEPT)) for step in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)
    plain = dataclasses.replace(recipe, config=dataclasses.replace(config.lora, dropout=0.0))
    np.testing.assert_allclose(
        velocity(None),
        quick(plain.velocity)(trained, base, batch.latents, timestep, batch, ()),
        rtol=1e-6,
        atol=1e-6,
    )


def test_a_loss_weight_multiplies_a_samples_loss(base, batch):
    _, _, objective = parts("whole")
    draws = objective.draw(0, 0, batch)
    weights = np.arange(8, dtype=np.float32)
    losses = quick(objective.losses)
    plain = losses(base, None, batch, draws).loss
    weighed = losses(base, None, batch._replace(conditions={"loss_weight": jnp.asarray(weights)}), draws).loss
    np.testing.assert_allclose(weighed, plain * weights, rtol=1e-6)


def test_a_controlnet_that_does_not_fit():
    with pytest.raises(UserError, match=r"--controlnet\.num-layers 2: the base model has 2 blocks; choose 1 to 1"):
        make_recipe(tiny_config(controlnet=ControlNetConfig(num_layers=2)))


def test_the_state_of_a_controlnet_is_its_own(base):
    config, recipe, _ = parts("controlnet")
    state: TrainState = plan_state(config, recipe, base, make_mesh(mesh_config())).initialize(base)
    blocks = parameter_paths(state.params["transformer_blocks"])
    assert {leaf.shape[0] for leaf in blocks.values()} == {1}
    for path, leaf in blocks.items():
        assert np.array_equal(leaf, parameter_paths(base["transformer_blocks"])[path][:1])
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.params["controlnet_blocks"]))
