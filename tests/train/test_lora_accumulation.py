"""A LoRA's gradient in parts is that of the whole batch, dropout included."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.lora import LoraConfig
from tests.train.tiny_run import QUICKLY, tiny_config
from train.batch import Batch
from train.data import DigitsData
from train.objectives.flow_matching import FlowMatching
from train.recipes import make_recipe
from train.sharding import parameter_paths
from train.step import accumulate

ROWS = 8


@pytest.mark.prove
def test_accumulation_changes_a_loras_gradient_by_rounding_alone():
    config = tiny_config(lora=LoraConfig(rank=3, alpha=5.0, dropout=0.2))
    network = dataclasses.replace(config.transformer, num_layers=1)
    recipe = make_recipe(dataclasses.replace(config, transformer=network))
    whole = make_recipe(dataclasses.replace(config, transformer=network, lora=None))
    data = DigitsData(config.data)
    objective = FlowMatching(recipe, config.flow, *map(jnp.asarray, data.null_encoding()))
    batch = Batch(*map(jnp.asarray, data.batch(np.arange(ROWS))[:3]), {"loss_weight": jnp.linspace(0.5, 2, ROWS)})
    rng = np.random.default_rng(0)

    def normal(shapes):
        return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), shapes)

    base = normal(jax.eval_shape(lambda: whole.initialize(jax.random.key(0), None)))
    trained = normal(jax.eval_shape(lambda base: recipe.initialize(jax.random.key(0), base), base))
    draws = objective.draw(0, 3, batch)

    def mean_loss(trained, batch, draws):
        losses = objective.losses(trained, base, batch, draws)
        return losses.loss.mean(), losses

    def run(parts):
        value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)
        function = lambda trained: accumulate(value_and_grad, trained, batch, draws, parts)  # noqa: E731
        return jax.jit(function, compiler_options=QUICKLY)(trained)

    (loss, losses, expected), (found_loss, found_losses, found) = run(1), run(4)
    np.testing.assert_allclose(found_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(found_losses.loss, losses.loss, rtol=1e-5)
    for path, leaf in parameter_paths(expected).items():
        assert np.abs(leaf).max() > 0, path
        np.testing.assert_allclose(parameter_paths(found)[path], leaf, atol=1e-5 * np.abs(leaf).max(), err_msg=path)
