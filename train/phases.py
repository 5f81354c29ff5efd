"""Steps of runs that train several networks in turn: kinds of step, each with an optimizer and a schedule of its own.

``state.params`` is a dictionary of trees. A phase's optimizer updates some of them, its step may replace others, and
the moving average is kept of those that are sampled. ``state.opt_state`` holds each optimizer's state under its phase.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from configs.schema import OptimizerConfig, RunConfig
from kernels.typing import Array, Bool, Int, PyTree
from train.batch import Batch
from train.objectives.base import PhaseLosses
from train.optimizers import evaluation_params, kept, learning_rate_schedule, make_optimizer, stop_frozen, updates_taken
from train.sharding import batch_stays_cut
from train.state import TrainState
from train.step import StepFunction, StepMetrics, accumulate, moving_average, sigma_bins, take_update


@dataclasses.dataclass(frozen=True)
class Phase:
    """One kind of step, but for its losses.

    Attributes:
        name: of its optimizer's state and of its figures.
        parts: names of the trees that its optimizer updates.
        options: of its optimizer.
        steps: how many steps of this kind the run has; its schedule ends there.
    """

    name: str
    parts: tuple[str, ...]
    options: OptimizerConfig
    steps: int


def part(trained: PyTree, names: tuple[str, ...]) -> PyTree:
    """Some of the trees in ``trained``."""
    return {name: trained[name] for name in names}


def steps_of(config: RunConfig, cycle: Sequence[str], name: str) -> int:
    """How many steps of a kind a run has whose kinds follow one another as ``cycle`` says: its share of them, rounded
    up, or more where the last cycle is cut short and begins with them."""
    whole, rest = divmod(config.steps, len(cycle))
    exact = whole * cycle.count(name) + cycle[:rest].count(name)
    return max(exact, -(-config.steps * cycle.count(name) // len(cycle)))


def optimizer_beside(options: OptimizerConfig, learning_rate: float | None) -> OptimizerConfig:
    """The optimizer of a network that is trained beside the main one: whole, at a rate of its own."""
    rate = learning_rate or options.learning_rate
    final = min(options.final_learning_rate, rate)
    whole = {"frozen": (), "trained": (), "learning_rates": (), "no_decay": type(options).no_decay}
    return dataclasses.replace(options, learning_rate=rate, final_learning_rate=final, **whole)


class PhaseOptimizers(NamedTuple):
    """An optimizer for each phase; its state is ``TrainState.opt_state`` under the phase's name."""

    phases: tuple[Phase, ...]
    transformations: Mapping[str, optax.GradientTransformationExtraArgs]

    def init(self, trained: PyTree) -> dict[str, PyTree]:
        """The states of step 0."""
        return {phase.name: self.transformations[phase.name].init(part(trained, phase.parts)) for phase in self.phases}


def make_phase_optimizers(phases: Sequence[Phase], trained: PyTree) -> PhaseOptimizers:
    """The optimizers of a run; schedules count the steps of their own kind.

    Args:
        phases: the kinds of step.
        trained: the dictionary of trees, or its shapes.

    Raises:
        UserError: settings that do not fit the parameters.
    """
    made = {phase.name: make_optimizer(phase.options, phase.steps, part(trained, phase.parts)) for phase in phases}
    return PhaseOptimizers(tuple(phases), made)


class Schedule(NamedTuple):
    """One optimizer of a run: its settings, and how many steps of its kind the run has.

    Attributes:
        name: of the kind of step; None where there is but one.
        parts: names of the trees that it updates; None for all.
        options: of the optimizer.
        steps: of its kind; the learning rate's schedule ends there.
    """

    name: str | None
    parts: tuple[str, ...] | None
    options: OptimizerConfig
    steps: int


def schedules_of(optimizer: Any, config: RunConfig) -> tuple[Schedule, ...]:
    """The optimizers of a run, by what ``Recipe.optimizer`` has made."""
    if not isinstance(optimizer, PhaseOptimizers):
        return (Schedule(None, None, config.optimizer, config.steps),)
    return tuple(Schedule(phase.name, phase.parts, phase.options, phase.steps) for phase in optimizer.phases)


