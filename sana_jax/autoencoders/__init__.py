"""Autoencoders: pictures to latents and back."""

from __future__ import annotations

import pathlib

from sana_jax.autoencoders.base import Autoencoder
from sana_jax.autoencoders.pixel import PixelAutoencoder
from sana_jax.component_config import load_from_config

__all__ = ["Autoencoder", "PixelAutoencoder", "load_autoencoder"]


def load_autoencoder(directory: str | pathlib.Path) -> Autoencoder:
    """The autoencoder of ``directory`` (a model directory's ``vae``), chosen by its ``_class_name``.

    Raises:
        FileNotFoundError: no ``config.json`` there.
        UserError: the configuration is damaged or names a class that is not known.
    """
    return load_from_config(directory, {"PixelAutoencoder": PixelAutoencoder.from_config})
