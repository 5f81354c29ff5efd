"""The steps of Sprint training, one for the student and one for the discriminator, used in turn."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from configs.schema import RunConfig
from configs.sprint import SprintConfig
from kernels.typing import PyTree
from sana_jax.errors import UserError
from train.batch import Batch
from train.objectives.sprint import PhaseLosses, Sprint, vectors_after
from train.optimizers import learning_rate_schedule, make_optimizer, stop_frozen, updates_taken
from train.sharding import batch_stays_cut
from train.state import TrainState
from train.step import StepFunction, StepMetrics, accumulate, ema_decay, sigma_bins

# What each optimizer updates, of the tree of ``train.objectives.sprint``; "vectors" belong to none.
STUDENT, DISCRIMINATOR = ("transformer", "logvar"), ("heads",)


class SprintOptimizers(NamedTuple):
    """An optimizer for each phase; its state is ``TrainState.opt_state`` under the phase's name."""

    generator: optax.GradientTransformation
    discriminator: optax.GradientTransformation | None

    def init(self, trained: PyTree) -> dict[str, PyTree]:
        """The states of step 0."""
        states = {"generator": self.generator.init(part(trained, STUDENT))}
        if self.discriminator is not None:
            states["discriminator"] = self.discriminator.init(part(trained, DISCRIMINATOR))
        return states


def part(trained: PyTree, names: tuple[str, ...]) -> PyTree:
    """Some of the trees in ``trained``."""
    return {name: trained[name] for name in names}


def averaged(trained: PyTree) -> PyTree:
    """What the moving average is kept of: the network that is sampled."""
    return part(trained, ("transformer",))


def phases(config: SprintConfig) -> tuple[str, ...]:
    """The kinds of step, in turn."""
    return ("generator", "discriminator") if config.adversarial else ("generator",)


