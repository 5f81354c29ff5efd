"""LoRA (low-rank adaptation, arXiv 2106.09685): files as the field writes them, and trees beside the parameters.

A LoRA adds ``scale · (x · down) · up`` to dense layers. With us it is a tree with leaves ``<layer>/down`` (in, rank)
and ``<layer>/up`` (rank, out), stacked over blocks as the parameters are. There are two forms of it:

* as it is trained and saved: ``down`` and ``up`` are what a file holds, and the scale alpha / rank stands beside them
  (``init_lora``, ``save_lora_weights``);
* as networks take it, in the collection ``lora``: all scales and weights are folded into ``up`` (``scaled_lora``,
  ``lora_tree``); in training, dropout is added (``with_dropout``). See ``sana_jax.nn.linear``.
"""

from __future__ import annotations

from sana_jax.lora.reading import Lora, LoraLayer, find_lora_file, parse_lora_option, read_lora
from sana_jax.lora.targets import PRESETS, match_targets, target_table
from sana_jax.lora.trees import init_lora, lora_tree, merge_lora, scaled_lora, with_dropout
from sana_jax.lora.writing import lora_from_tree, save_lora_weights, write_lora

__all__ = [
    "PRESETS",
    "Lora",
    "LoraLayer",
    "find_lora_file",
    "init_lora",
    "lora_from_tree",
    "lora_tree",
    "match_targets",
    "merge_lora",
    "parse_lora_option",
    "read_lora",
    "save_lora_weights",
    "scaled_lora",
    "target_table",
    "with_dropout",
    "write_lora",
]
