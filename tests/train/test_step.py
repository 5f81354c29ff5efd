from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.schema import ComputeConfig, EmaConfig, OptimizerConfig
from sana_jax.diffusion.flow import training_sigmas, training_timesteps
from tests.train.tiny_run import QUICKLY, TinyRun, tiny_config, tiny_run
from train.batch import Batch
from train.optimizers import learning_rate_schedule
from train.step import accumulate, ema_decay, sigma_bins


@pytest.fixture(scope="module")
def run() -> TinyRun:
    return tiny_run(tiny_config())


@pytest.fixture(scope="module")
def step(run):
    """The compiled step; it keeps its arguments, unlike a run's."""
    return jax.jit(run.step_function, compiler_options=QUICKLY)


@pytest.fixture(scope="module")
def state(run):
    return run.initialize()


@pytest.fixture(scope="module")
def batch(run) -> Batch:
    return jax.tree.map(jnp.asarray, next(run.loader))


def same(one, other) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), one, other))


# -- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_squared_error_of_the_velocity(run, step, state, batch):
    draws = jax.tree.map(np.asarray, run.objective.draw(run.config.seed, state.step, batch))
    shift = run.config.flow.flow_shift
    sigma = training_sigmas(shift).astype(np.float32)[draws.index]
    timestep = training_timesteps(shift)[draws.index].astype(np.float32) * run.config.transformer.timestep_scale
    x0, noise = np.asarray(batch.latents), draws.noise
    level = sigma[:, None, None, None]
    noisy = (1 - level) * x0 + level * noise
    embeds, mask = np.array(batch.prompt_embeds), np.array(batch.prompt_attention_mask)
    embeds[draws.drop_caption] = run.objective.null_embeds[0]
    mask[draws.drop_caption] = run.objective.null_mask[0]
    network = jax.jit(run.objective.recipe.transformer.apply, compiler_options=QUICKLY)
    velocity = network({"params": state.params}, noisy, embeds, timestep, encoder_attention_mask=mask)
    per_sample = np.square(np.asarray(velocity, np.float64) - (noise.astype(np.float64) - x0)).mean((1, 2, 3))
    _, metrics = step(state, batch)
    assert float(metrics.loss) == pytest.approx(per_sample.mean(), rel=2e-6)

    quarter = np.minimum((sigma * 4).astype(int), 3)
    np.testing.assert_allclose(metrics.bin_loss, np.bincount(quarter, per_sample, 4), rtol=5e-6)
    assert np.array_equal(metrics.bin_count, np.bincount(quarter, minlength=4))


def test_sigma_bins():
    bins = sigma_bins(jnp.asarray([0.0, 0.249, 0.25, 0.999, 1.0]), 4)
    assert bins.argmax(1).tolist() == [0, 0, 1, 3, 3]
    assert bins.sum() == 5


# -- accumulation ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gradients(run, state, batch):
    """(loss, per-sample losses, gradients) of the whole batch and of four parts."""
    objective = run.objective
    draws = objective.draw(0, 0, batch)

    def mean_loss(params, batch, draws):
        losses = objective.losses(params, None, batch, draws)
        return losses.loss.mean(), losses

    value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)

    def in_parts(parts):
        return jax.jit(lambda params: accumulate(value_and_grad, params, batch, draws, parts), compiler_options=QUICKLY)

    return [in_parts(parts)(state.params) for parts in (1, 4)]


def test_accumulation_changes_nothing_but_rounding(gradients):
    (expected_loss, expected_losses, expected), (loss, losses, grads) = gradients
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    np.testing.assert_allclose(losses.loss, expected_losses.loss, rtol=2e-6)
    assert np.array_equal(losses.sigma, expected_losses.sigma)
    for (path, grad), reference in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected)):
        scale = float(jnp.abs(reference).max())
        assert float(jnp.abs(grad - reference).max()) <= 5e-6 * scale, path


# -- randomness ------------------------------------------------------------------------------------------------------


def test_a_step_is_a_function_of_seed_and_step(step, state, batch):
    first, metrics = step(state, batch)
    again, same_metrics = step(state, batch)
    assert same(first, again)
    assert same(metrics, same_metrics)
    _, later = step(state._replace(step=state.step + 1), batch)
    assert float(later.loss) != float(metrics.loss)


# -- average ---------------------------------------------------------------------------------------------------------


