"""``SiglipVisionModel``, and both towers of ``SiglipModel``, of transformers: ``model.safetensors``."""

from __future__ import annotations

from collections.abc import Iterable

from sana_jax.models.siglip import SiglipVisionConfig
from sana_jax.weights.layouts import LINEAR, patch
from sana_jax.weights.rules import Rule, linear, norm

# What stands before the tower's names in a whole SigLIP's file, and in most files of towers alone.
PREFIX = "vision_model."
# A whole SigLIP has a text tower and the scale and bias of its loss beside the vision tower.
OTHER_TOWER = (r"text_model\..*", r"logit_scale", r"logit_bias")
NOT_PARAMETERS = (r"(vision_model\.)?embeddings\.position_ids",)
IGNORED = (*OTHER_TOWER, *NOT_PARAMETERS)
# the same from the text tower's side
TEXT_PREFIX = "text_model."
TEXT_IGNORED = (r"vision_model\..*", r"text_model\.embeddings\.position_ids")

_OF_A_LAYER = (*(f"self_attn/{name}_proj" for name in ("q", "k", "v", "out")), "mlp/fc1", "mlp/fc2")


def siglip_rules(config: SiglipVisionConfig, prefix: str = PREFIX) -> tuple[Rule, ...]:
    """The rules of a vision tower; ``prefix`` stands before all published names: see ``name_prefix``."""
    layers = f"{prefix}encoder.layers.{{layer}}"
    rules = (
        *linear("embeddings/patch_embedding", "embeddings.patch_embedding", patch(config.patch_size)),
        Rule("embeddings/position_embedding", "embeddings.position_embedding.weight"),
        *norm("post_layernorm", "post_layernorm"),
        Rule("head/probe", "head.probe"),
        Rule("head/attention/in_proj/kernel", "head.attention.in_proj_weight", LINEAR),
        Rule("head/attention/in_proj/bias", "head.attention.in_proj_bias"),
        *linear("head/attention/out_proj", "head.attention.out_proj"),
        *norm("head/layernorm", "head.layernorm"),
        *(rule for name in ("fc1", "fc2") for rule in linear(f"head/mlp/{name}", f"head.mlp.{name}")),
    )
    return (
        *(Rule(rule.ours, prefix + rule.theirs, rule.layout) for rule in rules),
        *(rule for name in _OF_A_LAYER for rule in linear(f"layers/{name}", f"{layers}.{name.replace('/', '.')}")),
        *(rule for name in ("layer_norm1", "layer_norm2") for rule in norm(f"layers/{name}", f"{layers}.{name}")),
    )


def siglip_text_rules() -> tuple[Rule, ...]:
    """The rules of a whole SigLIP's text tower, under ``text``, and of the two numbers of its loss."""
    layers = f"{TEXT_PREFIX}encoder.layers.{{layer}}"
    rules = (
        Rule("embeddings/token_embedding", f"{TEXT_PREFIX}embeddings.token_embedding.weight"),
        Rule("embeddings/position_embedding", f"{TEXT_PREFIX}embeddings.position_embedding.weight"),
        *norm("final_layer_norm", f"{TEXT_PREFIX}final_layer_norm"),
        *linear("head", f"{TEXT_PREFIX}head"),
        *(rule for name in _OF_A_LAYER for rule in linear(f"layers/{name}", f"{layers}.{name.replace('/', '.')}")),
        *(rule for name in ("layer_norm1", "layer_norm2") for rule in norm(f"layers/{name}", f"{layers}.{name}")),
    )
    return (
        *(Rule(f"text/{rule.ours}", rule.theirs, rule.layout) for rule in rules),
        Rule("logit_scale", "logit_scale"),
        Rule("logit_bias", "logit_bias"),
    )


def name_prefix(names: Iterable[str]) -> str:
    """What stands before the tower's names in a checkpoint: nothing in files that transformers 5 writes of it alone."""
    return "" if "embeddings.patch_embedding.weight" in names else PREFIX
