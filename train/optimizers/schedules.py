"""The learning rate over a run."""

from __future__ import annotations

import optax

from configs.optimizer import OptimizerConfig


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
    """The steps of warm-up in a run of ``steps``: as configured, or a tenth of a run that would end before that.

    A preset can then be tried with a few ``--steps``; whoever starts the run says that the warm-up is shorter.
    """
    return config.warmup_steps if config.warmup_steps < steps else steps // 10


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then constant, or a fall to ``final_learning_rate`` at ``steps``."""
    peak, warmup = config.learning_rate, warmup_steps(config, steps)
    rest = steps - warmup
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.final_learning_rate / peak),
        "linear": lambda: optax.linear_schedule(peak, config.final_learning_rate, rest),
    }[config.schedule]()
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup - 1 or 1), after], [warmup])
