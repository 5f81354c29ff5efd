"""Text encoders: prompts to embeddings."""

from __future__ import annotations

import pathlib
from typing import Any

from sana_jax.component_config import load_from_config
from sana_jax.errors import UserError
from sana_jax.text_encoders.base import TextEncoder
from sana_jax.text_encoders.gemma import GemmaTextEncoder
from sana_jax.text_encoders.gemma3 import Gemma3TextEncoder
from sana_jax.text_encoders.words import WordEncoder

__all__ = ["Gemma3TextEncoder", "GemmaTextEncoder", "TextEncoder", "WordEncoder", "load_text_encoder"]


def load_text_encoder(directory: str | pathlib.Path, *, dtype: Any = None, variant: str | None = None) -> TextEncoder:
    """The text encoder of ``directory`` (a model directory's ``text_encoder``), chosen by its ``config.json``.

    A tokenizer is looked for in ``tokenizer`` beside the directory. Weights are read when the first prompt comes.

    Args:
        directory: where ``config.json`` is.
        dtype: ``"float32"`` or ``"bfloat16"``, for encoders with weights; None takes what fits the stored ones.
        variant: of published weight files: ``"bf16"``, ``"fp16"``.

    Raises:
        FileNotFoundError: no ``config.json``, weights or tokenizer there.
        UserError: the configuration is damaged or names a class that is not known; or an option that would not be used.
        CheckpointError: weights or tokenizer are damaged or do not fit.
    """

    def word_encoder(config: dict[str, Any]) -> WordEncoder:
        for name, value in (("dtype", dtype), ("variant", variant)):
            if value is not None:
                raise UserError(f"{name}={value!r}: the text encoder WordEncoder has no weights; leave {name} out")
        return WordEncoder.from_config(config)

    def gemma(config: dict[str, Any]) -> GemmaTextEncoder:
        return GemmaTextEncoder.from_config(config, directory, dtype=dtype, variant=variant)

    return load_from_config(directory, {"WordEncoder": word_encoder, "Gemma2Model": gemma, "gemma2": gemma})
