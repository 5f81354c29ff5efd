"""Frames split over the devices of a mesh axis: each composes its own, and all learn what enters whose frames.

One matrix pair per device and head is exchanged, however many frames and tokens it has.
"""

from __future__ import annotations

import jax

from kernels.gated_delta_rule.updates import FrameUpdate
from kernels.typing import Array, Float


def entering_memory(
    update: FrameUpdate, memory: Float[Array, "... d e"], axis_name: str, *, reverse: bool = False
) -> tuple[Float[Array, "... d e"], Float[Array, "... d e"]]:
    """The memory that enters this device's frames, and the one that leaves those of the last device.

    Args:
        update: of this device's frames, composed.
        memory: what enters the frames of the first device, the same everywhere.
        axis_name: the mesh axis that frames are split over.
        reverse: whether time runs backward, and the first device is the one at the end of the axis.
    """
    updates = jax.lax.all_gather(update, axis_name)
    last, entering = jax.lax.scan(lambda memory, run: (run(memory), memory), memory, updates, reverse=reverse)
    return entering[jax.lax.axis_index(axis_name)], last
