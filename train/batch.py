"""One batch of training samples: what data sources make and objectives read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from kernels.typing import Array, Float, Int

# A dictionary, since JAX takes an immutable mapping for a leaf of a tree; nothing is ever put into it.
NO_CONDITIONS: Mapping[str, Array] = {}
# Conditions of world models: what the network is told of the camera of every latent frame (B, T, 20), Plücker
# coordinates (B, T, H, W, 6·temporal factor), both as ``sana_jax.camera.camera_inputs`` makes them, and which frames
# are no padding (B, T). The names of the first two are those of the network's arguments.
CAMERA, PLUCKER, FRAME_VALID = "camera_conditions", "chunk_plucker", "frame_valid"
# What previews of world models are given beside them: the latents (B, 1, H, W, C) that the clips begin with.
FIRST_FRAME = "first_frame"


class Batch(NamedTuple):
    """Arrays of B samples, on the host or on devices. Latents of clips are (B, T, H, W, C).

    ``conditions`` are further arrays by name, each with B as its first axis: what the data declares and the objective
    reads, such as ``control`` (B, H, W, C), the latents of a control picture, or ``loss_weight`` (B,).
    """

    latents: Float[Array, "B *T H W C"]
    prompt_embeds: Float[Array, "B L Ctext"]
    prompt_attention_mask: Int[Array, "B L"]
    conditions: Mapping[str, Array] = NO_CONDITIONS
