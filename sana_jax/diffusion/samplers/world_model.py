"""How SANA-WM is sampled in causal blocks, one after another with a state.

It is Euler's method with a level of its own for every latent frame. Frames that are given are clean from the start:
their level is 0, the network is told so, and no step changes them.

Source: the sampling code of NVlabs/Sana, as recorded in this repository's vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int, PyTree
from sana_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS
from sana_jax.diffusion.samplers.base import (
    LatentState,
    Schedule,
    entry,
    latents_like,
    refuse_noise,
    require_positive,
    require_steps,
)
from sana_jax.errors import UserError

# What the distilled student was trained with, and what the streaming command takes by default.
DISTILLED_STEPS = (1000, 967, 908, 764)
STREAMING_STEPS = (1000, 960, 889, 727)
CHUNK_STRATEGIES = ("uniform", "first_plus_one", "first_frame")

# (latents (B, T, H, W, C), timestep (B, T), state) -> (velocity, state after this block): closes over the network, its
# parameters, captions, camera, guidance and the block's first frame.
BlockVelocity = Callable[
    [Float[Array, "B T H W C"], Float[Array, "B T"], PyTree], tuple[Float[Array, "B T H W C"], PyTree]
]


def chunk_starts(num_frames: int, chunk_frames: int = 3, strategy: str = "first_plus_one") -> tuple[int, ...]:
    """First latent frame of every causal block; a rest that is shorter than a block joins the last one.

    Args:
        num_frames: latent frames of the video.
        chunk_frames: of a block.
        strategy: ``uniform``, all alike; ``first_plus_one``, the first one frame longer (the published one: 13 frames
            are (0, 4, 7, 10)); ``first_frame``, the first frame a block of its own.

    Raises:
        UserError: numbers below 1, or another strategy.
    """
    require_positive("num_frames", num_frames)
    require_positive("chunk_frames", chunk_frames)
    if strategy not in CHUNK_STRATEGIES:
        raise UserError(f"strategy={strategy!r} is not known; choose one of {', '.join(CHUNK_STRATEGIES)}")
    first = {"uniform": chunk_frames, "first_plus_one": chunk_frames + 1, "first_frame": 1}[strategy]
    starts = [0, *range(first, num_frames, chunk_frames)]
    alone = 2 if strategy == "first_frame" else 1  # the first block, and the one behind a frame of its own, stay
    if len(starts) > alone and num_frames - starts[-1] < chunk_frames:
        starts.pop()
    return tuple(starts)


def listed_schedule(timesteps: Sequence[int], num_levels: int = NUM_TRAIN_TIMESTEPS) -> Schedule:
    """A schedule of listed timesteps, of levels timestep/num_levels; 0 at the end, listed or not, is the clean result.

    Formed in float32, in which σ·num_levels is the listed whole number again.

    Args:
        timesteps: whole numbers from noise to data, such as ``STREAMING_STEPS``.
        num_levels: the timestep of pure noise.

    Raises:
        UserError: timesteps that do not decrease, or lie outside 1..num_levels.
    """
    listed = np.asarray(timesteps)
    steps = listed[:-1] if listed.ndim == 1 and listed.size > 1 and listed[-1] == 0 else listed
    whole = steps.ndim == 1 and steps.size > 0 and steps.dtype.kind in "iuf" and all(steps == np.floor(steps))
    if not whole or any(np.diff(steps) >= 0) or not steps[-1] > 0 or steps[0] > num_levels:
        raise UserError(
            f"timesteps={timesteps!r} must be whole numbers that decrease, at most {num_levels} and above 0, such "
            f"as {STREAMING_STEPS}"
        )
    sigmas = np.array([*steps, 0], np.float32) / np.float32(num_levels)
    return Schedule(sigmas[:-1] * np.float32(num_levels), sigmas)


@dataclasses.dataclass(frozen=True)
class WorldStreamSampler:
    """How a few-step world model is sampled, block after block: the listed timesteps, and what a block sees.

    Attributes:
        timesteps: what the network is told at every step, whole numbers from noise to data; a 0 at the end, as
            published lists have it, stands for the clean result and makes no step. Levels are timestep/1000.
        num_train_timesteps: the timestep of pure noise.
        block_frames: latent frames of a block, as the network was trained.
        blocks: how a video is cut, see ``chunk_starts``.
        num_cached_blocks: how many earlier blocks softmax layers see; None for all.
        sink: whether the first block is always one of them.

    Raises:
        UserError: timesteps that do not decrease or that lie outside 1..num_train_timesteps, numbers below 1, another
            way to cut, or a sink without a window.
    """

    timesteps: tuple[int, ...] = DISTILLED_STEPS
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS
    block_frames: int = 3
    blocks: str = "first_plus_one"
    num_cached_blocks: int | None = 2
    sink: bool = True

    stochastic: ClassVar[bool] = False
    context_sigma: ClassVar[float] = 0.0  # clean blocks write the state as they are, in training as well

    def __post_init__(self):
        require_positive("num_train_timesteps", self.num_train_timesteps)
        cached = self.num_cached_blocks
        for name, value in (
            ("block_frames", self.block_frames),
            ("num_cached_blocks", 1 if cached is None else cached),
        ):
            if type(value) is not int or value < 1:
                raise UserError(f"{name}={value!r} must be a whole number of 1 or more; SANA-WM's blocks have 3 frames")
        if self.sink and cached is None:
            raise UserError("sink=True without num_cached_blocks: all earlier blocks are seen anyway; set sink=False")
        chunk_starts(1, self.block_frames, self.blocks)
        steps = listed_schedule(self.timesteps, self.num_train_timesteps).timesteps
        object.__setattr__(self, "timesteps", tuple(round(float(step)) for step in steps))

    @property
    def num_inference_steps(self) -> int:
        """The number of steps."""
        return len(self.timesteps)

    def block_starts(self, num_frames: int) -> tuple[int, ...]:
        """First latent frame of every block of a video."""
        return chunk_starts(num_frames, self.block_frames, self.blocks)

    def schedule(self, num_inference_steps: int | None = None) -> Schedule:
        """The listed steps.

        Raises:
            UserError: another number of steps than are listed.
        """
        steps = self.num_inference_steps if num_inference_steps is None else require_steps(num_inference_steps)
        if steps != self.num_inference_steps:
            raise UserError(
                f"num_inference_steps {steps} is not allowed; this model was distilled to the "
                f"{self.num_inference_steps} steps at {self.timesteps}: leave the number out, or list other timesteps"
            )
        return listed_schedule(self.timesteps, self.num_train_timesteps)

    def init(self, latents: Float[Array, "B *X"]) -> LatentState:
        """The state before the first step, from standard normal latents."""
        return LatentState(jnp.asarray(latents, jnp.float32))

    def step(
        self,
        schedule: Schedule,
        state: LatentState,
        index: int | Int[Array, ""],
        velocity: Float[Array, "B *X"],
        noise: None = None,
    ) -> LatentState:
        """One step of Euler's method in float32, of all frames alike."""
        refuse_noise(self, noise)
        size = entry(schedule.sigmas, index + 1) - entry(schedule.sigmas, index)
        return LatentState(state.latents + size * latents_like(state, velocity))


