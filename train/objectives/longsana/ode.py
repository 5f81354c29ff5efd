"""ODE initialisation: the causal network learns to jump from the teacher's ODE trajectories to where they end.

A trajectory holds one video's states at the sampler's listed timesteps, from noise to clean. Every block gets one of
them at random; the loss is the squared error of the predicted clean frames, over the frames that are not clean already
(LongSANA; CausVid, arXiv 2412.07772, §4.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs.longsana import OdeInitializationConfig
from kernels.typing import Array, Bool, Float, Int, PyTree
from sana_jax.diffusion.flow import flow_matching_loss, shift_sigma
from sana_jax.errors import UserError
from train.batch import Batch
from train.objectives.base import SampleLosses
from train.objectives.longsana.networks import ScoreNetwork, captions_of, predicted_x0, sigma_at
from train.randomness import stream

TRAJECTORY = "trajectory"
_SNAP = 5.0  # timesteps that a step of the teacher is moved at most


class OdeSamples(NamedTuple):
    """What the network is given, and what it should say."""

    noisy: Float[Array, "B T H W C"]
    timestep: Float[Array, "B T"]
    clean: Float[Array, "B T H W C"]
    counts: Bool[Array, "B T"]
    """Frames that are not clean already."""


def frame_indices(
    chunk_index: Int[Array, "B K"],
    block_starts: tuple[int, ...],
    num_frames: int,
    clean_index: int,
    clean_first_frame: bool = False,
) -> Int[Array, "B T"]:
    """Every frame's place in the trajectory: its block's, and the clean end for a given first frame."""
    sizes = np.diff((*block_starts, num_frames))
    index = jnp.repeat(chunk_index, sizes, axis=1, total_repeat_length=num_frames)
    return index.at[:, 0].set(clean_index) if clean_first_frame else index


def ode_samples(
    trajectory: Float[Array, "B S T H W C"], index: Int[Array, "B T"], timesteps: tuple[int, ...]
) -> OdeSamples:
    """Takes every frame from its place in the trajectory.

    Args:
        trajectory: states from noise to clean.
        index: every frame's place.
        timesteps: the S timesteps of the states, the last of them 0.
    """
    noisy = jnp.take_along_axis(trajectory, index[:, None, :, None, None, None], axis=1)[:, 0]
    timestep = jnp.asarray(timesteps, jnp.float32)[index]
    return OdeSamples(noisy, timestep, trajectory[:, -1], timestep > 0)


def ode_losses(predicted: Float[Array, "B T H W C"], samples: OdeSamples) -> Float[Array, " B"]:
    """Each sample's mean squared error over the frames that count; 0 where none does."""
    return flow_matching_loss(predicted, samples.clean, samples.counts)


class OdeDraws(NamedTuple):
    """What is random about a batch."""

    index: Int[Array, "B T"]
    weight: Float[Array, " B"]
    """How many frames of the sample count, over their mean in the batch: the loss is a mean over frames."""


@dataclass(frozen=True)
class OdeInitialization:
    """The objective: ``batch.latents`` are where the trajectories end, ``batch.conditions["trajectory"]`` (B, S − 1, T,
    H, W, C) their states before, at the listed timesteps.

    Attributes:
        network: the network in causal blocks of ``config.block_starts``.
        config: the timesteps, the table's flow shift and the blocks.
    """

    network: ScoreNetwork
    config: OdeInitializationConfig

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Those of the trajectory's states, the clean one's with them."""
        return (*self.config.timesteps, 0)

    def draw(self, seed: int, step: int | Int[Array, ""], batch: Batch) -> OdeDraws:
        """What is random at one step: the streams ``ode_index``."""
        rows, frames = batch.latents.shape[:2]
        last, starts = len(self.timesteps) - 1, self.config.block_starts(frames)
        chunks = jax.random.randint(stream(seed, step, "ode_index"), (rows, len(starts)), 0, last + 1)
        index = frame_indices(chunks, starts, frames, last, self.config.clean_first_frame)
        counted = jnp.sum(index < last, axis=1).astype(jnp.float32)
        return OdeDraws(index, counted / jnp.maximum(counted.mean(), 1.0 / rows))

    def losses(self, trained: PyTree, frozen: PyTree | None, batch: Batch, draws: OdeDraws) -> SampleLosses:
        """Each sample's loss, in float32; the whole network is trained, and ``frozen`` is not read."""
        states = batch.conditions[TRAJECTORY]
        wanted = (batch.latents.shape[0], len(self.config.timesteps), *batch.latents.shape[1:])
        if states.shape != wanted:
            raise UserError(
                f"the trajectories have shape {states.shape}; {len(self.config.timesteps)} states of each video are "
                f"wanted, {wanted}: make them again with the timesteps {self.config.timesteps}"
            )
        trajectory = jnp.concatenate([states, batch.latents[:, None]], axis=1).astype(jnp.float32)
        samples = ode_samples(trajectory, draws.index, self.timesteps)
        shift = self.config.flow_shift
        told = captions_of(batch)
        predicted = predicted_x0(self.network, trained, samples.noisy, samples.timestep, told, shift)
        sigma = sigma_at(samples.timestep, shift).mean(axis=1)
        return SampleLosses(ode_losses(predicted, samples) * draws.weight, sigma)


