"""One batch of training samples: what data sources make and objectives read."""

from __future__ import annotations

from typing import NamedTuple

from kernels.typing import Array, Float, Int


class Batch(NamedTuple):
    """Arrays of B samples, on the host or on devices."""

    latents: Float[Array, "B H W C"]
    prompt_embeds: Float[Array, "B L Ctext"]
    prompt_attention_mask: Int[Array, "B L"]
