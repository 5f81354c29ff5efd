"""SigLIP's text tower: a text's tokens to one vector, in the space of the vision tower's.

Paper: SigLIP (arXiv 2303.15343). Field names and parameter names are those of the published transformers checkpoints.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from kernels.typing import Array, Float, Int, PRNGKeyArray, PyTree
from sana_jax.errors import UserError
from sana_jax.models.siglip import (
    ACTIVATION,
    VISION_MODEL,
    WHOLE_MODEL,
    LayerNorm,
    check_tower,
    dense,
    run_layers,
    tower_error,
    tower_fields,
)
from sana_jax.nn.initializers import scaled_normal

_LABEL = "text tower config"
TEXT_MODEL = "siglip_text_model"  # transformers' model_type
# Larger numbers are a damaged file, and describing their arrays could take for ever.
_LARGEST = 1 << 20


@dataclasses.dataclass(frozen=True)
class SiglipTextConfig:
    """Shape of one text tower; the defaults are those of transformers, SigLIP base.

    Attributes:
        vocab_size: rows of the embedding table.
        hidden_size: width D of the token stream.
        intermediate_size: hidden width of the MLPs.
        num_hidden_layers: layers.
        num_attention_heads: heads.
        max_position_embeddings: tokens of a padded text.
        hidden_act: ``gelu_pytorch_tanh``.
        layer_norm_eps: epsilon of the norms.
        projection_size: size of a text's vector; None: ``hidden_size``.
    """

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 64
    hidden_act: str = ACTIVATION
    layer_norm_eps: float = 1e-6
    projection_size: int | None = None

    def __post_init__(self):
        check_tower(self, _LARGEST, _not_allowed)
        size = self.projection_size
        if size is None:
            object.__setattr__(self, "projection_size", self.hidden_size)
        elif type(size) is not int or not 1 <= size <= _LARGEST:
            raise _not_allowed("projection_size", size, f"a whole number from 1 to {_LARGEST}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SiglipTextConfig:
        """Reads a published ``config.json``, of a whole SigLIP or of its text tower alone.

        Missing keys keep the default, as in transformers; keys without effect on the result are passed over.

        Raises:
            UserError: another kind of model, a value that is not allowed, or a key that is not known here.
        """
        kind = values.get("model_type", TEXT_MODEL)
        if kind == VISION_MODEL:
            raise UserError(f"its config.json has model_type {kind!r}: a vision tower without its text tower")
        if kind not in (WHOLE_MODEL, TEXT_MODEL):
            raise _not_allowed("model_type", kind, f"{WHOLE_MODEL} or {TEXT_MODEL}: choose such a model")
        return cls(**tower_fields(values, "text_config", cls, _LABEL))

    def to_dict(self) -> dict[str, Any]:
        """The fields as a published ``config.json`` of a text tower has them; transformers reads it as well."""
        return {"architectures": ["SiglipTextModel"], "model_type": TEXT_MODEL, **dataclasses.asdict(self)}


_not_allowed = functools.partial(tower_error, _LABEL)


def init_params(text: SiglipTextModel, key: PRNGKeyArray) -> PyTree:
    """Random parameters; under ``jax.eval_shape`` their shapes alone."""
    return text.init(key, jnp.zeros((1, text.config.max_position_embeddings), jnp.int32))["params"]


class SiglipTextModel(nn.Module):
    """The text tower. Parameters of the layers are stacked on a leading axis under ``layers``, in both forms below.

    Every token attends to every token: SigLIP was trained without a mask, on texts padded to
    ``max_position_embeddings``, and reads the text's vector off the last token, padding or not.

    Attributes:
        config: the shape.
        dtype: compute dtype, float32 or bfloat16; norms, logits and softmax run in float32.
        scan_blocks: True compiles one layer and scans it; False unrolls the layers, for debugging. Equal outputs.
    """

    config: SiglipTextConfig
    dtype: jnp.dtype = jnp.float32
    scan_blocks: bool = True

    @nn.compact
    def __call__(self, input_ids: Int[Array, "B L"]) -> Float[Array, "B P"]:
        """Runs the network on token ids, padded as it was trained with.

        Raises:
            UserError: more tokens than positions.
        """
        cfg = self.config
        length = input_ids.shape[-1]
        if length > cfg.max_position_embeddings:
            raise UserError(f"texts of {length} tokens; SigLIP's text tower takes up to {cfg.max_position_embeddings}")
        x = _TextEmbeddings(cfg, self.dtype, name="embeddings")(input_ids)
        x = run_layers(self, x)
        last = LayerNorm(cfg.layer_norm_eps, name="final_layer_norm")(x[:, -1])
        return dense(cfg.projection_size, self.dtype, "head")(last)


class _TextEmbeddings(nn.Module):
    """A learned vector of the token and one of its position."""

    config: SiglipTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, input_ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        cfg = self.config
        init = scaled_normal(cfg.hidden_size**-0.5)
        tokens = self.param("token_embedding", init, (cfg.vocab_size, cfg.hidden_size), jnp.float32)
        positions = self.param("position_embedding", init, (cfg.max_position_embeddings, cfg.hidden_size), jnp.float32)
        return tokens[input_ids].astype(self.dtype) + positions[: input_ids.shape[-1]].astype(self.dtype)
