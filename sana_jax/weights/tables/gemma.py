"""``Gemma2Model`` and ``Gemma2ForCausalLM`` of transformers: ``text_encoder/model.safetensors``."""

from __future__ import annotations

from collections.abc import Iterable

from sana_jax.models.gemma import GemmaConfig
from sana_jax.weights.layouts import LINEAR
from sana_jax.weights.rules import Rule

# Names under which a whole language model holds what is Gemma2Model's.
CAUSAL_LM_PREFIX = "model."
# The head of a language model is its embedding table once more, and no part of the text encoder.
IGNORED = (r"lm_head\.weight", r"(model\.)?rotary_emb\.inv_freq")

_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_DENSE = (
    *(f"self_attn/{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp/{name}_proj" for name in ("gate", "up", "down")),
)


def gemma_rules(config: GemmaConfig, prefix: str = "") -> tuple[Rule, ...]:
    """The rules of Gemma-2; ``prefix`` stands before all names, ``"model."`` in a language model's file.

    The table holds no sizes; ``config`` is taken as by the other families.
    """
    del config
    layers = f"{prefix}layers.{{layer}}"
    return (
        Rule("embed_tokens", f"{prefix}embed_tokens.weight"),
        *(Rule(f"layers/{name}/kernel", f"{layers}.{name.replace('/', '.')}.weight", LINEAR) for name in _DENSE),
        *(Rule(f"layers/{name}/scale", f"{layers}.{name}.weight") for name in _NORMS),
        Rule("norm/scale", f"{prefix}norm.weight"),
    )


def name_prefix(names: Iterable[str]) -> str:
    """What stands before the names in a checkpoint: ``"model."`` in a language model's, else nothing."""
    return CAUSAL_LM_PREFIX if f"{CAUSAL_LM_PREFIX}embed_tokens.weight" in names else ""