def euler_step(
    latents: Float[Array, "B T H W C"],
    velocity: Float[Array, "B T H W C"],
    sigma: Float[Array, "T"],
    next_sigma: Float[Array, "T"],
) -> Float[Array, "B T H W C"]:
    """``x − (σ − σ_next)·velocity`` with levels of each frame, float32; frames whose level stays are left as they are.

    Args:
        latents: noised latents.
        velocity: of the network.
        sigma: level of every frame.
        next_sigma: level to which it goes.
    """
    change = (jnp.asarray(next_sigma, jnp.float32) - jnp.asarray(sigma, jnp.float32))[:, None, None, None]
    latents = latents.astype(jnp.float32)
    return jnp.where(change == 0, latents, latents + change * velocity.astype(jnp.float32))


def generate_block(
    velocity_fn: BlockVelocity,
    state: PyTree,
    latents: Float[Array, "B T H W C"],
    schedule: Schedule,
    given: Float[Array, "B G H W C"] | None = None,
) -> Float[Array, "B T H W C"]:
    """One block, clean, float32. The state is read and not written; ``read_block`` writes it.

    Args:
        velocity_fn: the network at this block.
        state: what the blocks before have left.
        latents: standard normal.
        schedule: the steps; of it ``sigmas`` and ``timesteps`` are read.
        given: clean first frames of the block, which stay as they are.
    """
    batch, frames = latents.shape[:2]
    latents = jnp.asarray(latents, jnp.float32)
    count = 0 if given is None else given.shape[1]
    if given is not None:
        latents = jnp.concatenate([given.astype(jnp.float32), latents[:, count:]], axis=1)
    open_frames = jnp.arange(frames) >= count
    sigmas, timesteps = jnp.asarray(schedule.sigmas), jnp.asarray(schedule.timesteps)

    def step(latents, levels):
        timestep, sigma, next_sigma = levels
        times = jnp.broadcast_to(jnp.where(open_frames, timestep, 0), (batch, frames))
        velocity, _ = velocity_fn(latents, times, state)
        return euler_step(latents, velocity, *(jnp.where(open_frames, x, 0) for x in (sigma, next_sigma))), None

    return jax.lax.scan(step, latents, (timesteps, sigmas[:-1], sigmas[1:]))[0]


def read_block(velocity_fn: BlockVelocity, state: PyTree, block: Float[Array, "B T H W C"]) -> PyTree:
    """The state after the pass at timestep 0 on a clean block.

    Args:
        velocity_fn: the network at this block.
        state: what the blocks before have left.
        block: its clean latents.
    """
    return velocity_fn(block, jnp.zeros(block.shape[:2], jnp.float32), state)[1]