# (trained, frozen, batch, draws, step) -> (losses, what ``replaced`` is given)
PhaseLossFunction = Callable[[PyTree, PyTree, Batch, PyTree, Int[Array, ""]], tuple[PhaseLosses, PyTree]]


def make_phase_step(
    phase: Phase,
    optimizer: optax.GradientTransformationExtraArgs,
    config: RunConfig,
    draw: Callable[[int, Int[Array, ""], Batch], PyTree],
    losses_of: PhaseLossFunction,
    *,
    replaced: Callable[[PyTree, PyTree, Bool[Array, ""]], dict[str, PyTree]] = lambda before, carried, finite: {},
    averaged: tuple[str, ...] = (),
    steps_per_update: int = 1,
) -> StepFunction:
    """The step function ``(state, frozen, batch) -> (state, metrics)`` of a phase.

    Gradients are the mean over the whole batch, whatever the accumulation. A step whose loss or gradient norm is not
    finite leaves parameters, average and optimizer as they were and reports ``finite=False``.

    Args:
        phase: its optimizer updates ``phase.parts``.
        optimizer: of ``make_phase_optimizers``.
        config: the run.
        draw: what is random, from (seed, step, batch).
        losses_of: the losses; what it returns beside them must be empty where the run accumulates.
        replaced: trees of ``state.params`` that the step replaces, from those before it, what ``losses_of`` gave, and
            whether the step counts.
        averaged: trees that the average is kept of and this phase moves; empty where it moves none.
        steps_per_update: steps of the run for one of this phase, by which the average's warm-up counts.
    """
    schedule = learning_rate_schedule(phase.options, phase.steps)

    def step_function(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, StepMetrics]:
        def mean_loss(own, batch, draws):
            trained = {**state.params, **stop_frozen(own, phase.options.frozen, phase.options.trained)}
            rows = batch.latents.shape[0]
            # what a network sees twice, with and without captions, is twice as long
            with batch_stays_cut(rows), batch_stays_cut(2 * rows):
                losses, carried = losses_of(trained, frozen, batch, draws, state.step)
            return losses.loss.mean(), (losses, carried)

        rows = _part_rows((batch, draw(config.seed, state.step, batch)), config.accumulation)
        own, own_state = part(state.params, phase.parts), state.opt_state[phase.name]
        loss, (losses, carried), grads = accumulate(
            jax.value_and_grad(mean_loss, has_aux=True), own, *rows, config.accumulation
        )
        taken = take_update(optimizer, grads, own_state, own, loss)
        others = {name: tree for name, tree in state.params.items() if name not in phase.parts}
        others |= replaced(state.params, carried, taken.finite)
        params = {**others, **taken.params}
        ema = state.ema
        if ema is not None and averaged:
            if phase.options.name == "schedule_free_adamw":
                moved = part(evaluation_params(taken.opt_state, taken.params), averaged)  # which is an average already
            else:
                updates = state.step // steps_per_update
                moved = moving_average(config.ema, ema, part(params, averaged), state.step, updates)
            ema = kept(taken.finite, moved, ema)
        bins = sigma_bins(losses.sigma, config.logging.sigma_bins)
        metrics = StepMetrics(
            loss=loss,
            grad_norm=taken.grad_norm,
            update_norm=taken.update_norm,
            param_norm=optax.tree_utils.tree_norm(taken.params),
            learning_rate=jnp.asarray(schedule(updates_taken(own_state)), jnp.float32),
            finite=taken.finite,
            bin_loss=losses.loss @ bins,
            bin_count=bins.sum(0),
            figures={f"{phase.name}/{name}": values.mean() for name, values in losses.figures.items()},
        )
        opt_state = {**state.opt_state, phase.name: taken.opt_state}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return step_function


def _part_rows(arrays: Any, parts: int) -> Any:
    """Reorders rows so that the parts of ``accumulate``, every ``parts``-th row, are runs of the given order.

    Networks that normalise over runs of samples, as Sprint's heads do, then see the same runs as in the whole batch.
    """
    if parts == 1:
        return arrays

    def reorder(array):
        return array.reshape(parts, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)

    return jax.tree.map(reorder, arrays)
