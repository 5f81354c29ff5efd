"""Optimizers as optax chains, with what is trained and decayed chosen by path patterns."""

from __future__ import annotations

import re

import jax
import optax

from configs.schema import OptimizerConfig
from kernels.typing import Array, Int, PyTree
from sana_jax.errors import UserError
from train.sharding import parameter_paths, path_name


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


def path_mask(params: PyTree, patterns: tuple[str, ...], option: str, may_be_absent: tuple[str, ...] = ()) -> PyTree:
    """True for every parameter whose whole path matches one of the patterns.

    Raises:
        UserError: a pattern that is not a regular expression, or that matches nothing and is not in ``may_be_absent``.
    """
    paths = parameter_paths(params)
    for pattern in patterns:
        try:
            matched = any(re.fullmatch(pattern, path) for path in paths)
        except re.error as error:
            raise UserError(f"--{option} {pattern!r} is not a regular expression: {error}; mend it") from error
        if not matched and pattern not in may_be_absent:
            raise UserError(
                f"--{option} {pattern!r} matches no parameter; paths look like {', '.join(list(paths)[:3])}: patterns "
                "must match a whole path, so begin with .* to match an ending"
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(re.fullmatch(pattern, path_name(path)) for pattern in patterns), params
    )


def stop_frozen(params: PyTree, frozen: tuple[str, ...]) -> PyTree:
    """The same parameters, without gradients for those that are frozen: none is computed, none counts in the norm."""
    if not frozen:
        return params
    mask = path_mask(params, frozen, "optimizer.frozen")
    return jax.tree.map(lambda leaf, stop: jax.lax.stop_gradient(leaf) if stop else leaf, params, mask)


def updates_taken(opt_state: PyTree) -> Int[Array, ""]:
    """How many updates an optimizer of ``make_optimizer`` has made: steps that were left out do not count."""
    (_, count), *_ = optax.tree_utils.tree_get_all_with_path(opt_state, "count")
    return count


def make_optimizer(config: OptimizerConfig, steps: int, params: PyTree) -> optax.GradientTransformation:
    """Clipping over all trained parameters, AdamW, and no update and no state at all for frozen ones.

    Raises:
        UserError: a pattern matches nothing, or everything is frozen.
    """
    frozen = path_mask(params, config.frozen, "optimizer.frozen")
    if all(jax.tree.leaves(frozen)):
        raise UserError(f"--optimizer.frozen {' '.join(config.frozen)} leaves nothing to train; freeze less")
    # The default patterns name kinds of parameters that a given network may not have.
    undecayed = path_mask(params, config.no_decay, "optimizer.no-decay", may_be_absent=OptimizerConfig.no_decay)
    decayed = jax.tree.map(lambda undecay: not undecay, undecayed)

    steps_of = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm is not None else []
    steps_of.append(
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            # masks see the trained parameters alone, as a function of their tree
            mask=lambda tree: jax.tree.map(
                lambda leaf, decay: decay, tree, decayed, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
            ),
        )
    )
    optimizer = optax.chain(*steps_of)
    if not any(jax.tree.leaves(frozen)):
        return optimizer
    labels = jax.tree.map(lambda is_frozen: "frozen" if is_frozen else "trained", frozen)
    return optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)
