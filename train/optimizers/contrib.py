"""Optimizers of ``optax.contrib``, fitted to stacked parameters, masks of weight decay and learning rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from kernels.typing import Array, PyTree
from train.optimizers.paths import map_with_names, parameter_layout
from train.sharding import parameter_paths

_IN_OUT = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


def scale_by_muon(
    momentum: float, steps: int, update_rms: float | None, beta1: float, beta2: float, epsilon: float
) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for matrices, each layer orthogonalised on its own; Adam for all other parameters.

    Args:
        momentum: decay of the matrices' (Nesterov) momentum.
        steps: Newton-Schulz iterations.
        update_rms: root mean square of a matrix's update, reached where the update is exactly orthogonal; None scales
            by sqrt(max(1, out / in)).
        beta1: Adam's.
        beta2: Adam's.
        epsilon: Adam's, and added to the norm of the matrices' momentum.
    """

    def labels(params: PyTree) -> PyTree:
        return map_with_names(
            lambda path, leaf: "matrix" if parameter_layout(path, leaf.shape).is_matrix else "other", params
        )

    def by_shape(update: Array) -> Array:
        inputs, outputs = update.shape[-2:]
        factor = max(1.0, outputs / inputs) if update_rms is None else update_rms**2 * max(inputs, outputs)
        return update * factor**0.5

    orthogonalized = optax.contrib.scale_by_muon(
        ns_steps=steps,
        beta=momentum,
        eps=epsilon,
        weight_dimension_numbers=lambda updates: jax.tree.map(lambda _: _IN_OUT, updates),
    )
    matrices = optax.chain(orthogonalized, optax.stateless(lambda updates, _: jax.tree.map(by_shape, updates)))
    return optax.multi_transform({"matrix": matrices, "other": optax.scale_by_adam(beta1, beta2, epsilon)}, labels)


def prodigy(
    schedule: optax.Schedule, beta1: float, beta2: float, weight_decay: float, decay_mask: Callable, **settings: Any
) -> optax.GradientTransformation:
    """Prodigy (arXiv 2306.06101), with weight decay only where the mask says so; ``settings`` are optax's own."""
    inner = optax.contrib.prodigy(schedule, betas=(beta1, beta2), weight_decay=0.0, **settings)

    def init(params: PyTree):
        state = inner.init(params)
        # A copy, because the step's buffers are donated and two trees must not share one.
        return state._replace(params0=jax.tree.map(jnp.copy, state.params0))

    def update(grads: PyTree, state, params: PyTree):
        updates, new = inner.update(grads, state, params)
        if weight_decay == 0:
            return updates, new
        bias = (1 - beta2**new.count) ** 0.5 / (1 - beta1**new.count)
        decay = weight_decay * state.estim_lr * schedule(state.count) * bias
        updates = jax.tree.map(
            lambda update, param, is_decayed: update - decay * param if is_decayed else update,
            *(updates, params, decay_mask(params)),
        )
        return updates, new

    return optax.GradientTransformation(init, update)


def schedule_free(
    base: optax.GradientTransformation, schedule: optax.Schedule, beta1: float, weight_power: float
) -> optax.GradientTransformation:
    """Schedule-free averaging (arXiv 2405.15682) around an optimizer without momentum; see ``evaluation_params``."""
    return optax.contrib.schedule_free(base, schedule, b1=beta1, weight_lr_power=weight_power)


def evaluation_params(opt_state: PyTree, params: PyTree) -> PyTree:
    """What to sample with, average and export: with schedule_free_adamw the average of the iterates, else ``params``.

    Schedule-free training takes its gradients between the average and the last iterate, where ``params`` are.
    """

    def is_schedule_free(node) -> bool:
        return isinstance(node, optax.contrib.ScheduleFreeState)

    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=is_schedule_free) if is_schedule_free(leaf)]
    if not found:
        return params
    (state,) = found
    iterates = parameter_paths(state.z)  # without the frozen parameters

    def average(path, param):
        return (param - (1 - state.b1) * iterates[path]) / state.b1 if path in iterates else param

    return map_with_names(average, params)
