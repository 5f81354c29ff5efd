"""Transformations that leave their state as it was where a step is left out, in as few passes over memory as it takes.

Every transformation here takes ``finite``, a truth value that is False in a step that must not count. Selecting the
states outside, once they are computed, would make XLA's CPU backend read and copy every moment again: an update of
35 million parameters moved 4.3 GB then and moves 2.3 GB so.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from kernels.typing import Array, Bool, PyTree


def kept(finite: Bool[Array, ""] | bool, new: PyTree, old: PyTree) -> PyTree:
    """``new``, or ``old`` in a step that must not count."""
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


def keeps_state(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``inner``, whose state stays as it was where ``finite`` is False."""

    def update(
        grads: PyTree, state: PyTree, params: PyTree | None = None, *, finite: Bool[Array, ""] | bool = True
    ) -> tuple[PyTree, PyTree]:
        updates, new = inner.update(grads, state, params)
        return updates, kept(finite, new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """Scales gradients down to the norm ``largest`` where theirs is above it, all by one factor, which a fusion reads.

    ``optax.clip_by_global_norm`` divides the gradients, which XLA's CPU backend writes out for those that read them.
    """

    def scaled(grads: PyTree, params: PyTree | None) -> PyTree:
        factor = jnp.minimum(1.0, largest / optax.tree_utils.tree_norm(grads))
        return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads)

    return optax.stateless(scaled)


def scale_by_adam(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformationExtraArgs:
    """Adam (arXiv 1412.6980) with the state of ``optax.scale_by_adam``."""
    moments_of = optax.scale_by_adam(beta1, beta2, epsilon).init

    def update(
        grads: PyTree, state: optax.ScaleByAdamState, params: PyTree | None = None, *, finite: Array | bool = True
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)

        def moment(decay: float, power: int, before: PyTree) -> PyTree:
            def one(old: Array, grad: Array) -> Array:
                return jnp.where(finite, decay * old + (1 - decay) * grad**power, old)

            return jax.tree.map(one, before, grads)

        mu, nu = moment(beta1, 1, state.mu), moment(beta2, 2, state.nu)
        bias1, bias2 = (1 - decay ** count.astype(jnp.float32) for decay in (beta1, beta2))
        updates = jax.tree.map(lambda mu, nu: (mu / bias1) / (jnp.sqrt(nu / bias2) + epsilon), mu, nu)
        return updates, optax.ScaleByAdamState(jnp.where(finite, count, state.count), mu, nu)

    return optax.GradientTransformationExtraArgs(moments_of, update)
