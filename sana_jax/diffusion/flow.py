"""The flow-matching process: noise levels, noising, targets and the loss.

A sample at noise level σ lies on the straight line between data and noise, and the network predicts its direction:

    x_σ = (1 − σ)·x0 + σ·noise,        velocity = dx/dσ = noise − x0.

σ = 0 is clean, σ = 1 is pure noise. A training step draws an index into a table of levels i/num_levels; the table is
then bent towards noise by the flow shift (SANA, arXiv 2410.10629, section 3.2; Esser et al., arXiv 2403.03206, eq. 23).
The same functions serve images, (B, H, W, C) with one σ per sample, and videos, (B, T, H, W, C) with one σ per sample
or per frame: σ's axes are the leading axes of the latents.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int, Shaped
from sana_jax.errors import UserError

NUM_TRAIN_TIMESTEPS = 1000


class NoiseLevel(NamedTuple):
    """A noise level in its two units: σ in [0, 1) for the process and the integer timestep that the network sees."""

    sigma: Float[Array, "*S"]
    timestep: Int[Array, "*S"]


def shift_sigma(
    sigma: float | Float[np.ndarray, "*S"] | Float[Array, "*S"], flow_shift: float
) -> float | Float[np.ndarray, "*S"] | Float[Array, "*S"]:
    """Bends noise levels towards noise: σ' = s·σ / (1 + (s − 1)·σ), which fixes 0 and 1.

    Args:
      sigma: level(s) in [0, 1]; a float, NumPy array or JAX array, whose type and dtype the result keeps.
      flow_shift: s > 0; 1 leaves the levels alone, larger values spend more of the schedule near noise.

    Raises:
      UserError: if ``flow_shift`` is not positive.
    """
    if not flow_shift > 0:
        raise UserError(f"flow_shift={flow_shift!r} must be positive (published models use 1 to 10); set it above 0")
    flow_shift = float(flow_shift)  # a NumPy scalar would widen float32 levels
    return flow_shift * sigma / (1 + (flow_shift - 1) * sigma)


def training_sigmas(flow_shift: float, num_levels: int = NUM_TRAIN_TIMESTEPS) -> np.ndarray:
    """The table of shifted training levels, float64 of shape (num_levels,): entry i is i/num_levels after the shift.

    Entry 0 is exactly 0 (clean); pure noise, σ = 1, is not in the table.

    Raises:
      UserError: if ``num_levels`` is below 1, or ``flow_shift`` not positive.
    """
    if num_levels < 1:
        raise UserError(f"num_levels={num_levels} must be at least 1; the published models use {NUM_TRAIN_TIMESTEPS}")
    # The reference obtains i/num_levels as one minus a line from 1 down to 1/num_levels. In floating point that lies
    # just below i/num_levels for many i, and the timestep is truncated, so the route decides on integers: at shift 1,
    # 144 of the 1000 timesteps are i − 1.
    unshifted = 1.0 - np.linspace(1.0, 1.0 / num_levels, num_levels)
    return shift_sigma(unshifted, flow_shift)


def training_timesteps(flow_shift: float, num_levels: int = NUM_TRAIN_TIMESTEPS) -> np.ndarray:
    """The timesteps that the network sees in training, int32 of shape (num_levels,): floor(num_levels·σ')."""
    return np.floor(num_levels * training_sigmas(flow_shift, num_levels)).astype(np.int32)


def noise_level(index: Int[Array, "*S"], flow_shift: float, num_levels: int = NUM_TRAIN_TIMESTEPS) -> NoiseLevel:
    """Looks up drawn indices in the shifted table.

    Args:
      index: integers in [0, num_levels), any shape: (B,) per sample, (B, T) per frame.
      flow_shift: the shift the model is trained with.
      num_levels: length of the table.

    Returns:
      ``NoiseLevel(sigma, timestep)`` of ``index``'s shape, float32 and int32.
    """
    sigmas = jnp.asarray(training_sigmas(flow_shift, num_levels), jnp.float32)
    timesteps = jnp.asarray(training_timesteps(flow_shift, num_levels), jnp.int32)
    return NoiseLevel(sigmas[index], timesteps[index])


def align_leading(values: Shaped[Array, "*S"], array: Shaped[Array, "*X"], name: str = "sigma") -> Shaped[Array, "*Y"]:
    """Appends axes of size 1 to ``values`` so that its axes line up with the leading axes of ``array``.

    Raises:
      UserError: if an axis of ``values`` is neither 1 nor as long as the axis of ``array`` it falls on.
    """
    values = jnp.asarray(values)
    fits = values.ndim <= array.ndim and all(mine in (1, its) for mine, its in zip(values.shape, array.shape))
    if not fits:
        raise UserError(
            f"{name} of shape {values.shape} does not line up with the leading axes of an array of shape {array.shape};"
            " give one value, one per sample (B,) or, for videos (B, T, H, W, C), one per frame (B, T)"
        )
    return values.reshape(values.shape + (1,) * (array.ndim - values.ndim))


def add_noise(x0: Float[Array, "B *X"], noise: Float[Array, "B *X"], sigma: Float[Array, "*S"]) -> Float[Array, "B *X"]:
    """x_σ = (1 − σ)·x0 + σ·noise, in float32.

    Args:
      x0: clean latents, (B, [T,] H, W, C).
      noise: standard normal, of ``x0``'s shape.
      sigma: level(s) in [0, 1]: (), (B,) or (B, T).
    """
    x0, noise = jnp.asarray(x0, jnp.float32), jnp.asarray(noise, jnp.float32)
    _require_same_shape("x0", x0, "noise", noise)
    sigma = align_leading(jnp.asarray(sigma, jnp.float32), x0)
    return (1.0 - sigma) * x0 + sigma * noise


def velocity_target(x0: Float[Array, "B *X"], noise: Float[Array, "B *X"]) -> Float[Array, "B *X"]:
    """The velocity of the straight line from data to noise, noise − x0, in float32; the same at every σ."""
    x0, noise = jnp.asarray(x0, jnp.float32), jnp.asarray(noise, jnp.float32)
    _require_same_shape("x0", x0, "noise", noise)
    return noise - x0


def x0_from_velocity(
    noisy: Float[Array, "B *X"], velocity: Float[Array, "B *X"], sigma: Float[Array, "*S"]
) -> Float[Array, "B *X"]:
    """The clean sample that a velocity points to: x0 = x_σ − σ·velocity, in float32. Shapes as in ``add_noise``."""
    noisy, velocity = jnp.asarray(noisy, jnp.float32), jnp.asarray(velocity, jnp.float32)
    _require_same_shape("noisy", noisy, "velocity", velocity)
    return noisy - align_leading(jnp.asarray(sigma, jnp.float32), noisy) * velocity


def flow_matching_loss(
    velocity: Float[Array, "B *X"], target: Float[Array, "B *X"], mask: Shaped[Array, "B *M"] | None = None
) -> Float[Array, "B"]:
    """Mean squared error of every sample, (B,) in float32; no weighting by noise level, as SANA trains.

    Args:
      velocity: the network's output, (B, [T,] H, W, C), any float dtype.
      target: ``velocity_target(x0, noise)``.
      mask: which elements count, boolean or 0/1, lined up with the leading axes: (B,), (B, T) to leave frames out
        (a given first frame), or the full rank with axes of size 1. The mean runs over the elements that count; a
        sample of which none count has loss 0.
    """
    velocity, target = jnp.asarray(velocity, jnp.float32), jnp.asarray(target, jnp.float32)
    _require_same_shape("velocity", velocity, "target", target)
    squared_error = jnp.square(velocity - target)
    rest = tuple(range(1, squared_error.ndim))
    if mask is None:
        return jnp.mean(squared_error, axis=rest)
    weight = align_leading(jnp.asarray(mask, jnp.float32), squared_error, "mask")
    weight = jnp.broadcast_to(weight, squared_error.shape)
    count = jnp.sum(weight, axis=rest)
    return jnp.sum(squared_error * weight, axis=rest) / jnp.where(count > 0, count, 1.0)


def _require_same_shape(name: str, array: Array, other_name: str, other: Array) -> None:
    if array.shape != other.shape:
        raise UserError(
            f"{name} has shape {array.shape} but {other_name} has shape {other.shape}; they must agree axis for axis"
        )
