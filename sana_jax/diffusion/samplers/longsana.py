"""LongSANA's sampler: block after block in a few jumps to clean, with a state that only clean blocks write.

SANA-Video, arXiv 2509.24695, §4. A jump is x0 = x − σ·velocity, after which fresh noise takes the block to the next
listed timestep; the last jump's x0 is the block. One more pass, at timestep 0 on that block, leaves the state for the
next one. Training (``train.objectives.longsana``) rolls out with the same functions.

σ is not timestep/1000: it is the level of the nearest of the 1000 entries of a table with a flow shift of its own. The
published list is that of a shift of 8, its table has 7, so that σ(889) is 0.88915 and σ(0) is 0.00696.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int, PRNGKeyArray, PyTree
from sana_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS, add_noise, shift_sigma, x0_from_velocity
from sana_jax.diffusion.samplers.base import Schedule, entry, latents_like, require_positive, require_steps
from sana_jax.diffusion.samplers.scm import SCMState
from sana_jax.diffusion.sampling import sample_scan
from sana_jax.errors import UserError

DENOISING_STEPS = (1000, 960, 889, 727)
FLOW_SHIFT = 7.0
BLOCK_FRAMES = 10

# (latents (B, T, H, W, C), timestep (), state) -> (velocity, state after this block): closes over the network, its
# parameters, the captions and the block's first frame.
BlockVelocity = Callable[
    [Float[Array, "B T H W C"], Float[Array, ""], PyTree], tuple[Float[Array, "B T H W C"], PyTree]
]


class SigmaTable(NamedTuple):
    """Noise levels from noise to data and their timesteps 1000·σ, float32 (n,); 0 is not among them."""

    sigmas: np.ndarray
    timesteps: np.ndarray


@functools.lru_cache(maxsize=16)
def sigma_table(flow_shift: float, num_levels: int = NUM_TRAIN_TIMESTEPS) -> SigmaTable:
    """The table in which ``nearest_sigma`` looks: entry i is 1 − i/num_levels after the shift.

    It begins with σ = 1 and ends just above 0: with 1/num_levels after the shift, which is 0.00696 at a shift of 7.
    Computed in float32 throughout, as the reference does, since the nearest entry decides.

    Args:
        flow_shift: of this network's table: LongSANA 7, the score networks that it learns from 8.
        num_levels: entries.

    Raises:
        UserError: a shift that is not positive.
    """
    require_positive("flow_shift", flow_shift)
    require_positive("num_levels", num_levels)
    spacing, one = np.float32(1.0 / num_levels), np.float32(1.0)
    index = np.arange(num_levels + 1, dtype=np.float32)
    # the reference counts the first half from 1 downwards and the second from 0 upwards
    unshifted = np.where(index < (num_levels + 1) // 2, one - spacing * index, spacing * index[::-1])[:-1]
    sigmas = shift_sigma(unshifted, flow_shift).astype(np.float32)
    table = SigmaTable(sigmas, sigmas * np.float32(num_levels))
    for array in table:
        array.setflags(write=False)
    return table


def nearest_sigma(
    timestep: Float[Array, "*S"] | Int[Array, "*S"], flow_shift: float, num_levels: int = NUM_TRAIN_TIMESTEPS
) -> Float[Array, "*S"]:
    """σ of the table's entry whose timestep is nearest, float32; of two that are as near, the noisier.

    Args:
        timestep: in [0, num_levels], any shape, whole or not. At 0 the level is the table's last, which is above 0.
        flow_shift: of the table.
        num_levels: of the table.
    """
    table = sigma_table(float(flow_shift), num_levels)
    distance = jnp.abs(jnp.asarray(table.timesteps) - jnp.asarray(timestep, jnp.float32)[..., None])
    return jnp.asarray(table.sigmas)[jnp.argmin(distance, axis=-1)]


def causal_block_starts(num_frames: int, block_frames: int = BLOCK_FRAMES) -> tuple[int, ...]:
    """First latent frame of every block of a video; the first block takes the remainder: 21 frames are (0, 11).

    A video shorter than one block is one block.

    Args:
        num_frames: latent frames.
        block_frames: of every block but the first.

    Raises:
        UserError: numbers below 1.
    """
    require_positive("num_frames", num_frames)
    require_positive("block_frames", block_frames)
    first = block_frames + num_frames % block_frames
    return (0, *range(first, num_frames, block_frames))


@dataclasses.dataclass(frozen=True)
class LongSanaSampler:
    """A few jumps to clean, with fresh noise in between; its last state's ``latents`` are the last jump's x0.

    Attributes:
        flow_shift: of the table of noise levels (``nearest_sigma``).
        timesteps: what the network is told at every step, whole numbers from noise to data; a 0 at the end, as
            published lists have it, stands for the clean result and makes no step.
        num_train_timesteps: entries of the table.
        block_frames: latent frames of a block, as the network was trained.
        num_cached_blocks: how many earlier blocks a block sees; None for all.

    Raises:
        UserError: timesteps that do not decrease or that lie outside the table, or numbers below 1.
    """

    flow_shift: float = FLOW_SHIFT
    timesteps: tuple[int, ...] = DENOISING_STEPS
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS
    block_frames: int = BLOCK_FRAMES
    num_cached_blocks: int | None = None

    stochastic: ClassVar[bool] = True

    def __post_init__(self):
        require_positive("flow_shift", self.flow_shift)
        require_positive("num_train_timesteps", self.num_train_timesteps)
        for name, value in (("block_frames", self.block_frames), ("num_cached_blocks", self.num_cached_blocks)):
            if not (value is None and name == "num_cached_blocks") and (type(value) is not int or value < 1):
                raise UserError(
                    f"{name}={value!r} must be a whole number of 1 or more; LongSANA's blocks have 10 frames"
                )
        steps = tuple(self.timesteps)
        steps = steps[:-1] if steps[1:] and steps[-1] == 0 else steps
        fits = bool(steps) and all(float(step).is_integer() for step in steps)
        if not fits or any(np.diff(steps) >= 0) or not (steps[-1] > 0 and steps[0] <= self.num_train_timesteps):
            raise UserError(
                f"timesteps={tuple(self.timesteps)} must be whole numbers that decrease, at most "
                f"{self.num_train_timesteps} and above 0, such as {DENOISING_STEPS}"
            )
        object.__setattr__(self, "timesteps", tuple(int(step) for step in steps))

    @property
    def num_inference_steps(self) -> int:
        """The number of jumps."""
        return len(self.timesteps)

    def schedule(self, num_inference_steps: int | None = None) -> Schedule:
        """The listed steps; the level after the last is 0.

        Raises:
            UserError: another number of steps than are listed.
        """
        steps = self.num_inference_steps if num_inference_steps is None else require_steps(num_inference_steps)
        if steps != self.num_inference_steps:
            raise UserError(
                f"num_inference_steps {steps} is not allowed; this model was distilled to the "
                f"{self.num_inference_steps} steps at {self.timesteps}: leave the number out"
            )
        timesteps = np.array(self.timesteps, np.float32)
        table = sigma_table(float(self.flow_shift), self.num_train_timesteps)
        nearest = np.abs(table.timesteps - timesteps[:, None]).argmin(axis=-1)
        return Schedule(timesteps, np.append(table.sigmas[nearest], np.float32(0.0)))

    @property
    def context_sigma(self) -> float:
        """The level that training's clean pass noises a block to: that of timestep 0, 0.00696 at a shift of 7."""
        return float(sigma_table(float(self.flow_shift), self.num_train_timesteps).sigmas[-1])

    def init(self, latents: Float[Array, "B *X"]) -> SCMState:
        """The state before the first step, from standard normal latents."""
        latents = jnp.asarray(latents, jnp.float32)
        return SCMState(latents, jnp.zeros_like(latents))

    def step(
        self,
        schedule: Schedule,
        state: SCMState,
        index: int | Int[Array, ""],
        velocity: Float[Array, "B *X"],
        noise: Float[Array, "B *X"] | None = None,
    ) -> SCMState:
        """One jump in float32, and noise to the next level.

        Raises:
            UserError: without noise. The last step multiplies it by 0, yet takes it like the rest.
        """
        if noise is None:
            raise UserError("LongSanaSampler adds noise at every step; pass key= or noise= to the loop, or noise=")
        denoised = x0_from_velocity(state.latents, latents_like(state, velocity), entry(schedule.sigmas, index))
        return SCMState(add_noise(denoised, noise, entry(schedule.sigmas, index + 1)), denoised)


