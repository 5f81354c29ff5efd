"""The steps of Sprint training, one for the student and one for the discriminator, used in turn."""

from __future__ import annotations

from configs.schema import RunConfig
from configs.sprint import SprintConfig
from kernels.typing import PyTree
from sana_jax.errors import UserError
from train.objectives.sprint import Sprint, vectors_after
from train.optimizers import kept
from train.phases import (
    Phase,
    PhaseOptimizers,
    make_phase_optimizers,
    make_phase_step,
    optimizer_beside,
    part,
    steps_of,
)
from train.step import StepFunction

# What each optimizer updates, of the tree of ``train.objectives.sprint``; "vectors" belong to none.
STUDENT, DISCRIMINATOR = ("transformer", "logvar"), ("heads",)
# What the moving average is kept of: the network that is sampled.
AVERAGED = ("transformer",)


def averaged(trained: PyTree) -> PyTree:
    """What the moving average is kept of."""
    return part(trained, AVERAGED)


def cycle(config: SprintConfig) -> tuple[str, ...]:
    """The kinds of step, in turn."""
    return ("generator", "discriminator") if config.adversarial else ("generator",)


def make_sprint_optimizers(config: RunConfig, sprint: SprintConfig, trained: PyTree) -> PhaseOptimizers:
    """The optimizers of a run; schedules count the steps of their own kind.

    Args:
        config: the run.
        sprint: its Sprint options.
        trained: the tree of ``init_trained``, or its shapes.

    Raises:
        UserError: settings that do not fit the parameters, or a batch that does not fit the heads.
    """
    check_batch_of_heads(sprint, config.batch_size, config.accumulation)
    kinds = cycle(sprint)
    # the heads are trained as the student is, whole and at a rate of their own
    beside = optimizer_beside(config.optimizer, sprint.discriminator_learning_rate)
    choices = {"generator": (STUDENT, config.optimizer), "discriminator": (DISCRIMINATOR, beside)}
    return make_phase_optimizers(
        [Phase(name, *choices[name], steps_of(config, kinds, name)) for name in kinds], trained
    )


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


def make_sprint_steps(sprint: Sprint, optimizers: PhaseOptimizers, config: RunConfig) -> tuple[StepFunction, ...]:
    """The step functions ``(state, frozen, batch) -> (state, metrics)``: step number n is made with ``n % len``.

    ``state.params`` is the tree of ``train.objectives.sprint``, ``state.ema`` that of ``averaged``, ``state.opt_state``
    that of ``PhaseOptimizers.init``; ``frozen`` is the teacher's parameters. See ``make_phase_step``.
    """
    kinds = cycle(sprint.config)

    def generator(trained, frozen, batch, draws, step):
        return sprint.generator_losses(trained, frozen, batch, draws, step), ()

    def discriminator(trained, frozen, batch, draws, step):
        return sprint.discriminator_losses(trained, frozen, batch, draws), ()

    def vectors(before, carried, finite):
        return {"vectors": kept(finite, vectors_after(before), before["vectors"])}

    special = {
        "generator": (sprint.draw_generator, generator, {"averaged": AVERAGED, "steps_per_update": len(kinds)}),
        "discriminator": (sprint.draw_discriminator, discriminator, {"replaced": vectors}),
    }

    def make(phase: Phase) -> StepFunction:
        draw, losses_of, more = special[phase.name]
        return make_phase_step(phase, optimizers.transformations[phase.name], config, draw, losses_of, **more)

    return tuple(make(phase) for phase in optimizers.phases)
