"""Text encoders: prompts to embeddings."""

from __future__ import annotations

import pathlib

from sana_jax.component_config import load_from_config
from sana_jax.text_encoders.base import TextEncoder
from sana_jax.text_encoders.words import WordEncoder

__all__ = ["TextEncoder", "WordEncoder", "load_text_encoder"]


def load_text_encoder(directory: str | pathlib.Path) -> TextEncoder:
    """The text encoder of ``directory`` (a model directory's ``text_encoder``), chosen by its ``_class_name``.

    Raises:
        FileNotFoundError: no ``config.json`` there.
        UserError: the configuration is damaged or names a class that is not known.
    """
    return load_from_config(directory, {"WordEncoder": WordEncoder.from_config})
