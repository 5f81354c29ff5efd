"""The optimizer of a run as one optax transformation."""

from __future__ import annotations

import jax
import optax

from configs.optimizer import OptimizerConfig, setting
from kernels.typing import Array, Int, PyTree
from train.optimizers import contrib
from train.optimizers.adamw_8bit import scale_by_adam_8bit
from train.optimizers.came import scale_by_came
from train.optimizers.left_out import clip_by_global_norm, keeps_state, scale_by_adam
from train.optimizers.paths import frozen_mask, map_with_names, path_mask, peak_learning_rates
from train.optimizers.schedules import learning_rate_schedule
from train.sharding import parameter_paths


def updates_taken(opt_state: PyTree) -> Int[Array, ""]:
    """How many updates an optimizer of ``make_optimizer`` has made: steps that were left out do not count."""
    (_, count), *_ = optax.tree_utils.tree_get_all_with_path(opt_state, "count")
    return count


def make_optimizer(config: OptimizerConfig, steps: int, params: PyTree) -> optax.GradientTransformationExtraArgs:
    """Clipping over all trained parameters, the optimizer, and no update and no state at all for frozen ones.

    Its ``update`` takes ``finite``, by name: where that is False the state comes back as it was, and the updates are
    not to be used.

    Args:
        config: the settings.
        steps: length of the run, for the schedule.
        params: the parameters, or their shapes.

    Raises:
        UserError: a pattern matches nothing, or everything is frozen.
    """
    frozen = frozen_mask(params, config.frozen, config.trained)
    # The default patterns name kinds of parameters that a given network may not have.
    undecayed = path_mask(params, config.no_decay, "optimizer.no-decay", may_be_absent=OptimizerConfig.no_decay)
    is_undecayed = parameter_paths(undecayed)
    rates = peak_learning_rates(config, params)

    def decayed(tree: PyTree) -> PyTree:
        # of the trained parameters alone: the others are no leaves here
        return map_with_names(lambda path, _: not is_undecayed[path], tree)

    clipped = [clip_by_global_norm(config.clip_norm)] if config.clip_norm is not None else []
    optimizer = optax.chain(*clipped, _updates(config, steps, decayed, rates))
    if not any(jax.tree.leaves(frozen)):
        return optimizer
    labels = jax.tree.map(lambda is_frozen: "frozen" if is_frozen else "trained", frozen)
    return optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def _updates(config: OptimizerConfig, steps: int, decayed, rates: dict[str, float]) -> optax.GradientTransformation:
    """What is added to the parameters; takes ``finite`` as ``make_optimizer`` says."""
    schedule = learning_rate_schedule(config, steps)
    beta1, beta2, epsilon = (setting(config, name) for name in ("beta1", "beta2", "epsilon"))
    if config.name == "prodigy":
        prodigy = contrib.prodigy(
            schedule,
            *(beta1, beta2, config.weight_decay, decayed),
            beta3=config.beta3,
            eps=epsilon,
            estim_lr0=config.prodigy_initial_estimate,
            estim_lr_coef=config.prodigy_coefficient,
            safeguard_warmup=config.prodigy_safeguard_warmup,
        )
        return keeps_state(prodigy)
    # Decoupled weight decay: added to the direction, so that both are scaled by the learning rate.
    parts = [
        scale_by_adam(beta1, beta2, epsilon) if config.name == "adamw" else keeps_state(_direction(config)),
        optax.add_decayed_weights(config.weight_decay, decayed),
        keeps_state(optax.scale_by_learning_rate(schedule)),
    ]
    if config.learning_rates:
        factors = {path: rate / config.learning_rate for path, rate in rates.items()}
        parts.append(optax.stateless(lambda tree, _: map_with_names(lambda path, update: factors[path] * update, tree)))
    optimizer = optax.chain(*parts)
    if config.name == "schedule_free_adamw":
        return keeps_state(contrib.schedule_free(optimizer, schedule, beta1, config.schedule_free_weight_power))
    return optimizer


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """What is added to the parameters, up to the learning rate and its sign."""
    beta1, beta2, beta3, epsilon = (setting(config, name) for name in ("beta1", "beta2", "beta3", "epsilon"))
    if config.name == "schedule_free_adamw":  # Adam without a first moment, which the average replaces
        return optax.scale_by_rms(beta2, epsilon, eps_in_sqrt=False, bias_correction=True)
    if config.name == "lion":
        return optax.scale_by_lion(beta1, beta2)
    if config.name == "muon":
        return contrib.scale_by_muon(
            config.muon_momentum, config.muon_steps, config.muon_update_rms, beta1, beta2, epsilon
        )
    if config.name == "adamw_8bit":
        return scale_by_adam_8bit(
            beta1, beta2, epsilon, setting(config, "block_size"), setting(config, "min_8bit_size")
        )
    epsilons = (config.came_epsilon_gradient, config.came_epsilon_residual)
    eight_bit = (setting(config, "block_size"), setting(config, "min_8bit_size")) if config.name == "came_8bit" else ()
    return scale_by_came((beta1, beta2, beta3), *epsilons, config.came_clip_threshold, *eight_bit)
