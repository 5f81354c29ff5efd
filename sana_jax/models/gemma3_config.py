"""The shape of a Gemma-3's text tower, read from either published form of its configuration."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from sana_jax.models.gemma import GemmaConfig, not_allowed, positive_number

# What a model with an image tower calls itself; the text tower's configuration is a part of its own.
WITH_IMAGES = "gemma3"
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class Gemma3Config(GemmaConfig):
    """Shape of the text tower of one Gemma-3; the defaults are those of transformers, for keys that a file leaves out.

    Gemma-3 12B, whose states LTX-2 reads, has 48 layers of width 3840 with 16 heads on 8, a feed-forward network of
    15360, a window of 1024 tokens, and the factor 8 in the layers that see everything.

    Attributes:
        rope_theta: base of the rotary position embedding of layers that see everything.
        rope_linear_factor: what their positions are divided by.
        rope_local_base_freq: base in the layers that see a window.
        sliding_window_pattern: every so manyeth layer sees everything, where ``layer_types`` is None.
    """

    vocab_size: int = 262208
    max_position_embeddings: int = 131072
    rope_theta: float = 1e6
    attn_logit_softcapping: float | None = None
    rope_linear_factor: float = 1.0
    rope_local_base_freq: float = 1e4
    sliding_window_pattern: int = 6

    model_type: ClassVar[str] = "gemma3_text"
    family: ClassVar[str] = "Gemma-3"
    qk_norm: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.attn_logit_softcapping is not None:  # transformers' Gemma-3 has the field, and does not read it
            raise not_allowed("attn_logit_softcapping", self.attn_logit_softcapping, "null, since Gemma-3 has none")

    def usually_slides(self, layer: int) -> bool:
        """Whether a layer sees a window only where ``layer_types`` does not say."""
        return (layer + 1) % self.sliding_window_pattern != 0

    def rotation(self, sliding: bool) -> tuple[float, float]:
        """(theta, linear factor that positions are divided by) of a layer's rotary position embedding."""
        return (self.rope_local_base_freq, 1.0) if sliding else (self.rope_theta, self.rope_linear_factor)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Gemma3Config:
        """Reads a published ``config.json``, a text model's or one's with an image tower, whose text tower it takes.

        Raises:
            UserError: another kind of model, a value of the wrong type, or a key that could change the network and is
                not known here.
        """
        if values.get("model_type") == WITH_IMAGES:
            values = values.get("text_config")
            if not isinstance(values, dict):
                raise not_allowed("text_config", values, "the fields of the text tower")
        return super().from_dict(values)

    @classmethod
    def _read_rotation(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The file's values with those of the rotary position embedding as fields.

        transformers 5 writes one part for each kind of layer; before it, ``rope_scaling`` was the global layers', and
        oldest files call its kind ``type``, which is taken as it was meant (transformers 5 leaves such a factor out).
        """
        nested, scaling = given.pop("rope_parameters", None), given.pop("rope_scaling", None)
        if nested is not None and (not isinstance(nested, dict) or not set(nested) <= {_LOCAL, _GLOBAL}):
            raise not_allowed("rope_parameters", nested, f"a part for {_LOCAL} and one for {_GLOBAL}")
        parts = nested or {}
        return {
            **given,
            **_rotation("rope_scaling", scaling, {"factor": "rope_linear_factor"}),
            **_rotation(_GLOBAL, parts.get(_GLOBAL), {"rope_theta": "rope_theta", "factor": "rope_linear_factor"}),
            **_rotation(_LOCAL, parts.get(_LOCAL), {"rope_theta": "rope_local_base_freq"}),
        }

    def to_dict(self) -> dict[str, Any]:
        """The fields as a published ``config.json`` of a text model has them; transformers reads it as well."""
        fields = {**super().to_dict(), "architectures": ["Gemma3TextModel"]}
        factor = fields.pop("rope_linear_factor")
        fields["rope_scaling"] = None if factor == 1 else {"rope_type": "linear", "factor": factor}
        return fields


def _rotation(name: str, values: Any, fields: dict[str, str]) -> dict[str, Any]:
    """One part of the file's rotary position embedding, by our names; ``fields`` are those that it may have."""
    if values is None:
        return {}
    kinds = ("default", "linear") if "factor" in fields else ("default",)
    known = isinstance(values, dict) and set(values) <= {*fields, "rope_type", "type"}
    kind = values.get("rope_type", values.get("type", "default")) if known else None
    factor = values.get("factor", 1.0) if known else None
    if kind not in kinds or not positive_number(factor) or (kind == "default" and factor != 1):
        raise not_allowed(name, values, f"{', '.join(fields)}, and rope_type {' or '.join(kinds)}")
    return {ours: values[theirs] for theirs, ours in fields.items() if theirs in values}
