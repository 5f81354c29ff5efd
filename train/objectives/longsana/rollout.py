"""Self-forcing's rollout: the generator makes a video from noise, block after block, with the state of its own blocks.

Each block is denoised up to an exit step. Gradients pass through that step alone: not through the steps before, not
through the state. The block that comes out is the exit step's clean prediction; a pass on it, which LongSANA noises a
little, writes the state for the next block (self-forcing, arXiv 2506.08009, algorithm 1). Given frames are left alone.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int, PyTree
from sana_jax.diffusion.flow import add_noise, x0_from_velocity
from sana_jax.diffusion.samplers import LongSanaSampler, WorldStreamSampler
from sana_jax.diffusion.samplers.longsana import read_block
from train.objectives.longsana.networks import BlockNetwork, State, Told, made_frames
from train.randomness import stream


class RolloutDraws(NamedTuple):
    """What is random about a rollout of T frames in K blocks with n steps, all standard normal but the last."""

    start: Float[Array, "B T H W C"]
    """Where the blocks begin."""
    between: Float[Array, "B n-1 T H W C"] | None
    """Noise after each step but the last; None where it stays that of the step before."""
    context: Float[Array, "B T H W C"] | None
    """Noise of the pass that writes the state; None where it has none."""
    exit_step: Int[Array, "B K"]
    """The exit step of each block, the same in every row."""


def exit_steps(
    drawn: Int[Array, " K"], num_steps: int, *, same_for_all_blocks: bool = True, always_last: bool = False
) -> Int[Array, " K"]:
    """The exit steps of the blocks, from one drawn for each in [0, num_steps)."""
    if always_last:
        return jnp.full_like(drawn, num_steps - 1)
    return jnp.full_like(drawn, drawn[0]) if same_for_all_blocks else drawn


class RolloutSettings(NamedTuple):
    """What is drawn of a rollout, and what stands in place of what is not."""

    same_for_all_blocks: bool = True
    """One exit step for all blocks."""
    always_last: bool = False
    """No exit step is drawn: it is the last."""
    fresh_noise: bool = True
    """Whether there is ``between``."""
    context_noise: bool = True
    """Whether there is ``context``."""


def draw_rollout(
    seed: int,
    step: int | Int[Array, ""],
    name: str,
    shape: tuple[int, ...],
    num_blocks: int,
    num_steps: int,
    settings: RolloutSettings,
) -> RolloutDraws:
    """Draws from the streams ``{name}_start``, ``{name}_between``, ``{name}_context`` and ``{name}_exit``.

    Args:
        seed: the run's.
        step: the training step.
        name: which rollout.
        shape: of the latents, (B, T, H, W, C).
        num_blocks: K.
        num_steps: of the sampler, n.
        settings: what is drawn.
    """

    def normal(what, shape):
        return jax.random.normal(stream(seed, step, f"{name}_{what}"), shape, jnp.float32)

    drawn = jax.random.randint(stream(seed, step, f"{name}_exit"), (num_blocks,), 0, num_steps)
    exits = {"same_for_all_blocks": settings.same_for_all_blocks, "always_last": settings.always_last}
    steps = exit_steps(drawn, num_steps, **exits)
    return RolloutDraws(
        start=normal("start", shape),
        between=normal("between", (shape[0], num_steps - 1, *shape[1:])) if settings.fresh_noise else None,
        context=normal("context", shape) if settings.context_noise else None,
        exit_step=jnp.broadcast_to(steps, (shape[0], num_blocks)),
    )


class Block(NamedTuple):
    """One block's part of the draws, and where it begins."""

    start: Float[Array, "B T H W C"]
    between: Float[Array, "B n-1 T H W C"] | None
    context: Float[Array, "B T H W C"] | None
    exit_step: Int[Array, ""]
    first_frame: Int[Array, ""]