def generate_block(
    velocity_fn: BlockVelocity,
    state: PyTree,
    latents: Float[Array, "B T H W C"],
    sampler: LongSanaSampler,
    key: PRNGKeyArray | None = None,
    *,
    noise: Float[Array, "n B T H W C"] | None = None,
) -> Float[Array, "B T H W C"]:
    """One block, clean, float32. The state is read and not written; ``read_block`` writes it.

    Args:
        velocity_fn: the network at this block.
        state: what the blocks before have left.
        latents: standard normal.
        sampler: the steps.
        key: seeds the noise between steps, as in ``sample_scan``.
        noise: the noise itself in place of ``key``: standard normal, one for each step but the last.

    Raises:
        UserError: neither or both of ``key`` and ``noise``, or noise for another number of steps.
    """
    if noise is not None:
        noise = jnp.concatenate([noise, jnp.zeros_like(latents)[None]])
    run = sample_scan(
        sampler,
        sampler.schedule(),
        lambda noisy, timestep: velocity_fn(noisy, timestep, state)[0],
        latents,
        key,
        noise=noise,
    )
    return run.latents


def read_block(
    velocity_fn: BlockVelocity,
    state: PyTree,
    block: Float[Array, "B T H W C"],
    *,
    sigma: float = 0.0,
    noise: Float[Array, "B T H W C"] | None = None,
) -> PyTree:
    """The state after the pass at timestep 0 on a block.

    Args:
        velocity_fn: the network at this block.
        state: what the blocks before have left.
        block: its clean latents.
        sigma: level to which the block is noised first: 0 in sampling, ``LongSanaSampler.context_sigma`` in training.
        noise: standard normal; needed where ``sigma`` is above 0.

    Raises:
        UserError: a level without noise, or noise without a level.
    """
    if (noise is None) != (sigma == 0.0):
        raise UserError(f"sigma={sigma} with{'out' if noise is None else ''} noise: give both, or neither")
    if noise is not None:
        block = add_noise(block, noise, sigma)
    _, state = velocity_fn(block, jnp.zeros((), jnp.float32), state)
    return state
