"""Self-forcing on windows of a growing video: what a window leaves is kept, beside the parameters, for the next.

``trained`` is the tree of ``train.objectives.longsana.self_forcing`` with a third part, ``stream``: a ``Stream``, which
no optimizer updates and every step replaces. Steps of the generator and of the fake score both take the next window.
``frozen`` is {"real": the real score's parameters, "autoencoder": what ``picture_of`` needs}.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.typing import Array, Bool, Float, Int, PyTree
from train.batch import Batch
from train.objectives.base import PhaseLosses
from train.objectives.longsana.networks import Captions
from train.objectives.longsana.self_forcing import SelfForcing, SelfForcingDraws, captions_of, real_captions_of
from train.objectives.longsana.windows import Windows, compared_frames, history_after

# (the autoencoder's parameters, last latent frames) -> their last pixel frame encoded by itself, (B, 1, H, W, C).
PictureOf = Callable[[PyTree, Float[Array, "B T H W C"]], Float[Array, "B 1 H W C"]]


class Stream(NamedTuple):
    """What a video's windows leave for the next."""

    state: Any
    """The generator's, a ``SanaVideoState``."""
    history: Float[Array, "B T H W C"]
    """The last frames."""
    captions: Captions
    """Of the video: a batch's prompts are read when a video begins."""
    real_captions: Captions


class Window(NamedTuple):
    """A window as the scores see it."""

    video: Float[Array, "B T H W C"]
    mask: Bool[Array, "B T"]
    stream: Stream


class StreamLosses(NamedTuple):
    """Losses of a step, and the stream after it."""

    losses: PhaseLosses
    stream: Stream


@dataclass(frozen=True)
class StreamingSelfForcing:
    """Losses of both phases on windows.

    Batches have latents of ``window_frames`` frames, of which only the shape is read.

    Attributes:
        losses: on whole videos.
        windows: of a video.
        picture_of: decodes, and encodes the last pixel frame alone.
    """

    losses: SelfForcing
    windows: Windows
    picture_of: PictureOf

    def init_stream(self, batch: Batch) -> Stream:
        """The stream before a video's first window, of fixed shapes."""
        state = self.losses.empty_state(batch.latents.shape)
        history = jnp.zeros(batch.latents.shape, jnp.float32)
        return Stream(state, history, captions_of(batch), real_captions_of(batch))

    def draw(self, phase: str, seed: int, step: int | Int[Array, ""], batch: Batch, *, first: bool) -> SelfForcingDraws:
        """What is random at a step of ``generator`` or ``critic``; ``first`` says whether its window is a video's."""
        new = None if first else self.windows.new_frames
        return self.losses.draw(phase, seed, step, batch.latents.shape, new)

    def next_window(
        self,
        params: PyTree,
        frozen: PyTree,
        stream: Stream,
        batch: Batch,
        draws: SelfForcingDraws,
        step: int | Int[Array, ""],
        *,
        first: bool,
    ) -> Window:
        """Rolls the next window out, with gradients to ``params``.

        Args:
            params: the generator's.
            frozen: see above.
            stream: of the window before; a first window reads nothing of it.
            batch: prompts, read by a first window alone.
            draws: what is random.
            step: says where in the video the window lies.
            first: whether it is a video's first; fixes shapes, so it cannot be traced.
        """
        shape = batch.latents.shape
        if first:
            stream = self.init_stream(batch)
        stream = jax.lax.stop_gradient(stream)
        position = self.windows.first_frame(step)
        new, state = self.losses.roll_out(params, stream.captions, stream.state, draws.rollout, position)
        video = new if first else compared_frames(self.picture_of(frozen["autoencoder"], stream.history), new)
        mask = jnp.broadcast_to(self.windows.gradient_mask(first=first), shape[:2])
        history = history_after(stream.history, new)
        return Window(video, mask, stream._replace(state=state, history=history))

    def generator_losses(
        self,
        trained: PyTree,
        frozen: PyTree,
        batch: Batch,
        draws: SelfForcingDraws,
        step: int | Int[Array, ""],
        *,
        first: bool,
    ) -> StreamLosses:
        """The generator's loss on the next window; gradients are for ``trained["transformer"]`` alone."""
        window = self.next_window(trained["transformer"], frozen, trained["stream"], batch, draws, step, first=first)
        captions, real_captions = window.stream.captions, window.stream.real_captions
        losses = self.losses.matching_losses(
            trained, frozen["real"], window.video, captions, real_captions, draws, window.mask
        )
        return StreamLosses(losses, window.stream)

    def critic_losses(
        self,
        trained: PyTree,
        frozen: PyTree,
        batch: Batch,
        draws: SelfForcingDraws,
        step: int | Int[Array, ""],
        *,
        first: bool,
    ) -> StreamLosses:
        """The fake score's loss on the next window; gradients are for ``trained["fake"]`` alone."""
        fixed = jax.lax.stop_gradient(trained["transformer"])
        window = self.next_window(fixed, frozen, trained["stream"], batch, draws, step, first=first)
        losses = self.losses.denoising_losses(trained, window.video, window.stream.captions, draws, window.mask)
        return StreamLosses(losses, window.stream)
