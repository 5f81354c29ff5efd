"""One optimizer step as a pure function of (state, batch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from configs.schema import EmaConfig, RunConfig
from kernels.typing import Array, Bool, Float, Int, PyTree
from train.batch import Batch
from train.objectives.base import Objective
from train.optimizers import evaluation_params, kept, learning_rate_schedule, stop_frozen, updates_taken
from train.sharding import batch_stays_cut
from train.state import TrainState

# A dictionary for JAX's sake, as ``batch.NO_CONDITIONS``.
NO_FIGURES: Mapping[str, Array] = {}


class StepMetrics(NamedTuple):
    """What a step reports; device arrays, read when a row is written."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    update_norm: Float[Array, ""]
    param_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    finite: Bool[Array, ""]
    bin_loss: Float[Array, " K"]
    """Sum of the samples' losses by bin of noise level."""
    bin_count: Float[Array, " K"]
    """Samples in each bin."""
    figures: Mapping[str, Float[Array, ""]] = NO_FIGURES
    """Means over the batch of what the loss consists of, by name."""


StepFunction = Callable[[TrainState, PyTree, Batch], tuple[TrainState, StepMetrics]]


def make_train_step(
    objective: Objective, optimizer: optax.GradientTransformationExtraArgs, config: RunConfig
) -> StepFunction:
    """The step function ``(state, frozen, batch) -> (state, metrics)``; jit it with the state donated.

    Gradients are the mean over the whole batch, whatever the accumulation. A step whose loss or gradient norm is not
    finite leaves parameters, average and optimizer as they were and reports ``finite=False``.
    """
    schedule = learning_rate_schedule(config.optimizer, config.steps)

    def train_step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, StepMetrics]:
        def mean_loss(params, batch, draws):
            params = stop_frozen(params, config.optimizer.frozen, config.optimizer.trained)
            with batch_stays_cut(batch.latents.shape[0]):
                losses = objective.losses(params, frozen, batch, draws)
            return losses.loss.mean(), losses

        draws = objective.draw(config.seed, state.step, batch)
        loss, losses, grads = accumulate(
            jax.value_and_grad(mean_loss, has_aux=True), state.params, batch, draws, config.accumulation
        )
        taken = take_update(optimizer, grads, state.opt_state, state.params, loss)
        ema = state.ema
        if ema is not None and config.optimizer.name == "schedule_free_adamw":
            ema = evaluation_params(taken.opt_state, taken.params)  # which is an average already
        elif ema is not None:
            ema = moving_average(config.ema, ema, taken.params, state.step, state.step)
        ema = kept(taken.finite, ema, state.ema)
        bins = sigma_bins(losses.sigma, config.logging.sigma_bins)
        metrics = StepMetrics(
            loss=loss,
            grad_norm=taken.grad_norm,
            update_norm=taken.update_norm,
            param_norm=optax.tree_utils.tree_norm(taken.params),
            learning_rate=jnp.asarray(schedule(updates_taken(state.opt_state)), jnp.float32),
            finite=taken.finite,
            bin_loss=losses.loss @ bins,
            bin_count=bins.sum(0),
        )
        return TrainState(state.step + 1, taken.params, ema, taken.opt_state), metrics

    return train_step


class Taken(NamedTuple):
    """What an update leaves.

    Attributes:
        params: the parameters.
        opt_state: the optimizer's state.
        finite: whether the step counts.
        grad_norm: of the gradients.
        update_norm: of what was added to the parameters.
    """

    params: PyTree
    opt_state: PyTree
    finite: Bool[Array, ""]
    grad_norm: Float[Array, ""]
    update_norm: Float[Array, ""]


def take_update(
    optimizer: optax.GradientTransformationExtraArgs,
    grads: PyTree,
    opt_state: PyTree,
    params: PyTree,
    loss: Float[Array, ""],
) -> Taken:
    """Adds the optimizer's updates to the parameters, where loss, gradients and updates are finite.

    With a loss or gradients that are not, parameters and state stay as they were; with updates that are not, the
    parameters do. What is added waits for the updates' norm: XLA's CPU backend would otherwise copy the parameters, to
    have them for that norm once they are overwritten.
    """
    grad_norm = optax.tree_utils.tree_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, opt_state, params, finite=finite)
    update_norm = optax.tree_utils.tree_norm(updates)
    finite = finite & jnp.isfinite(update_norm)
    updates = jax.tree.map(lambda update: jnp.where(finite, update, 0), updates)
    return Taken(optax.apply_updates(params, updates), opt_state, finite, grad_norm, update_norm)


def accumulate(
    value_and_grad: Callable, params: PyTree, batch: Batch, draws: PyTree, parts: int
) -> tuple[Float[Array, ""], PyTree, PyTree]:
    """Loss, per-sample losses (in the batch's order) and gradient, computed in ``parts`` parts one after the other.

    Part p takes the rows p, p + parts, ...: every device then finds its share of each part among its own rows.
    """
    if parts == 1:
        (loss, losses), grads = value_and_grad(params, batch, draws)
        return loss, losses, grads

    def split(array):
        return array.reshape(array.shape[0] // parts, parts, *array.shape[1:]).swapaxes(0, 1)

    def body(total, part):
        (loss, losses), grads = value_and_grad(params, *part)
        return jax.tree.map(jnp.add, total, (loss, grads)), losses

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    (loss, grads), losses = jax.lax.scan(body, zeros, jax.tree.map(split, (batch, draws)))
    loss, grads = jax.tree.map(lambda total: total / parts, (loss, grads))
    return loss, jax.tree.map(lambda array: array.swapaxes(0, 1).reshape(-1), losses), grads


def moving_average(
    config: EmaConfig, average: PyTree, params: PyTree, step: Int[Array, ""], updates: Int[Array, ""]
) -> PyTree:
    """The average after an update of the parameters.

    Args:
        config: decay, warm-up, and the step from which there is an average; until then it is the parameters.
        average: before the update.
        params: after it.
        step: of the run, before it.
        updates: of these parameters, before it; the warm-up counts them.
    """
    decay = ema_decay(updates, config.decay, config.warmup)
    if config.start:
        decay = jnp.where(step < config.start, 0.0, decay)
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), average, params)


def ema_decay(step: int | Int[Array, ""], decay: float, warmup: bool) -> Float[Array, ""]:
    """The average's decay at a step."""
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1 + step) / (10 + step)) if warmup else jnp.float32(decay)


def sigma_bins(sigma: Float[Array, " B"], bins: int) -> Float[Array, "B K"]:
    """One-hot membership of equal bins of [0, 1]."""
    return jax.nn.one_hot(jnp.clip(jnp.floor(sigma * bins), 0, bins - 1).astype(jnp.int32), bins)