def rollout_block(
    network: BlockNetwork,
    params: PyTree,
    captions: Told,
    state: State,
    block: Block,
    sampler: LongSanaSampler | WorldStreamSampler,
    *,
    state_from_last_step: bool = False,
) -> tuple[Float[Array, "B T H W C"], State]:
    """One block: its clean prediction at the exit step, which alone gradients pass through, and the state after it.

    Only the steps up to the exit step are computed, however late it may be.

    Args:
        network: the generator.
        params: its parameters.
        captions: of each row.
        state: what the blocks before have left.
        block: draws.
        sampler: the steps.
        state_from_last_step: go on to the last step, without gradients, and write the state from its prediction.
    """
    shape, last = block.start.shape, sampler.num_inference_steps - 1
    schedule = sampler.schedule()
    timesteps, sigmas = jnp.asarray(schedule.timesteps), jnp.asarray(schedule.sigmas)
    fixed, state = jax.lax.stop_gradient((params, state))
    made = made_frames(captions, shape[1], block.first_frame)

    def of_frames(value):  # what is given is clean
        return value if made is None else jnp.broadcast_to(jnp.where(made, value, 0.0), shape[:2])

    def velocity(of, noisy, timestep, state):
        timestep = of_frames(timestep) if made is not None else jnp.broadcast_to(timestep, shape[:1])
        return network(of, noisy, timestep, captions, state, block.first_frame)

    def clean_at(of, noisy, index):
        return x0_from_velocity(noisy, velocity(of, noisy, timesteps[index], state)[0], of_frames(sigmas[index]))

    def noised_to(index, noisy, clean):  # ``noisy`` is what the step before was given
        if block.between is not None:
            return add_noise(clean, block.between[:, index - 1], of_frames(sigmas[index]))
        return clean + sigmas[index] / sigmas[index - 1] * (noisy - clean)

    def advance(index, noisy):
        return noised_to(index + 1, noisy, clean_at(fixed, noisy, index))

    def refine(index, noisy_and_clean):
        noisy = noised_to(index, *noisy_and_clean)
        return noisy, clean_at(fixed, noisy, index)

    noisy = block.start
    if made is not None:
        noisy = jnp.where(made[:, None, None, None], noisy, captions.given.astype(noisy.dtype))
    if last > 0:  # a loop whose length is known only when it runs: no step is computed in vain
        noisy = jax.lax.stop_gradient(jax.lax.fori_loop(0, block.exit_step, advance, noisy))
    clean = clean_at(params, noisy, block.exit_step)

    final = jax.lax.stop_gradient(clean)
    if state_from_last_step and last > 0:
        _, final = jax.lax.fori_loop(block.exit_step + 1, last + 1, refine, (noisy, final))
    read = functools.partial(velocity, fixed)
    state = read_block(read, state, final, sigma=sampler.context_sigma, noise=block.context)
    return clean, jax.lax.stop_gradient(state)


def rollout(
    network: BlockNetwork,
    params: PyTree,
    captions: Told,
    state: State,
    draws: RolloutDraws,
    sampler: LongSanaSampler | WorldStreamSampler,
    block_starts: tuple[int, ...],
    *,
    first_frame: int | Int[Array, ""] = 0,
    state_from_last_step: bool = False,
) -> tuple[Float[Array, "B T H W C"], State]:
    """The video, with gradients to ``params``, and the state after its last block.

    Blocks of one length that follow one another are one ``lax.scan``, so that a rollout compiles a block of each length
    once.

    Args:
        network: the generator.
        params: its parameters.
        captions: of each row.
        state: what earlier blocks have left; ``init_state`` at the beginning of a video.
        draws: what is random.
        sampler: the steps.
        block_starts: the first frame of every block, from 0.
        first_frame: position of the first frame in the whole video; may be traced.
        state_from_last_step: see ``rollout_block``.
    """
    frames = draws.start.shape[1]
    lengths = np.diff((*block_starts, frames))

    def one(state, block):
        found, state = rollout_block(
            network, params, captions, state, block, sampler, state_from_last_step=state_from_last_step
        )
        return state, found

    videos, start, number = [], 0, 0
    for length, group in itertools.groupby(int(length) for length in lengths):
        count = len(list(group))
        blocks = _blocks(draws, start, number, count, length, first_frame)
        if count == 1:
            state, video = one(state, jax.tree.map(lambda array: array[0], blocks))
        else:
            state, video = jax.lax.scan(one, state, blocks)
            video = jnp.moveaxis(video, 0, 1).reshape(video.shape[1], count * length, *video.shape[3:])
        videos.append(video)
        start, number = start + count * length, number + count
    return jnp.concatenate(videos, axis=1), state


def _blocks(draws: RolloutDraws, start: int, number: int, count: int, length: int, first_frame) -> Block:
    """``count`` blocks of one length, from frame ``start`` and block ``number`` on, on a leading axis."""
    stop = start + count * length

    def cut(array, axis):
        array = jax.lax.slice_in_dim(array, start, stop, axis=axis)
        shape = (*array.shape[:axis], count, length, *array.shape[axis + 1 :])
        return jnp.moveaxis(array.reshape(shape), axis, 0)

    firsts = jnp.asarray(first_frame, jnp.int32) + start + length * jnp.arange(count, dtype=jnp.int32)
    exits = draws.exit_step[0, number : number + count]
    between = None if draws.between is None else cut(draws.between, 2)
    context = None if draws.context is None else cut(draws.context, 1)
    return Block(cut(draws.start, 1), between, context, exits, firsts)