def teacher_levels(
    timesteps: tuple[int, ...], num_steps: int, flow_shift: float, snap: bool = False
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Levels σ of the teacher's Euler steps, float32 (num_steps + 1,) from 1 to 0, and the steps at listed timesteps.

    With 48 steps and a shift of 8 the listed 1000, 960, 889 and 727 are exactly the steps 0, 12, 24 and 36. SANA-WM's
    1000, 967, 908 and 764 are within two of the steps 0, 15, 30 and 45 of 60 at a shift of 9.8, which ``snap`` moves.

    Args:
        timesteps: the listed ones, without the 0.
        num_steps: Euler steps.
        flow_shift: of the levels.
        snap: move the step nearest to each listed timestep onto it.

    Raises:
        UserError: a listed timestep that no step comes within half a timestep of, or with ``snap`` within five.
    """
    levels = shift_sigma(np.linspace(1.0, 0.0, num_steps + 1), flow_shift)
    distance = np.abs(levels[:, None] * 1000 - np.array(timesteps, np.float64))
    nearest = distance.argmin(axis=0)
    allowed = _SNAP if snap else 0.5
    if (distance.min(axis=0) > allowed).any() or len(set(nearest.tolist())) < len(timesteps):
        missed = [step for step, away in zip(timesteps, distance.min(axis=0)) if away > allowed] or list(timesteps)
        advice = "the published list goes with 48 steps at flow shift 8"
        if snap:
            advice += ", SANA-WM's with 60 at 9.8"
        raise UserError(f"{num_steps} steps at flow shift {flow_shift:g} do not pass the timesteps {missed}; {advice}")
    if snap:
        levels[nearest] = np.array(timesteps) / 1000
    return levels.astype(np.float32), tuple(int(step) for step in nearest)


def teacher_trajectory(
    velocity_fn: Callable[[Float[Array, "B T H W C"], Float[Array, ""]], Float[Array, "B T H W C"]],
    noise: Float[Array, "B T H W C"],
    timesteps: tuple[int, ...],
    num_steps: int = 48,
    flow_shift: float = 8.0,
    snap: bool = False,
) -> Float[Array, "B S T H W C"]:
    """The teacher's ODE from noise to clean by Euler steps: its states at the listed timesteps and the clean end.

    Args:
        velocity_fn: (latents, timestep ()) -> velocity, guidance within.
        noise: standard normal.
        timesteps: the listed ones, without the 0.
        num_steps: Euler steps.
        flow_shift: the teacher's, in sampling.
        snap: as in ``teacher_levels``.
    """
    levels, kept = teacher_levels(timesteps, num_steps, flow_shift, snap)
    levels = jnp.asarray(levels)

    def step(carry, index):
        latents, states = carry
        place = jnp.asarray(kept) == index
        states = jnp.where(place[:, None, None, None, None, None], latents, states)
        velocity = velocity_fn(latents, 1000 * levels[index]).astype(jnp.float32)
        return (latents + (levels[index + 1] - levels[index]) * velocity, states), None

    noise = jnp.asarray(noise, jnp.float32)
    start = (noise, jnp.zeros((len(kept), *noise.shape), jnp.float32))
    (clean, states), _ = jax.lax.scan(step, start, jnp.arange(num_steps))
    return jnp.moveaxis(jnp.concatenate([states, clean[None]]), 0, 1)
