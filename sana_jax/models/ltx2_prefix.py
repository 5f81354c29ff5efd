"""What a block of a video sees of the blocks before it: keys and values of an anchor and of the last few frames.

SANA-WM's refiner runs LTX-2 over a long video block by block: the tokens of a block attend to the *sink*, the
first frames of the video, then to the *history*, the last frames that were refined, and to themselves. Keys of the
history keep the rotation that they were stored with; the sink's are stored before it and turned anew for every block.
Every array has one size from the first block to the last, so that one compiled program serves them all: the history is
a ring of frames, of which the first are not seen until they are filled. Which slot a frame lies in has no influence,
since its keys carry its position.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.typing import Array, Bool, Int
from sana_jax.errors import UserError
from sana_jax.nn.ltx2_layers import KeysValues


class LTX2Prefix(NamedTuple):
    """Keys and values of earlier frames, of all layers.

    Attributes:
        sink: keys before the rotation, and values, (layers, B, sink frames · S, h, d).
        history: keys after the rotation, and values, (layers, B, frames, S, h, d): a ring of frames.
        appended: how many frames were ever put into the history.
    """

    sink: KeysValues
    history: KeysValues
    appended: Int[Array, ""]

    @property
    def capacity(self) -> int:
        """Frames that the history holds at most."""
        return self.history.key.shape[2]

    @property
    def history_frames(self) -> Int[Array, ""]:
        """Frames that the history holds now."""
        return jnp.minimum(self.appended, self.capacity)


def init_prefix(sink: KeysValues, sink_frames: int, history_frames: int) -> LTX2Prefix:
    """A prefix with an empty history.

    Args:
        sink: what the network returned of the sink's frames, with ``capture="unrotated"``.
        sink_frames: how many they are.
        history_frames: frames that the history is to hold at most.

    Raises:
        UserError: a number of frames that is not possible.
    """
    layers, batch, tokens, *heads = sink.key.shape
    if sink_frames < 1 or tokens % sink_frames:
        raise UserError(f"sink_frames={sink_frames} does not divide the sink's {tokens} tokens; give its frames")
    if history_frames < 1:
        raise UserError(f"history_frames={history_frames} is not allowed; allowed is 1 or more")
    size = (layers, batch, history_frames, tokens // sink_frames, *heads)
    empty = KeysValues(*(jnp.zeros(size, array.dtype) for array in sink))
    return LTX2Prefix(sink, empty, jnp.zeros((), jnp.int32))


def append_history(prefix: LTX2Prefix, block: KeysValues, frames: int | Int[Array, ""] | None = None) -> LTX2Prefix:
    """Puts a refined block into the history; what is too old leaves it. In place where ``prefix`` is donated.

    Args:
        prefix: the state before.
        block: what the network returned of the block, with ``capture="rotated"``.
        frames: how many of the block's frames count, where the last ones only fill it up; None for all.
    """
    layers, batch, capacity, per_frame, *heads = prefix.history.key.shape
    given = block.key.shape[2] // per_frame
    frames = given if frames is None else frames
    number = jnp.arange(given)
    kept = (number < frames) & (number >= frames - capacity)
    slots = jnp.where(kept, (prefix.appended + number) % capacity, capacity)  # beyond the end: dropped

    def put(ring: Array, new: Array) -> Array:
        new = new.reshape(layers, batch, given, per_frame, *heads).astype(ring.dtype)
        return ring.at[:, :, slots].set(new, mode="drop")

    history = KeysValues(*(put(ring, new) for ring, new in zip(prefix.history, block)))
    return prefix._replace(history=history, appended=prefix.appended + jnp.asarray(frames, jnp.int32))


def append_layer(
    prefix: LTX2Prefix, layer: int | Int[Array, ""], block: KeysValues, frames: int | Int[Array, ""]
) -> LTX2Prefix:
    """``append_history`` for one layer, ``block`` being without the layer axis; ``appended`` stays as it is."""
    rings = KeysValues(*(jax.lax.dynamic_index_in_dim(ring, layer) for ring in prefix.history))
    own = KeysValues(*(array[None] for array in block))
    filled = append_history(prefix._replace(history=rings), own, frames).history
    put = jax.lax.dynamic_update_index_in_dim
    history = (put(ring, new[0], layer, 0) for ring, new in zip(prefix.history, filled))
    return prefix._replace(history=KeysValues(*history))


def prefix_mask(prefix: LTX2Prefix) -> Bool[Array, " P"]:
    """Which of the prefix's tokens are seen: the sink's, and those of the frames that the history holds."""
    _, _, capacity, per_frame, *_ = prefix.history.key.shape
    filled = jnp.repeat(jnp.arange(capacity) < prefix.history_frames, per_frame)
    return jnp.concatenate([jnp.ones(prefix.sink.key.shape[2], bool), filled])
