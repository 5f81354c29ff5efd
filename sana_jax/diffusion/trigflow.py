"""TrigFlow coordinates, in which the consistency models (SANA-Sprint) sample, and the way to and from flow matching.

TrigFlow places a sample at an angle t in [0, π/2] on a circle,

    x_t = cos(t)·x0 + sin(t)·z,      velocity = dx/dt = cos(t)·z − sin(t)·x0,      z = sigma_data·noise

(Lu and Song, arXiv 2410.11081). A network trained for flow matching is used unchanged: the angle's flow level is
s = sin t / (cos t + sin t), its input is x_t rescaled onto the straight line, and its velocity is mapped back
(SANA-Sprint, arXiv 2503.09641, section 3.1).
"""

from __future__ import annotations

import jax.numpy as jnp

from kernels.typing import Array, Float
from sana_jax.diffusion.flow import align_leading


def sigma_from_angle(angle: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The flow noise level s = sin t / (cos t + sin t) of an angle in radians; SANA-Sprint's network sees s itself."""
    angle = jnp.asarray(angle, jnp.float32)
    return jnp.sin(angle) / (jnp.cos(angle) + jnp.sin(angle))


def flow_input(latents: Float[Array, "B *X"], angle: Float[Array, "*S"], sigma_data: float) -> Float[Array, "B *X"]:
    """What the flow network takes for a TrigFlow sample: (x_t / sigma_data)·sqrt(s² + (1 − s)²), in float32.

    Args:
      latents: x_t, (B, [T,] H, W, C).
      angle: t in radians, () or (B,) or (B, T).
      sigma_data: standard deviation of the data, 0.5 for SANA-Sprint.
    """
    latents = jnp.asarray(latents, jnp.float32)
    sigma = align_leading(sigma_from_angle(angle), latents)
    return latents / sigma_data * jnp.sqrt(jnp.square(sigma) + jnp.square(1.0 - sigma))


def trigflow_velocity(
    network_input: Float[Array, "B *X"], velocity: Float[Array, "B *X"], angle: Float[Array, "*S"], sigma_data: float
) -> Float[Array, "B *X"]:
    """The TrigFlow velocity dx/dt of a flow network's output, in float32, in units of ``sigma_data``.

    F = sigma_data·((1 − 2s)·x + (1 − 2s + 2s²)·v) / sqrt(s² + (1 − s)²).

    Args:
      network_input: x, what ``flow_input`` gave, (B, [T,] H, W, C).
      velocity: v, the network's flow velocity at x and s.
      angle: t in radians, () or (B,) or (B, T).
      sigma_data: standard deviation of the data.
    """
    network_input, velocity = jnp.asarray(network_input, jnp.float32), jnp.asarray(velocity, jnp.float32)
    sigma = align_leading(sigma_from_angle(angle), network_input)
    of_input = (1.0 - 2.0 * sigma) * network_input
    of_velocity = (1.0 - 2.0 * sigma + 2.0 * jnp.square(sigma)) * velocity
    return (of_input + of_velocity) / jnp.sqrt(jnp.square(sigma) + jnp.square(1.0 - sigma)) * sigma_data