def phase_steps(config: RunConfig, sprint: SprintConfig) -> int:
    """How many steps of each kind a run has, rounded up."""
    return -(-config.steps // len(phases(sprint)))


def _optimizer_configs(config: RunConfig, sprint: SprintConfig) -> dict[str, Any]:
    """The heads are trained as the student is, whole and at a rate of their own."""
    rate = sprint.discriminator_learning_rate or config.optimizer.learning_rate
    own = {"frozen": (), "trained": (), "learning_rates": (), "no_decay": type(config.optimizer).no_decay}
    final = min(config.optimizer.final_learning_rate, rate)
    return {
        "generator": config.optimizer,
        "discriminator": dataclasses.replace(config.optimizer, learning_rate=rate, final_learning_rate=final, **own),
    }


def make_sprint_optimizers(config: RunConfig, sprint: SprintConfig, trained: PyTree) -> SprintOptimizers:
    """The optimizers of a run; schedules count the steps of their own kind.

    Args:
        config: the run.
        sprint: its Sprint options.
        trained: the tree of ``init_trained``, or its shapes.

    Raises:
        UserError: settings that do not fit the parameters, or a batch that does not fit the heads.
    """
    check_batch_of_heads(sprint, config.batch_size, config.accumulation)
    configs, steps = _optimizer_configs(config, sprint), phase_steps(config, sprint)
    generator = make_optimizer(configs["generator"], steps, part(trained, STUDENT))
    if not sprint.adversarial:
        return SprintOptimizers(generator, None)
    discriminator = make_optimizer(configs["discriminator"], steps, part(trained, DISCRIMINATOR))
    return SprintOptimizers(generator, discriminator)


def check_batch_of_heads(sprint: SprintConfig, batch_size: int, accumulation: int) -> None:
    """Raises ``UserError`` unless the heads' virtual batches divide a batch, and are whole in each part of it."""
    if not sprint.adversarial:
        return
    if sprint.misaligned_pairs and batch_size < 2:
        raise UserError(
            f"--batch-size {batch_size} has no misaligned pairs; take 2 or more, or --sprint.no-misaligned-pairs"
        )
    samples, rows = sprint.virtual_batch, batch_size // accumulation
    if accumulation > 1 and rows % samples:
        raise UserError(
            f"--sprint.virtual-batch {samples} does not divide the {rows} samples of a part (--batch-size {batch_size} "
            f"/ --accumulation {accumulation}), so that accumulation would change what is computed; set it to {rows}, "
            "or accumulate less"
        )
    for count in (rows, 2 * rows) if sprint.misaligned_pairs else (rows,):
        groups = -(-count // samples)
        if count % groups:
            raise UserError(
                f"--sprint.virtual-batch {samples} cuts {count} samples into {groups} unequal virtual batches; take a "
                "--batch-size that it divides"
            )


def make_sprint_steps(sprint: Sprint, optimizers: SprintOptimizers, config: RunConfig) -> tuple[StepFunction, ...]:
    """The step functions ``(state, frozen, batch) -> (state, metrics)``: step number n is made with ``n % len``.

    ``state.params`` is the tree of ``train.objectives.sprint``, ``state.ema`` that of ``averaged``, ``state.opt_state``
    that of ``SprintOptimizers.init``; ``frozen`` is the teacher's parameters. Gradients are the mean over the whole
    batch, whatever the accumulation. A step whose loss or gradient norm is not finite leaves everything as it was and
    reports ``finite=False``.
    """
    settings = _optimizer_configs(config, sprint.config)
    kinds = phases(sprint.config)

    def make(phase: str, names: tuple[str, ...]):
        draw = getattr(sprint, f"draw_{phase}")
        optimizer = getattr(optimizers, phase)
        options = settings[phase]
        schedule = learning_rate_schedule(options, phase_steps(config, sprint.config))

        def losses_of(trained, frozen, batch, draws, step) -> PhaseLosses:
            if phase == "generator":
                return sprint.generator_losses(trained, frozen, batch, draws, step)
            return sprint.discriminator_losses(trained, frozen, batch, draws)

        def step_function(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, StepMetrics]:
            def mean_loss(own, batch, draws):
                trained = {**state.params, **stop_frozen(own, options.frozen, options.trained)}
                rows = batch.latents.shape[0]
                # what the teacher sees twice, with and without captions, is twice as long
                with batch_stays_cut(rows), batch_stays_cut(2 * rows):
                    losses = losses_of(trained, frozen, batch, draws, state.step)
                return losses.loss.mean(), losses

            rows = _part_rows((batch, draw(config.seed, state.step, batch)), config.accumulation)
            own, own_state = part(state.params, names), state.opt_state[phase]
            loss, losses, grads = accumulate(
                jax.value_and_grad(mean_loss, has_aux=True), own, *rows, config.accumulation
            )
            updates, new_state = optimizer.update(grads, own_state, own)
            params = {**state.params, **optax.apply_updates(own, updates)}
            ema = state.ema
            if phase == "discriminator":
                params["vectors"] = vectors_after(state.params)
            elif ema is not None:
                decay = ema_decay(state.step // len(kinds), config.ema.decay, config.ema.warmup)
                ema = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, averaged(params))
            grad_norm = optax.tree_utils.tree_norm(grads)
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            new = TrainState(state.step + 1, params, ema, {**state.opt_state, phase: new_state})
            kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
            bins = sigma_bins(losses.sigma, config.logging.sigma_bins)
            metrics = StepMetrics(
                loss=loss,
                grad_norm=grad_norm,
                update_norm=optax.tree_utils.tree_norm(updates),
                param_norm=optax.tree_utils.tree_norm(part(kept.params, names)),
                learning_rate=jnp.asarray(schedule(updates_taken(own_state)), jnp.float32),
                finite=finite,
                bin_loss=losses.loss @ bins,
                bin_count=bins.sum(0),
                figures={f"{phase}/{name}": values.mean() for name, values in losses.figures.items()},
            )
            return kept._replace(step=new.step), metrics

        return step_function

    return tuple(make(phase, STUDENT if phase == "generator" else DISCRIMINATOR) for phase in kinds)


def _part_rows(arrays: PyTree, parts: int) -> PyTree:
    """Reorders rows so that the parts of ``accumulate``, every ``parts``-th row, are runs of the given order.

    The heads normalise over runs of samples: these are then the same in parts as in the whole batch.
    """
    if parts == 1:
        return arrays

    def reorder(array):
        return array.reshape(parts, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)

    return jax.tree.map(reorder, arrays)
