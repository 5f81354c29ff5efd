"""How SANA-WM's streaming student is sampled while it is distilled: the same recipes as LongSANA's train it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp

from kernels.typing import Array, Float, PyTree
from sana_jax.diffusion.samplers import WorldStreamSampler
from sana_jax.diffusion.samplers.world_model import generate_block, read_block
from sana_jax.models.sana_wm import SanaWMTransformer
from train.batch import CAMERA, FIRST_FRAME, PLUCKER
from train.objectives.longsana.networks import block_network, empty_state
from train.objectives.longsana.world import WorldCaptions
from train.recipes.base import Prompts


def world_few_step_sampling(
    transformer: SanaWMTransformer, sampler: WorldStreamSampler
) -> Callable[[PyTree, Float[Array, "B T H W C"], Prompts, Mapping[str, Array]], Float[Array, "B T H W C"]]:
    """``fn(params, latents, prompts, conditions)`` -> latents: a whole video, block after block, to be jitted.

    ``conditions`` are the camera's path and the first frame, ``FIRST_FRAME``, which stays as it is. Nothing is random
    but the latents, so that a video is the pipeline's of the same noise.
    """
    network = block_network(transformer)

    def sample(
        params: PyTree, latents: Array, prompts: Prompts, conditions: Mapping[str, Array]
    ) -> Float[Array, "B T H W C"]:
        camera, first = (conditions[CAMERA], conditions.get(PLUCKER)), conditions[FIRST_FRAME]
        captions = WorldCaptions(prompts.embeds, prompts.mask, *camera, first)
        frames, schedule = latents.shape[1], sampler.schedule()
        starts, found = sampler.block_starts(frames), []
        state = empty_state(transformer, latents.shape, starts, sampler.num_cached_blocks, sampler.sink)
        for start, end in zip(starts, (*starts[1:], frames), strict=True):

            def velocity(noisy, timestep, state, start=start):
                return network(params, noisy, timestep, captions, state, start)

            given = first if start == 0 else None
            found.append(generate_block(velocity, state, latents[:, start:end], schedule, given))
            state = read_block(velocity, state, found[-1])
        return jnp.concatenate(found, axis=1)

    return sample
