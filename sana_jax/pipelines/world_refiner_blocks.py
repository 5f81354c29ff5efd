"""One block of SANA-WM's refiner with its network: pure functions with an explicit state of fixed shapes.

::

    state = capture_sink(...)                    # once
    block = denoise_block(..., state)            # for every block: from the first stage's latents and noise
    state = read_block(..., block, state)        # the same block for those behind it

All blocks of a video have one shape, the last one filled up, so that each function is compiled once. The state after a
block follows from the sink and the refined blocks alone, so that a run can go on from those; the state itself, 0.7 GB
for each frame of 704x1280 in bfloat16, need not be kept.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int, PyTree
from sana_jax.diffusion.samplers.base import Schedule
from sana_jax.diffusion.samplers.world_refiner import RefinerSampler, refine_from_noise
from sana_jax.models.ltx2 import ROTATED, UNROTATED, LTX2VideoTransformer
from sana_jax.models.ltx2_config import LTX2Config
from sana_jax.models.ltx2_prefix import LTX2Prefix, append_history, init_prefix
from sana_jax.nn.ltx2_rope import GridRotation

_NOISE = 2**31 + 3  # apart from the noise of other pipelines


class BlockPlace(NamedTuple):
    """Where a block is in its video: arguments of the network, so that another block is no other program.

    Attributes:
        rotation: positions of the block's own frames.
        sink_rotation: positions of the sink for this block.
        frames: how many of the block's frames there are; the others fill a last block up.
    """

    rotation: GridRotation
    sink_rotation: GridRotation
    frames: Int[np.ndarray, ""]


def block_place(
    config: LTX2Config, sampler: RefinerSampler, size: tuple[int, int], block: int, frames: int, fps: float
) -> BlockPlace:
    """The place of a block.

    Args:
        config: the network's.
        sampler: how the video is cut.
        size: rows and columns of a latent frame.
        block: its index.
        frames: how many of its frames there are.
        fps: frames of pixels per second.
    """
    first = sampler.sink_frames + block * sampler.block_frames
    return BlockPlace(
        config.rotation((sampler.block_frames, *size), fps=fps, first_frame=first),
        config.rotation((sampler.sink_frames, *size), fps=fps, first_frame=sampler.sink_position(block)),
        np.int32(frames),
    )


def capture_sink(
    transformer: LTX2VideoTransformer,
    params: PyTree,
    sink: Float[Array, "B T H W C"],
    prompt: Float[Array, "B L D"],
    rotation: GridRotation,
    history_frames: int,
) -> LTX2Prefix:
    """The state before the first block: keys and values of the sink's raw latents, and an empty history.

    Args:
        transformer: the network.
        params: its parameters.
        sink: the video's first latent frames.
        prompt: the text connectors' output.
        rotation: of the sink's frames, from position 0 on.
        history_frames: frames that the history is to hold at most.
    """
    times = jnp.zeros(sink.shape[0], jnp.float32)
    variables = {"params": params}
    _, captured = transformer.apply(variables, sink, prompt, times, rotation=rotation, capture=UNROTATED)
    return init_prefix(captured, sink.shape[1], history_frames)


def denoise_block(
    transformer: LTX2VideoTransformer,
    params: PyTree,
    latents: Float[Array, "B T H W C"],
    noise: Float[Array, "B T H W C"],
    prompt: Float[Array, "B L D"],
    place: BlockPlace,
    state: LTX2Prefix,
    schedule: Schedule,
) -> Float[Array, "B T H W C"]:
    """The refined block; the state is read and not written.

    Args:
        transformer: the network.
        params: its parameters.
        latents: the first stage's, in the network's dtype, filled up to a whole block.
        noise: standard normal, the same shape.
        prompt: the text connectors' output.
        place: where the block is.
        state: what the blocks before have left.
        schedule: the noise levels.
    """

    def velocity(x: Array, timestep: Array) -> Array:
        times = jnp.broadcast_to(timestep, x.shape[:1])
        return transformer.apply({"params": params}, x, prompt, times, **seen_by_block(x, place, state))

    return refine_from_noise(velocity, latents, noise, schedule)


def read_block(
    transformer: LTX2VideoTransformer,
    params: PyTree,
    block: Float[Array, "B T H W C"],
    prompt: Float[Array, "B L D"],
    place: BlockPlace,
    state: LTX2Prefix,
) -> LTX2Prefix:
    """The state after a refined block: its keys and values join the history, and what is too old leaves it."""
    times = jnp.zeros(block.shape[0], jnp.float32)
    variables = {"params": params}
    _, captured = transformer.apply(
        variables, block, prompt, times, **seen_by_block(block, place, state), capture=ROTATED
    )
    return append_history(state, captured, place.frames)


def seen_by_block(x: Float[Array, "B T H W C"], place: BlockPlace, state: LTX2Prefix) -> dict[str, object]:
    """What a block's tokens see, as the network's arguments."""
    valid = jnp.broadcast_to(jnp.arange(x.shape[1]) < place.frames, x.shape[:2])
    return {
        "rotation": place.rotation,
        "frame_valid_mask": valid,
        "prefix": state,
        "sink_rotation": place.sink_rotation,
    }


def block_noise(seed: int, block: int, batch: int, shape: tuple[int, ...]) -> Float[Array, "B T H W C"]:
    """Unit normal noise of one block of each video: a function of the seed, the block and the video's place alone."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _NOISE), block)
    draw = jax.vmap(lambda video: jax.random.normal(jax.random.fold_in(key, video), shape, jnp.float32))
    return draw(jnp.arange(batch))


def filled_up(block: Float[Array, "B T H W C"], sampler: RefinerSampler) -> Float[Array, "B T H W C"]:
    """A last block with zeros behind its frames."""
    missing = sampler.block_frames - block.shape[1]
    return jnp.pad(jnp.asarray(block), ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)))
