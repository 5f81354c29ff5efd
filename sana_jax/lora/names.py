"""How LoRA files name their tensors, and which of a network's layers a name means.

Four spellings are read::

    transformer.transformer_blocks.0.attn1.to_q.lora_A.weight             PEFT, diffusers; also base_model.model.
    transformer.transformer_blocks.0.attn1.to_q.lora.down.weight          diffusers before PEFT
    transformer.transformer_blocks.0.attn1.processor.to_q_lora.down.weight    the same, older
    lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight            kohya
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from kernels.typing import PyTree
from sana_jax.weights.layouts import Layout
from sana_jax.weights.rules import Rule, places

Part = Literal["down", "up", "alpha"]

_LONGEST_NAME = 500  # of any tensor; a longer one is no layer's
_PARTS: dict[str, Part] = {"A": "down", "B": "up", "down": "down", "up": "up"}
_WEIGHTS = (
    re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.\w+)?\.weight"),
    re.compile(r"(?P<module>.+)\.(?:lora\.|lora_|lora_linear_layer\.)(?P<part>down|up)\.weight"),
    re.compile(r"(?P<attention>.+?)(?:\.processor)?\.(?P<layer>to_q|to_k|to_v|to_out)_lora\.(?P<part>down|up)\.weight"),
)
_ALPHAS = (
    re.compile(r"(?P<attention>.+?)(?:\.processor)?\.(?P<layer>to_q|to_k|to_v|to_out)_lora\.alpha"),
    re.compile(r"(?P<module>.+?)(?:\.lora|\.lora_linear_layer)?\.alpha"),
)
_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.")
_UNDERSCORED_PREFIXES = ("lora_unet_", "lora_transformer_")
_REASONS = (
    (re.compile(r"dora_scale|lora_magnitude_vector"), "DoRA"),
    (re.compile(r"lora_[AB](\.\w+)?\.bias"), "bias of a LoRA"),
    (re.compile(r"lora_mid"), "LoCon with a middle convolution"),
    (re.compile(r"hada_|lokr_|oft_"), "LyCORIS"),
    (re.compile(r"\.diff(_b)?$"), "full difference"),
)


class Target(NamedTuple):
    """A layer that a LoRA may change: the path of its kernel with us, and the kernel's layout and shape with them."""

    path: tuple[str, ...]  # without the last part, "kernel"
    layer: int | None
    layout: Layout
    shape: tuple[int, ...]


def lora_targets(rules: Sequence[Rule], abstract: PyTree) -> dict[str, Target]:
    """Every published module name with a kernel, and where it is with us; from the family's table of weights."""
    return {
        name.removesuffix(".weight"): Target(place.path[:-1], place.layer, place.layout, place.shape)
        for name, place in places(rules, abstract).items()
        if place.path[-1] == "kernel"
    }


def split_key(key: str) -> tuple[str, Part] | None:
    """The module that a tensor belongs to, prefixes included, and its part; None for what is not a LoRA's."""
    if len(key) > _LONGEST_NAME:
        return None
    for pattern in _WEIGHTS:
        if match := pattern.fullmatch(key):
            return _module(match.groupdict()), _PARTS[match["part"]]
    for pattern in _ALPHAS:
        if match := pattern.fullmatch(key):
            return _module(match.groupdict()), "alpha"
    return None


def why_unsupported(key: str) -> str:
    """What a tensor is that ``split_key`` does not know."""
    return next((reason for pattern, reason in _REASONS if pattern.search(key[:_LONGEST_NAME])), "unknown")


class ModuleNames:
    """Finds a network's layers by the names that files give them."""

    def __init__(self, targets: Mapping[str, Any]) -> None:
        self._targets = targets
        self._underscored = {name.replace(".", "_"): name for name in targets}

    def find(self, module: str) -> str | None:
        """The published name of a module, None where the network has no such layer."""
        for prefix in _UNDERSCORED_PREFIXES:
            if module.startswith(prefix):
                rest = module.removeprefix(prefix)
                return self._underscored.get(rest) or self._underscored.get(f"{rest}_0")
        name = without_prefix(module)
        return next((known for known in (name, f"{name}.0") if known in self._targets), None)

    def beyond_the_last_block(self, module: str) -> int | None:
        """The block's number if the network has this layer in its blocks, but not so many blocks."""
        match = re.fullmatch(r"(\D+[._])(\d{1,6})([._].+)", module)
        if match is None or self.find(module) is not None:
            return None
        return int(match[2]) if self.find(f"{match[1]}0{match[3]}") else None


def without_prefix(module: str) -> str:
    """A dotted module name without what wrappers put before it."""
    while prefix := next((prefix for prefix in _PREFIXES if module.startswith(prefix)), None):
        module = module.removeprefix(prefix)
    return module


def _module(groups: Mapping[str, str]) -> str:
    return groups["module"] if "module" in groups else f"{groups['attention']}.{groups['layer']}"
