"""SANA-WM's refiner with LTX-2's blocks in host memory: the functions of ``world_refiner_blocks``, block by block.

What is computed is the same, layer for layer; each block of the network is a call of one compiled program, while the
next block's parameters are copied to the device. Keys and values stay on the device as they do otherwise, and every
layer's are put there as they are made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int
from sana_jax.diffusion.samplers.base import Schedule
from sana_jax.diffusion.samplers.world_refiner import noised_block, refiner_step
from sana_jax.models.ltx2 import ROTATED, UNROTATED, LTX2Block, LTX2VideoTransformer, Shared
from sana_jax.models.ltx2_prefix import LTX2Prefix, append_layer, init_prefix
from sana_jax.nn.ltx2_layers import KeysValues
from sana_jax.nn.ltx2_rope import GridRotation
from sana_jax.pipelines.world_refiner_blocks import BlockPlace, seen_by_block
from sana_jax.weights.streamed import StreamedResident

STREAMED_BLOCK = "streamed block"  # the program that nearly all of the time goes to
BLOCKS = "transformer_blocks"  # the key of LTX-2's parameters under which they are stacked

# (name for the printed lines, what it is, function, its arguments, donate=places) -> the function's result
Run = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class StreamedRefinement:
    """``capture_sink``, ``denoise_block`` and ``read_block`` of ``world_refiner_blocks``, block by block.

    Attributes:
        transformer: the network.
        weights: its parameters.
        run: runs a function in the program for its arguments' shapes.
    """

    transformer: LTX2VideoTransformer
    weights: StreamedResident
    run: Run

    def start(
        self,
        sink: Float[Array, "B T H W C"],
        prompt: Float[Array, "B L D"],
        rotation: GridRotation,
        history_frames: int,
    ) -> LTX2Prefix:
        """As ``capture_sink``."""
        x, shared, _ = self._enter(sink, prompt, np.zeros(sink.shape[0], np.float32), rotation=rotation)
        config, frames = self.transformer.config, sink.shape[1]
        size = (config.num_layers, *x.shape[:2], config.num_attention_heads, config.attention_head_dim)

        def empty():
            sink = KeysValues(jnp.zeros(size, x.dtype), jnp.zeros(size, x.dtype))
            return init_prefix(sink, frames, history_frames)

        state = self.run("room for keys and values", ("room", size, x.dtype, frames, history_frames), empty)
        return self._blocks(x, shared, state, UNROTATED, keep=True)[1]

    def refine(
        self,
        latents: Float[Array, "B T H W C"],
        noise: Float[Array, "B T H W C"],
        prompt: Float[Array, "B L D"],
        place: BlockPlace,
        state: LTX2Prefix,
        schedule: Schedule,
    ) -> Float[Array, "B T H W C"]:
        """As ``denoise_block``."""
        sigmas = np.asarray(schedule.sigmas)
        noised = self.run("noised latents", "noised", noised_block, latents, noise, sigmas[0])
        grid = latents.shape[1:4]
        transformer = self.transformer

        def step(outside, x, embedding, noised, sigma, following):
            velocity = transformer.apply({"params": outside}, x, embedding, grid, method="finish")
            return refiner_step(noised, velocity, sigma, following)

        for timestep, sigma, following in zip(np.asarray(schedule.timesteps), sigmas[:-1], sigmas[1:], strict=True):
            times = np.full(noised.shape[0], timestep, np.float32)
            x, shared, embedding = self._enter(noised, prompt, times, **seen_by_block(noised, place, state))
            x, _ = self._blocks(x, shared, state, ROTATED)
            arguments = (self.weights.params.outside, x, embedding, noised, sigma, following)
            noised = self.run("the refiner's step", ("step", grid), step, *arguments)
        return noised

    def read(
        self, block: Float[Array, "B T H W C"], prompt: Float[Array, "B L D"], place: BlockPlace, state: LTX2Prefix
    ) -> LTX2Prefix:
        """As ``read_block``; takes the memory of ``state``."""
        times = np.zeros(block.shape[0], np.float32)
        x, shared, _ = self._enter(block, prompt, times, **seen_by_block(block, place, state))
        _, state = self._blocks(x, shared, state, ROTATED, frames=place.frames, keep=True)
        return state._replace(appended=state.appended + jnp.asarray(place.frames, jnp.int32))

    def _enter(self, x: Array, prompt: Array, times: np.ndarray, **seen: Any) -> tuple[Array, Shared, Array]:
        """What comes before the blocks."""
        transformer = self.transformer

        def enter(outside, x, prompt, times, seen):
            return transformer.apply({"params": outside}, x, prompt, times, **seen, method="enter")

        name = f"what comes before the refiner's blocks, for {'x'.join(map(str, x.shape))}"
        return self.run(name, "enter", enter, self.weights.params.outside, x, prompt, times, seen)

    def _blocks(
        self,
        x: Float[Array, "B N D"],
        shared: Shared,
        state: LTX2Prefix,
        capture: str,
        *,
        frames: Int[np.ndarray, ""] | None = None,
        keep: bool = False,
    ) -> tuple[Float[Array, "B N D"], LTX2Prefix]:
        """Runs the blocks over tokens.

        Args:
            x: the tokens.
            shared: what all blocks are given.
            state: the prefix, which is seen where ``capture`` is ``rotated``.
            capture: ``unrotated`` for tokens that become the sink, ``rotated`` for others.
            frames: how many of the tokens' frames go into the history.
            keep: whether keys and values are kept, in the memory of ``state``.

        Returns:
            The tokens, and the state; its ``appended`` is as it was.
        """
        block, attends = LTX2Block(self.transformer.config, self.transformer.dtype), capture == ROTATED

        def run_block(own, x, shared, state, layer):
            parts = (state.sink, state.history)
            prefix = jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, layer, keepdims=False), parts)
            return block.apply({"params": own}, x, shared, prefix if attends else None, capture)

        put = append_layer if attends else _put_sink
        name = f"a block of the refiner for {x.shape[1]} tokens"
        for number, own in enumerate(self.weights.stream()):
            layer, before = np.int32(number), x
            x, captured = self.run(name, (STREAMED_BLOCK, capture), run_block, own, x, shared, state, layer)
            if keep:
                given = (state, layer, captured, frames) if attends else (state, layer, captured)
                state = self.run("keeping keys and values", ("keep", capture), put, *given, donate=(0,))
            before.block_until_ready()
        return x, state


def _put_sink(state: LTX2Prefix, layer: Int[Array, ""], captured: KeysValues) -> LTX2Prefix:
    put = jax.lax.dynamic_update_index_in_dim
    return state._replace(sink=KeysValues(*(put(stack, own, layer, 0) for stack, own in zip(state.sink, captured))))
