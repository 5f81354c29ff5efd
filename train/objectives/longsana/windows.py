"""Windows of a video that grows while the generator learns: which frames are new, which are compared, what is kept.

A video begins with a window of 21 new latent frames. Each later one has 20 new frames, and before them one that is not
new: the last pixel frame of what there is, encoded as a picture, since the score networks take a video's first latent
frame for a picture. No loss falls on it. The last 21 frames are kept for the next window's. Frame numbers are latent.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Bool, Float, Int
from sana_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows of one video, and which of them a training step has.

    Steps take windows in turn and begin a new video after the last, so that a step's number says all.

    Attributes:
        total_frames: of a video.
        window_frames: what scores compare; also new in the first window.
        overlap_frames: of a later window, not new.
        block_frames: of a causal block, which later windows hold whole.

    Raises:
        UserError: frames that do not make whole blocks or whole windows.
    """

    total_frames: int
    window_frames: int
    overlap_frames: int
    block_frames: int

    def __post_init__(self):
        new, rest = self.new_frames, self.total_frames - self.window_frames
        if new < 1 or new % self.block_frames:
            raise UserError(
                f"a window of {self.window_frames} frames has {new} new ones, which are no whole blocks of "
                f"{self.block_frames}; take {self.block_frames + self.overlap_frames} or "
                f"{2 * self.block_frames + self.overlap_frames} frames"
            )
        if rest < 0 or rest % new:
            below = self.window_frames + max(rest, 0) // new * new
            raise UserError(
                f"a video of {self.total_frames} frames is not {self.window_frames} and several times {new} frames; "
                f"take {below} or {below + new}"
            )

    @property
    def new_frames(self) -> int:
        """New frames of every window but the first."""
        return self.window_frames - self.overlap_frames

    @property
    def count(self) -> int:
        """Windows of a video."""
        return 1 + (self.total_frames - self.window_frames) // self.new_frames

    def kinds_of_steps(self, cycle: Sequence[str]) -> tuple[str, ...]:
        """The kind of every step until both the cycle and the windows begin again.

        Kinds follow one another as the cycle says. Where its length and the number of windows have a common divisor, a
        kind would always meet the same windows; then each video after the first begins ``skipped_turns`` places later
        in the cycle, so that in as many videos as the cycle has places every kind meets every window alike.
        """
        skipped = self.skipped_turns(len(cycle))
        steps = range(len(cycle) * self.count)
        return tuple(cycle[(step + step // self.count * skipped) % len(cycle)] for step in steps)

    def skipped_turns(self, cycle_length: int) -> int:
        """Places of a cycle that are left out where a video ends; 0 where every place comes to every window anyway."""
        return next(places for places in itertools.count() if math.gcd(self.count + places, cycle_length) == 1)

    def is_first(self, step: int) -> bool:
        """Whether a step has a video's first window."""
        return step % self.count == 0

    def first_frame(self, step: int | Int[Array, ""]) -> Int[Array, ""]:
        """Position in the video of the first new frame of a step's window; ``step`` may be traced."""
        window = jnp.asarray(step, jnp.int32) % self.count
        return jnp.where(window == 0, 0, self.window_frames + (window - 1) * self.new_frames)

    def gradient_mask(self, *, first: bool) -> Bool[np.ndarray, " T"]:
        """Which frames of a window count in the loss: those that are new."""
        return np.arange(self.window_frames) >= (0 if first else self.overlap_frames)


def compared_frames(picture: Float[Array, "B P H W C"], new: Float[Array, "B N H W C"]) -> Float[Array, "B T H W C"]:
    """A later window as the scores see it: the picture, to which no gradient passes, and the new frames."""
    return jnp.concatenate([jax.lax.stop_gradient(picture).astype(new.dtype), new], axis=1)


def history_after(history: Float[Array, "B T H W C"], new: Float[Array, "B N H W C"]) -> Float[Array, "B T H W C"]:
    """The last frames of the video, as many as before; no gradient passes."""
    return jax.lax.stop_gradient(jnp.concatenate([history, new.astype(history.dtype)], axis=1)[:, new.shape[1] :])
