"""Autoencoders: pictures and videos to latents and back."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from sana_jax.autoencoders.base import Autoencoder, VideoAutoencoder
from sana_jax.autoencoders.blockwise import BlockwiseVideoAutoencoder
from sana_jax.autoencoders.dc_ae_config import CLASS_NAME as DC_AE
from sana_jax.autoencoders.dc_autoencoder import DCAutoencoder
from sana_jax.autoencoders.ltx2_autoencoder import LTX2VideoAutoencoder
from sana_jax.autoencoders.ltx2_config import CLASS_NAME as LTX2
from sana_jax.autoencoders.pixel import PixelAutoencoder, PixelVideoAutoencoder
from sana_jax.autoencoders.wan_autoencoder import WanAutoencoder
from sana_jax.autoencoders.wan_config import CLASS_NAME as WAN
from sana_jax.component_config import load_from_config
from sana_jax.errors import UserError

__all__ = [
    "Autoencoder",
    "DCAutoencoder",
    "LTX2VideoAutoencoder",
    "PixelAutoencoder",
    "PixelVideoAutoencoder",
    "VideoAutoencoder",
    "WanAutoencoder",
    "load_autoencoder",
]


def load_autoencoder(
    directory: str | pathlib.Path, dtype: Any = None, variant: str | None = None
) -> Autoencoder | VideoAutoencoder:
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

    def pixels(kind: type[PixelAutoencoder], config: Mapping[str, Any]) -> PixelAutoencoder:
        if dtype is not None or variant is not None:
            raise UserError(
                f"{kind.__name__} has no weights: dtype={dtype!r} and variant={variant!r} mean nothing, leave both out"
            )
        return kind.from_config(config)

    def network(kind: type[DCAutoencoder] | type[BlockwiseVideoAutoencoder], _: Mapping[str, Any]) -> Any:
        return kind.from_directory(directory, dtype=dtype, variant=variant)

    loaders = {kind.__name__: functools.partial(pixels, kind) for kind in (PixelAutoencoder, PixelVideoAutoencoder)}
    networks = {DC_AE: DCAutoencoder, WAN: WanAutoencoder, LTX2: LTX2VideoAutoencoder}
    loaders |= {name: functools.partial(network, kind) for name, kind in networks.items()}
    return load_from_config(directory, loaders)
