"""One batch of training samples: what data sources make and objectives read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from kernels.typing import Array, Float, Int

NO_CONDITIONS: Mapping[str, Array] = {}


class Batch(NamedTuple):
    """Arrays of B samples, on the host or on devices. Latents of clips are (B, T, H, W, C).

    ``conditions`` are further arrays by name, each with B as its first axis: what the data declares and the objective
    reads, such as ``control`` (B, H, W, C), the latents of a control picture, or ``loss_weight`` (B,).
    """

    latents: Float[Array, "B *T H W C"]
    prompt_embeds: Float[Array, "B L Ctext"]
    prompt_attention_mask: Int[Array, "B L"]
    conditions: Mapping[str, Array] = NO_CONDITIONS
