"""What a LoRA run can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from configs.checks import require
from sana_jax.lora.targets import LARGEST_RANK
from sana_jax.models.sana import SanaConfig

# Outside these a LoRA learns nothing, or falls apart.
SMALLEST_LEARNING_RATE, LARGEST_LEARNING_RATE = 1e-6, 1e-2


@dataclass(frozen=True)
class LoraConfig:
    """Training of a low-rank change of a model that stays as it is (arXiv 2106.09685)."""

    rank: int = 16
    """Channels of the change of each layer: 4 to 64 are usual. File size and memory grow with it."""
    alpha: float | None = None
    """The change is multiplied with alpha / rank; None: with 1."""
    dropout: float = 0.0
    """Share of a layer's inputs that the change does not see, drawn anew at every step; off in sampling."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """How it is drawn: gaussian as diffusers' training scripts have it, kaiming as PEFT has it by default."""
    targets: tuple[str, ...] = ("attention",)
    """Layers that it changes: attention, qkv (as diffusers' scripts), all_linear (PyTorch's linear layers),
    all_linear_and_pointwise (and the 1x1 convolutions of the feed-forward networks), or patterns (regular expressions)
    of whole paths, as transformer_blocks/attn1/to_q."""

    def __post_init__(self):
        require("lora.rank", self.rank, 1 <= self.rank <= LARGEST_RANK, f"1 to {LARGEST_RANK}")
        good = self.alpha is None or 0 < self.alpha < math.inf
        require("lora.alpha", self.alpha, good, "above 0, or None for the rank")
        require("lora.dropout", self.dropout, 0 <= self.dropout < 1, "0 up to, not including, 1")
        require("lora.targets", "without a value", bool(self.targets), "one or more layers, as attention")

    @property
    def scale(self) -> float:
        """What the change is multiplied with: alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def lora_warnings(learning_rate: float | None, transformer: SanaConfig) -> list[str]:
    """What a user should know before a LoRA run, a line each.

    Args:
        learning_rate: the peak; None for optimizers that find their own.
        transformer: the base model's shape.
    """
    lines = []
    if learning_rate is not None and not SMALLEST_LEARNING_RATE <= learning_rate <= LARGEST_LEARNING_RATE:
        effect = "will hardly learn" if learning_rate < SMALLEST_LEARNING_RATE else "is likely to fall apart"
        lines.append(
            f"warning: with --optimizer.learning-rate {learning_rate:g} a LoRA {effect}; usual are 1e-5 to 1e-3"
        )
    return [*lines, *distilled_warnings(transformer)]


def distilled_warnings(transformer: SanaConfig) -> list[str]:
    """What a user should know before training a model of this shape on, a line each."""
    if not getattr(transformer, "guidance_embeds", False):
        return []
    return [
        "warning: the base model is distilled to few steps (SANA-Sprint); diffusion loss on a distilled model is "
        "experimental and may undo the distillation: prefer SANA or SANA-1.5"
    ]
