"""The fake score's loss: flow matching on the generator's own videos, with the clean prediction in between.

The velocity is taken from the predicted x0 with the generator's table of noise levels. Where the score network's own
table has another flow shift, it is the network's velocity times the ratio of the two levels (LongSANA).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.typing import Array, Float, Shaped
from sana_jax.diffusion.flow import align_leading, flow_matching_loss, velocity_target


def velocity_from_x0(
    noisy: Float[Array, "B *X"], x0: Float[Array, "B *X"], sigma: Float[Array, "*S"]
) -> Float[Array, "B *X"]:
    """(x − x0)/σ, in float32; σ is above 0."""
    noisy, x0 = jnp.asarray(noisy, jnp.float32), jnp.asarray(x0, jnp.float32)
    return (noisy - x0) / align_leading(jnp.asarray(sigma, jnp.float32), noisy)


def critic_loss(
    x0: Float[Array, "B *X"],
    noisy: Float[Array, "B *X"],
    generated: Float[Array, "B *X"],
    noise: Float[Array, "B *X"],
    sigma: Float[Array, "*S"],
    mask: Shaped[Array, "B *M"] | None = None,
) -> Float[Array, " B"]:
    """Each sample's mean squared error of the velocity.

    Args:
        x0: the fake score's clean prediction, with gradients.
        noisy: what it was given.
        generated: the generator's video; no gradient passes.
        noise: with which it was noised.
        sigma: to which level, from the generator's table.
        mask: which elements count, as in ``flow_matching_loss``.
    """
    target = velocity_target(jax.lax.stop_gradient(generated), noise)
    return flow_matching_loss(velocity_from_x0(noisy, x0, sigma), target, mask)
