"""One refinement while it is made: the first stage's latent frames go in as they come, refined blocks come out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float
from sana_jax.diffusion.samplers.world_refiner import RefinerSampler
from sana_jax.diffusion.sampling import plain_truth
from sana_jax.errors import UserError
from sana_jax.models.ltx2_prefix import LTX2Prefix
from sana_jax.pipelines.checks import check_finite
from sana_jax.pipelines.world_refiner_checkpoint import RefinerCheckpoint

if TYPE_CHECKING:
    from sana_jax.pipelines.world_refiner import SanaWMRefiner

BlockEndCallback = Callable[["SanaWMRefiner", int, dict[str, Any]], Any]


class RefinedBlock(NamedTuple):
    """A block of the video.

    Attributes:
        index: from 0 behind the sink.
        latents: in the network's dtype, perhaps still being computed; as they were kept, of a block that was.
        was_kept: whether an earlier run has refined it.
    """

    index: int
    latents: Float[Array, "B T H W C"]
    was_kept: bool


class RefinerRun:
    """Refines the blocks of one video, or of several with one prompt, in their order.

    A block is refined as soon as all its frames are there. Nothing is waited for: results are arrays that the device
    may still be at work on. What is remembered of the video has one size from the first block to the last.

    Args:
        refiner: the pipeline.
        sampler: how the video is cut.
        num_frames: latent frames of the whole video.
        noise: (block, frames of it) -> its noise.
        prompt_embeds: from ``encode_prompt``, one for each video.
        fps: frames of pixels per second.
        kept: block -> what an earlier run has made of it, in float32. They are read again, not refined.

    Attributes:
        ends: first latent frame and end of every block.
        sink: the first frames, which are not refined, in the network's dtype; None until they are there.
        state: what the blocks so far have left; None until the sink is there.
    """

    def __init__(
        self,
        refiner: SanaWMRefiner,
        sampler: RefinerSampler,
        num_frames: int,
        noise: Callable[[int, int], Float[Array, "B T H W C"]],
        prompt_embeds: Float[Array, "B L D"],
        fps: float,
        kept: Mapping[int, Float[np.ndarray, "B T H W C"]] | None = None,
    ) -> None:
        self.ends = sampler.blocks(num_frames)
        self.sink: Float[Array, "B S H W C"] | None = None
        self.state: LTX2Prefix | None = None
        self._refiner, self._sampler, self._noise, self._fps = refiner, sampler, noise, fps
        self._embeds, self._kept = prompt_embeds, kept or {}
        self._waiting: Any = None  # frames of a block that is not whole
        self._done = 0

    def push(self, latents: Float[Array, "B T H W C"]) -> Iterator[RefinedBlock]:
        """Takes the first stage's next frames, and gives every block that is whole with them, one after another.

        All that it gives must be taken before the next frames are pushed.
        """
        self._waiting = latents if self._waiting is None else jnp.concatenate([self._waiting, latents], axis=1)
        if self.sink is None:
            if self._waiting.shape[1] < self._sampler.sink_frames:
                return
            sink = self._take(self._sampler.sink_frames)
            self.sink = jnp.asarray(sink).astype(self._refiner.transformer.dtype)
            self.state = self._refiner.start(sink, self._embeds, self._sampler, self._fps)
        while self._done < len(self.ends):
            first, end = self.ends[self._done]
            if self._waiting.shape[1] < end - first:
                return
            yield self._next(self._take(end - first))

    def _take(self, frames: int) -> Float[Array, "B T H W C"]:
        taken, self._waiting = self._waiting[:, :frames], self._waiting[:, frames:]
        return taken

    def _next(self, latents: Float[Array, "B T H W C"]) -> RefinedBlock:
        block, refiner = self._done, self._refiner
        refined = self._kept.get(block)
        was_kept = refined is not None
        if not was_kept:
            noise = self._noise(block, latents.shape[1])
            refined = refiner.refine(latents, noise, block, self._embeds, self.state, self._sampler, self._fps)
        if block + 1 < len(self.ends):
            self.state = refiner.read(refined, block, self._embeds, self.state, self._sampler, self._fps)
        self._done += 1
        return RefinedBlock(block, refined, was_kept)


def refine_whole(
    run: RefinerRun,
    refiner: SanaWMRefiner,
    video: Float[np.ndarray, "B T H W C"],
    checkpoint: RefinerCheckpoint | None,
    callback: BlockEndCallback | None,
    say: Callable[[str], None],
) -> tuple[list[Float[np.ndarray, "B T H W C"]], list[float]]:
    """Refines a video that is there as a whole: (its refined blocks in float32, the seconds of those refined now).

    Args:
        run: from its beginning.
        refiner: the pipeline.
        video: the first stage's latents.
        checkpoint: keeps every block.
        callback: as in the pipeline's call.
        say: prints a line.
    """
    blocks: list[np.ndarray] = []
    seconds: list[float] = []
    begin, compiled = time.perf_counter(), refiner.compile_seconds
    for found in run.push(video):
        count = len(run.ends)
        refined = np.asarray(jnp.asarray(found.latents).astype(jnp.float32))
        blocks.append(refined)
        if not found.was_kept:
            check_finite(f"block {found.index + 1} of {count}", refined, refiner.made)
            if checkpoint is not None:
                checkpoint.save(found.index, refined)
        jax.block_until_ready(run.state.appended)
        if not found.was_kept:
            seconds.append(time.perf_counter() - begin - (refiner.compile_seconds - compiled))
            say(f"block {found.index + 1} of {count} refined in {seconds[-1]:.1f} s")
            if callback is not None and not goes_on(callback(refiner, found.index, shown_latents(refined))):
                break
        begin, compiled = time.perf_counter(), refiner.compile_seconds
    return blocks, seconds


def shown_latents(latents: Float[np.ndarray, "B T H W C"]) -> dict[str, Float[np.ndarray, "B C T H W"]]:
    """What a callback is shown of a block."""
    return {"latents": np.moveaxis(latents, -1, 1)}


def goes_on(answer: Any) -> bool:
    """Whether a callback's answer lets the video go on; raises ``UserError`` for one that would not be used."""
    answer = plain_truth(answer)
    if answer is not None and answer is not False:
        raise UserError(
            f"callback_on_block_end returned {answer!r}, which would not be used: allowed is None, or False to stop"
        )
    return answer is None