def test_decay_rises_to_its_value():
    assert float(ema_decay(0, 0.999, True)) == pytest.approx(0.1)
    assert float(ema_decay(8, 0.999, True)) == pytest.approx(0.5)
    assert float(ema_decay(10**6, 0.999, True)) == pytest.approx(0.999)
    assert float(ema_decay(0, 0.999, False)) == pytest.approx(0.999)


def test_the_average_follows_its_formula(step, state, batch):
    expected = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    now = state
    for count in range(3):
        now, _ = step(now, batch)
        decay = min(0.9, (1 + count) / (10 + count))
        expected = jax.tree.map(
            lambda old, new, d=decay: d * old + (1 - d) * np.asarray(new, np.float64), expected, now.params
        )
    for average, reference in zip(jax.tree.leaves(now.ema), jax.tree.leaves(expected)):
        np.testing.assert_allclose(average, reference, rtol=1e-5, atol=1e-7)


def test_a_run_without_average(batch):
    run = tiny_run(tiny_config(ema=EmaConfig(enabled=False)))
    state = run.initialize()
    assert state.ema is None
    after = jax.eval_shape(run.step_function, state, batch)[0]
    assert after.ema is None


# -- steps that are not finite ---------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_left_out(run, step, state, batch):
    before, _ = step(state, batch)
    poisoned = batch._replace(latents=batch.latents.at[3, 2, 1].set(jnp.nan))
    after, metrics = step(before, poisoned)
    assert not metrics.finite
    assert int(after.step) == int(before.step) + 1
    assert same(after._replace(step=before.step), before)
    assert np.isfinite(metrics.param_norm)

    # the next one goes on, at the learning rate that the optimizer really uses: it has made one update so far
    _, metrics = step(after, batch)
    assert metrics.finite
    schedule = learning_rate_schedule(run.config.optimizer, run.config.steps)
    assert float(metrics.learning_rate) == pytest.approx(float(schedule(1)))
    assert optax.tree_utils.tree_get(after.opt_state, "mu") is not None


def test_the_first_step_moves_by_the_first_learning_rate(run, step, state, batch):
    after, metrics = step(state, batch)
    rate = float(metrics.learning_rate)
    assert rate == pytest.approx(run.config.optimizer.learning_rate / 2)  # a warm-up of two steps
    kernel = "proj_out", "kernel"
    old, new = (tree[kernel[0]][kernel[1]] for tree in (state.params, after.params))
    decay = run.config.optimizer.weight_decay
    moved = np.asarray(new - old * (1 - rate * decay))
    np.testing.assert_allclose(np.abs(moved), rate, rtol=2e-3)  # Adam's first update is the sign of the gradient


# -- frozen parameters and precision ---------------------------------------------------------------------------------


def test_frozen_parameters_stay(batch):
    optimizer = OptimizerConfig(learning_rate=1e-3, frozen=("(?!proj_out/).*",), weight_decay=0.1)
    run = tiny_run(tiny_config(optimizer=optimizer))
    state = run.initialize()
    after, metrics = jax.jit(run.step_function, compiler_options=QUICKLY)(state, batch)
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(after.params)):
        assert np.array_equal(old, new) != (path[0].key == "proj_out"), path

    def loss_of(head):
        draws = run.objective.draw(0, 0, batch)
        return run.objective.losses({**state.params, "proj_out": head}, None, batch, draws).loss.mean()

    trained = optax.tree_utils.tree_norm(jax.jit(jax.grad(loss_of))(state.params["proj_out"]))
    assert float(metrics.grad_norm) == pytest.approx(float(trained), rel=1e-5)  # of what is trained


def test_half_precision_keeps_parameters_and_losses_in_full(run, step, state, batch):
    config = tiny_config(compute=ComputeConfig(dtype="bfloat16", remat="dots"))
    half = tiny_run(config)
    after, metrics = jax.jit(half.step_function, compiler_options=QUICKLY)(state, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves((after.params, after.ema))} == {jnp.dtype("float32")}
    assert metrics.finite
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(after))
    assert metrics.loss.dtype == jnp.float32
    _, full = step(state, batch)
    # bfloat16 has 8 bits: a relative rounding of 2^-9 in each of a few dozen operations
    assert float(metrics.loss) == pytest.approx(float(full.loss), rel=0.01)
    assert float(metrics.loss) != float(full.loss)


def test_the_state_is_donated(run, batch):
    compiled = run.compiled_step()
    state = run.initialize()
    leaf = state.params["proj_out"]["kernel"]
    compiled(state, jax.device_put(batch, jax.tree.leaves(run.next_batch())[0].sharding))
    assert leaf.is_deleted()
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(
        leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.ndim
    )
