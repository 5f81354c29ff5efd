"""Gemma-2 and Gemma-3's text tower as transformers saves them: ``text_encoder/model.safetensors``."""

from __future__ import annotations

from collections.abc import Iterable

from sana_jax.models.gemma import GemmaConfig
from sana_jax.weights.layouts import LINEAR
from sana_jax.weights.rules import Rule

# Names under which a whole language model holds what is Gemma2Model's.
CAUSAL_LM_PREFIX = "model."
# The same by the classes of Gemma-3; a model with an image tower is spelt as it is published.
GEMMA3_PREFIXES = {
    "Gemma3ForConditionalGeneration": "language_model.model.",
    "Gemma3ForCausalLM": CAUSAL_LM_PREFIX,
    "Gemma3TextModel": "",
}
# A model with an image tower in memory, and one without its head.
_OTHER_PREFIXES = ("model.language_model.", "language_model.")
# The head of a language model is its embedding table once more, and no part of the text encoder.
IGNORED = (r"(language_model\.)?lm_head\.weight", r"((language_)?model\.){0,2}rotary_emb\.inv_freq")
# Of a Gemma-3 with an image tower: no text passes through it.
IMAGE_TOWER = (r"(model\.)?vision_tower\..*", r"(model\.)?multi_modal_projector\..*")

_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_HEAD_NORMS = ("self_attn/q_norm", "self_attn/k_norm")
_DENSE = (
    *(f"self_attn/{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp/{name}_proj" for name in ("gate", "up", "down")),
)


def gemma_rules(config: GemmaConfig, prefix: str = "") -> tuple[Rule, ...]:
    """The rules of Gemma-2 or Gemma-3; ``prefix`` stands before all names, ``"model."`` in a language model's file."""
    norms = (*_NORMS, *_HEAD_NORMS) if config.qk_norm else _NORMS
    layers = f"{prefix}layers.{{layer}}"
    return (
        Rule("embed_tokens", f"{prefix}embed_tokens.weight"),
        *(Rule(f"layers/{name}/kernel", f"{layers}.{name.replace('/', '.')}.weight", LINEAR) for name in _DENSE),
        *(Rule(f"layers/{name}/scale", f"{layers}.{name.replace('/', '.')}.weight") for name in norms),
        Rule("norm/scale", f"{prefix}norm.weight"),
    )


def name_prefix(names: Iterable[str]) -> str:
    """What stands before the names in a checkpoint: ``"model."`` in a language model's, else nothing."""
    there = set(names)
    prefixes = (*GEMMA3_PREFIXES.values(), *_OTHER_PREFIXES)
    return next((prefix for prefix in prefixes if f"{prefix}embed_tokens.weight" in there), "")
