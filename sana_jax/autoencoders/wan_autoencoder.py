"""The Wan video autoencoder as pipelines use it: weights on disk, compiled per shape, block by block and in tiles."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from kernels.typing import Array
from sana_jax.autoencoders.blockwise import BlockwiseVideoAutoencoder
from sana_jax.autoencoders.tiling import Tiles
from sana_jax.autoencoders.wan import WanDecoder, WanEncoder, init_params
from sana_jax.autoencoders.wan_config import CLASS_NAME, WanConfig
from sana_jax.weights.components import Resident
from sana_jax.weights.tables.wan import wan_rules

# Pixels, of all frames and videos together, that go through the networks at once; more go block by block, and frames of
# which four have more are cut into tiles. By the compiler's own analysis of Wan 2.1 in float32 on a CPU, four frames of
# 480x832 need 3.8 GB of state and 5.2 GB beside it when decoded, 2.2 GB and 6.9 GB when encoded; 1024x1024 would need
# 2.6 times that, and a tile needs 0.6 GB and 0.9 GB, 0.4 GB and 1.2 GB.
LARGEST_AT_ONCE = 2**21


class WanAutoencoder(BlockwiseVideoAutoencoder):
    """Wan 2.1's autoencoder.

    A video of many pixels goes through the networks one latent frame after another; where one latent frame stands for
    more than four frames of 724x724, frames are cut into tiles of 256 pixels that overlap by 64. Arguments, methods and
    errors are those of ``BlockwiseVideoAutoencoder``.
    """

    family = "Wan"
    class_name = CLASS_NAME
    config_class = WanConfig
    networks = MappingProxyType({"encoder": WanEncoder, "decoder": WanDecoder})
    init_params = staticmethod(init_params)
    rules = staticmethod(wan_rules)
    default_tiles = Tiles((256, 256), (192, 192))

    def __init__(self, config: WanConfig, weights: Resident, dtype: Any = jnp.float32, **options: Any) -> None:
        super().__init__(config, weights, dtype, **options)
        # The pipelines of diffusers multiply by the inverse and divide by it; so do we, to the last bit.
        self._mean = np.float32(config.latents_mean)
        self._inverse_std = np.float32(1) / np.float32(config.latents_std)

    @property
    def largest_at_once(self) -> int:
        """Pixels, of all frames and videos together, that go through the networks at once."""
        return LARGEST_AT_ONCE

    @property
    def decoder_history(self) -> int:
        """Latent frames before a latent frame that its decoded frames depend on."""
        return self.config.decoder_history

    # One operation at a time, not in the networks' programs, and with a divisor for every latent: in sight of one for a
    # whole channel the compiler multiplies by its inverse.
    def _normalised(self, mean: Array) -> Array:
        return (mean - self._mean) * self._inverse_std

    def _denormalised(self, latents: Array) -> Array:
        return jnp.asarray(latents, jnp.float32) / jnp.broadcast_to(self._inverse_std, latents.shape) + self._mean
