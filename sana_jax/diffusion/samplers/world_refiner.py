"""The steps of SANA-WM's refiner: block after block, from a noised first stage to clean, with earlier frames in sight.

The first frames of the video are the *sink*: they stay as they are. Every block of latent frames after them is noised
to the first level and goes to clean in a few Euler steps; what it has become is read once more, at timestep 0, for the
blocks behind it. Each block sees the sink, the last refined frames (the *history*) and itself, so that its cost does
not depend on the video's length.

Sources: SANA-WM's second stage; LTX-2 (arXiv 2601.03233) for the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float
from sana_jax.diffusion.samplers.base import Schedule
from sana_jax.errors import UserError

# What the published refiner was distilled with.
SIGMAS = (0.909375, 0.725, 0.421875, 0.0)
BLOCK_FRAMES, SINK_FRAMES, WINDOW_FRAMES = 3, 1, 11

# (latents (B, T, H, W, C), timestep ()) -> velocity: closes over the network, its parameters and what the block sees
RefinerVelocity = Callable[[Float[Array, "B T H W C"], Float[Array, ""]], Float[Array, "B T H W C"]]


@dataclasses.dataclass(frozen=True)
class RefinerSampler:
    """How a video is cut into blocks, what each sees, and its noise levels; the defaults are the published refiner's.

    Attributes:
        sigmas: noise levels from the first to 0, in units of sigma; a step leads from each to the next.
        block_frames: latent frames of a block; the last block of a video may have fewer.
        sink_frames: first latent frames of the video, which every block sees and which are not refined.
        window_frames: latent frames of sink and history together, at most. The block itself comes on top.

    Raises:
        UserError: levels that do not decrease from at most 1 to 0, numbers below 1, or a window without a history.
    """

    sigmas: tuple[float, ...] = SIGMAS
    block_frames: int = BLOCK_FRAMES
    sink_frames: int = SINK_FRAMES
    window_frames: int = WINDOW_FRAMES

    def __post_init__(self):
        if self.block_frames is None:
            raise UserError(
                "block_size=None, all frames in a single shot, is not allowed: the refiner was trained block by block, "
                "with a window of earlier frames at positions that slide, and turns a whole video at once into "
                f"something else; leave it out for the trained {BLOCK_FRAMES} latent frames"
            )
        for name, value in (("block_size", self.block_frames), ("sink_size", self.sink_frames)):
            _check_whole_number(name, value, 1, "latent frames")
        _check_whole_number("kv_max_frames", self.window_frames, self.sink_frames + 1, "latent frames, sink included")
        object.__setattr__(self, "sigmas", _checked_sigmas(self.sigmas))

    @property
    def history_frames(self) -> int:
        """Refined latent frames that a block sees, at most."""
        return self.window_frames - self.sink_frames

    @property
    def is_published(self) -> bool:
        """Whether this is what the published refiner was trained for."""
        return self == RefinerSampler()

    def blocks(self, num_frames: int) -> tuple[tuple[int, int], ...]:
        """First latent frame and end of every block of a video.

        Raises:
            UserError: there is no frame behind the sink.
        """
        if num_frames <= self.sink_frames:
            raise UserError(
                f"{num_frames} latent frames with sink_size={self.sink_frames}, which are not refined; allowed are "
                f"{self.sink_frames + 1} or more: give a longer video, or a smaller sink_size"
            )
        starts = range(self.sink_frames, num_frames, self.block_frames)
        return tuple((start, min(start + self.block_frames, num_frames)) for start in starts)

    def sink_position(self, block: int) -> int:
        """The position of the sink's first frame for a block, counted from 0: right before the history's."""
        frames = block * self.block_frames
        return frames - min(frames, self.history_frames)

    def schedule(self, timestep_multiplier: float = 1000.0) -> Schedule:
        """The steps; timesteps are ``sigma · timestep_multiplier``, fractions included."""
        sigmas = np.array(self.sigmas, np.float32)
        timesteps = (sigmas[:-1].astype(np.float64) * timestep_multiplier).astype(np.float32)
        return Schedule(timesteps, sigmas)


def refine_from_noise(
    velocity_fn: RefinerVelocity,
    latents: Float[Array, "B T H W C"],
    noise: Float[Array, "B T H W C"],
    schedule: Schedule,
) -> Float[Array, "B T H W C"]:
    """One block, clean: noised to the first level, then one Euler step after another.

    Args:
        velocity_fn: the network at this block.
        latents: the first stage's, in the network's dtype, to which every intermediate result is rounded.
        noise: standard normal.
        schedule: from ``RefinerSampler.schedule``; its arrays may be traced.
    """
    sigmas = jnp.asarray(schedule.sigmas)

    def step(x: Array, own: tuple[Array, Array, Array]) -> tuple[Array, None]:
        timestep, sigma, following = own
        return refiner_step(x, velocity_fn(x, timestep), sigma, following), None

    steps = (jnp.asarray(schedule.timesteps), sigmas[:-1], sigmas[1:])
    return jax.lax.scan(step, noised_block(latents, noise, sigmas[0]), steps)[0]


def noised_block(
    latents: Float[Array, "B T H W C"], noise: Float[Array, "B T H W C"], sigma: Float[Array, ""]
) -> Float[Array, "B T H W C"]:
    """Latents at a noise level, in their dtype."""
    return ((1 - sigma) * latents.astype(jnp.float32) + sigma * noise.astype(jnp.float32)).astype(latents.dtype)


def refiner_step(
    x: Float[Array, "B T H W C"],
    velocity: Float[Array, "B T H W C"],
    sigma: Float[Array, ""],
    following: Float[Array, ""],
) -> Float[Array, "B T H W C"]:
    """One Euler step from one noise level to the following; what is clean is rounded to ``x``'s dtype on the way."""
    wide = x.astype(jnp.float32)
    clean = (wide - velocity.astype(jnp.float32) * sigma).astype(x.dtype).astype(jnp.float32)
    return (wide + (following - sigma) * ((wide - clean) / sigma)).astype(x.dtype)


def _check_whole_number(name: str, value: Any, least: int, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise UserError(f"{name}={value!r} is not allowed; allowed is a whole number of {unit} from {least} on")


def _checked_sigmas(sigmas: Any) -> tuple[float, ...]:
    try:
        given = tuple(sigmas)
        levels = () if any(isinstance(sigma, bool | np.bool_) for sigma in given) else tuple(map(float, given))
    except (TypeError, ValueError):
        levels = ()
    # In float32, in which they are used: two levels that are one there would divide nothing by nothing.
    falls = len(levels) > 1 and bool(np.all(np.diff(np.array(levels, np.float32)) < 0))
    if not falls or levels[0] > 1 or levels[-1] != 0:
        raise UserError(
            f"sigmas={sigmas!r} is not allowed; allowed are levels that decrease from at most 1 to a last 0, such as "
            f"{SIGMAS}"
        )
    return levels
