"""A ControlNet as NVlabs save it, beside the transformer that it was trained on: -> ``SanaControlNetModel``'s names."""

from __future__ import annotations

from convert.renames import Rename, both
from convert.tables import sana_original

# The transformer beside it; import that from its own checkpoint.
BASE = (r"blocks\..*", r"final_layer\..*")
DROPPED = (*sana_original.DROPPED, *BASE)


def controlnet_table() -> tuple[Rename, ...]:
    """Every tensor of the ControlNet. The embedders are those of the transformer."""
    return (
        *sana_original.embedders(guidance=False),
        *both("controlnet.0.before_proj", "input_block"),
        *sana_original.block("controlnet.{layer}.copied_block", "transformer_blocks.{layer}"),
        *both("controlnet.{layer}.after_proj", "controlnet_blocks.{layer}"),
    )
