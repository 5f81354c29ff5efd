"""Autoencoders: pictures to latents and back."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from sana_jax.autoencoders.base import Autoencoder
from sana_jax.autoencoders.dc_ae_config import CLASS_NAME as DC_AE
from sana_jax.autoencoders.dc_autoencoder import DCAutoencoder
from sana_jax.autoencoders.pixel import PixelAutoencoder
from sana_jax.component_config import load_from_config
from sana_jax.errors import UserError

__all__ = ["Autoencoder", "DCAutoencoder", "PixelAutoencoder", "load_autoencoder"]


def load_autoencoder(directory: str | pathlib.Path, dtype: Any = None, variant: str | None = None) -> Autoencoder:
    """The autoencoder of ``directory`` (a model directory's ``vae``), chosen by its ``_class_name``.

    Args:
        directory: with ``config.json`` and, for networks, the weights, which are read when they are needed.
        dtype: compute dtype; None for the network's default.
        variant: ``bf16``, ... of published weights.

    Raises:
        FileNotFoundError: no ``config.json`` or no weights there.
        UserError: the configuration is damaged or names a class that is not known, or an option is not for that class.
        CheckpointError: weights that do not fit or are damaged.
    """

    def pixels(config: Mapping[str, Any]) -> PixelAutoencoder:
        if dtype is not None or variant is not None:
            raise UserError(
                f"PixelAutoencoder has no weights: dtype={dtype!r} and variant={variant!r} mean nothing, leave both out"
            )
        return PixelAutoencoder.from_config(config)

    def deep_compression(_: Mapping[str, Any]) -> DCAutoencoder:
        return DCAutoencoder.from_directory(directory, dtype=dtype, variant=variant)

    return load_from_config(directory, {"PixelAutoencoder": pixels, DC_AE: deep_compression})
