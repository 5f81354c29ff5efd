"""LoRA (low-rank adaptation, arXiv 2106.09685): files as the field writes them, and trees beside the parameters.

A LoRA adds ``(x · down) · up`` to dense layers. With us it is a tree with leaves ``<layer>/down`` (in, rank) and
``<layer>/up`` (rank, out), stacked over blocks as the parameters are, and with all scales folded into ``up``; networks
take it as the collection ``lora``: see ``sana_jax.nn.linear``.
"""

from __future__ import annotations

from sana_jax.lora.reading import Lora, LoraLayer, parse_lora_option, read_lora
from sana_jax.lora.trees import init_lora, lora_tree, merge_lora

__all__ = [
    "Lora",
    "LoraLayer",
    "init_lora",
    "lora_tree",
    "merge_lora",
    "parse_lora_option",
    "read_lora",
]
