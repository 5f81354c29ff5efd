"""SANA-WM's blocks of one video all sampled at once, each some steps behind the one before; as recorded, not offered.

Source: the sampling code of NVlabs/Sana, as recorded in this repository's vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float
from sana_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS
from sana_jax.diffusion.samplers import Schedule
from sana_jax.diffusion.samplers.world_model import euler_step

NOT_STARTED = -1.0  # in place of a timestep


class Staircase(NamedTuple):
    """Steps of all blocks of a video, each some steps behind the one before.

    Attributes:
        starts: the first step of every block, int64 (blocks,).
        timesteps: what the network is told of a block at a step, float32 (blocks, steps); ``NOT_STARTED`` before its
            first, 0 after its last.
    """

    starts: np.ndarray
    timesteps: np.ndarray

    def active(self, step: int) -> int:
        """How many blocks, from the first on, have started at a step."""
        return int((self.starts <= step).sum())


def staircase(num_blocks: int, schedule: Schedule, interval: float) -> Staircase:
    """Lets every block begin ``interval`` of a run behind the one before; all of them run at the same time.

    Args:
        num_blocks: causal blocks of the video.
        schedule: the steps of one block.
        interval: as a share of a block's steps: 1 is one block after another, 0 all at once.
    """
    steps = schedule.num_inference_steps
    starts = np.array([int(block * interval * steps) for block in range(num_blocks)], np.int64)
    timesteps = np.full((num_blocks, starts[-1] + steps), NOT_STARTED, np.float32)
    for block, start in enumerate(starts):
        timesteps[block, start : start + steps] = schedule.timesteps
        timesteps[block, start + steps :] = 0
    return Staircase(starts, timesteps)


def staircase_step(
    plan: Staircase,
    step: int,
    block_starts: Sequence[int],
    latents: Float[Array, "B T H W C"],
    velocity_fn: Callable[[Float[Array, "B A H W C"], Float[Array, "B A"]], Float[Array, "B A H W C"]],
    given_frames: int,
) -> Float[Array, "B T H W C"]:
    """One step of all blocks that have started; the others keep their noise.

    Args:
        plan: which block is where.
        step: the step, in the plan's columns.
        block_starts: the first frame of every block.
        latents: of the whole video, float32.
        velocity_fn: the network on the frames of the blocks that have started, of which there are A.
        given_frames: clean first frames, which stay as they are.
    """
    frames, active = latents.shape[1], plan.active(step)
    ends = [*block_starts[1:], frames]
    lengths = np.diff([0, *ends[:active]])
    now = np.repeat(plan.timesteps[:active, step], lengths)
    last = step + 1 == plan.timesteps.shape[1]
    after = np.zeros_like(now) if last else np.repeat(plan.timesteps[:active, step + 1], lengths)
    now[:given_frames] = after[:given_frames] = 0
    seen = latents[:, : len(now)]
    velocity = velocity_fn(seen, jnp.broadcast_to(jnp.asarray(now), (len(latents), len(now))))
    levels = np.float32(NUM_TRAIN_TIMESTEPS)
    stepped = euler_step(seen, velocity, now / levels, after / levels)
    return jnp.concatenate([stepped, latents[:, len(now) :]], axis=1)
