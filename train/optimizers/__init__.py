"""Optimizers as optax chains: what is trained and decayed, and at which rate, is chosen by path patterns."""

from __future__ import annotations

from train.optimizers.build import make_optimizer, updates_taken
from train.optimizers.contrib import evaluation_params
from train.optimizers.left_out import kept
from train.optimizers.memory import state_bytes
from train.optimizers.paths import frozen_mask, path_mask, peak_learning_rates, stop_frozen
from train.optimizers.schedules import learning_rate_schedule, warmup_steps
from train.optimizers.sharding import state_shardings

__all__ = [
    "evaluation_params",
    "frozen_mask",
    "kept",
    "learning_rate_schedule",
    "make_optimizer",
    "path_mask",
    "peak_learning_rates",
    "state_bytes",
    "state_shardings",
    "stop_frozen",
    "updates_taken",
    "warmup_steps",
]
