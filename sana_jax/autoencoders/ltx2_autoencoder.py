"""The LTX-2 video autoencoder as pipelines use it: weights on disk, compiled per shape, in blocks, pieces and tiles."""

from __future__ import annotations

import functools
import math
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, PyTree
from sana_jax.autoencoders.base import pixel_frames
from sana_jax.autoencoders.blockwise import DOING, BlockwiseVideoAutoencoder
from sana_jax.autoencoders.ltx2 import NOT_CAUSAL, STATISTICS, LTX2Decoder, LTX2Encoder, init_params
from sana_jax.autoencoders.ltx2_config import CLASS_NAME, LTX2AutoencoderConfig
from sana_jax.autoencoders.tiling import FrameTiles, Tiles, decode_in_time
from sana_jax.errors import UserError
from sana_jax.weights.components import Resident
from sana_jax.weights.tables.ltx2_vae import ltx2_vae_rules

# Pixels, of all frames and videos together, that go through the networks at once. By the compiler's own analysis of the
# published networks in float32 on a CPU, activations take 200 bytes a pixel when decoded and 290 when encoded: 28 GB
# for 161 frames of 704x1280 decoded at once, 17 GB for a piece of 97, 5 GB for a tile of 512x512 of these; 6 GB beside
# 2 GB of state for eight frames encoded after others.
LARGEST_AT_ONCE = 2**25


class LTX2VideoAutoencoder(BlockwiseVideoAutoencoder):
    """LTX-2's autoencoder: (B, 1 + 8k, H, W, 3) in [-1, 1] <-> (B, 1 + k, H/32, W/32, 128).

    Methods and errors are those of ``BlockwiseVideoAutoencoder``, and so are the arguments but for the last two. The
    published encoder is causal: videos of many pixels are encoded one latent frame after another, with the whole one's
    result. The published decoder is not: a video of too many pixels is cut into pieces of ``frame_tiles`` along time
    and, where even a piece has too many, into tiles of 512 pixels that overlap by 64. That is close to the whole
    video's result, not equal to it, and a line says so.

    Args:
        config: the shape.
        weights: parameters ``{"encoder": ..., "decoder": ..., "statistics": ...}``.
        dtype: compute dtype, float32 or bfloat16.
        frame_tiles: how a video is cut along time for a decoder that is not causal; ``tiling`` says when.
        streaming_context: latent frames, of those before a block, that a decoder which is not causal decodes with it
            again, so that ``decode_frames`` can be used with one: 1 or 2. The frames are close to the whole video's,
            not equal to them: a block does not see those after it. 0 refuses.
        options: as in ``BlockwiseVideoAutoencoder``.

    Raises:
        UserError: an option that is not allowed or would not be used, or halves of different factors.
    """

    family = "LTX-2"
    class_name = CLASS_NAME
    config_class = LTX2AutoencoderConfig
    networks = MappingProxyType({"encoder": LTX2Encoder, "decoder": LTX2Decoder})
    init_params = staticmethod(init_params)
    rules = staticmethod(ltx2_vae_rules)
    default_tiles = Tiles((512, 512), (448, 448))
    # the mirror image that stands around a decoder's pictures needs a second row and column
    narrowest_tile = 2

    def __init__(
        self,
        config: LTX2AutoencoderConfig,
        weights: Resident,
        dtype: Any = jnp.float32,
        *,
        frame_tiles: FrameTiles | None = None,
        streaming_context: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(config, weights, dtype, **options)
        factors = (config.temporal_factor, config.spatial_factor)
        if config.decoder_factors != factors:
            raise UserError(
                f"an encoder of (frames, rows) {factors} per latent with a decoder of {config.decoder_factors}; "
                "allowed are the same: take them from one model"
            )
        if type(streaming_context) is not int or streaming_context < 0:
            raise UserError(f"streaming_context={streaming_context!r} is not allowed; choose 0, 1, 2 or more")
        if config.decoder_causal and (streaming_context or frame_tiles is not None):
            raise UserError(
                "this decoder is causal and streams exactly, so frame_tiles and streaming_context would not be used: "
                "leave them out"
            )
        self.frame_tiles = FrameTiles() if frame_tiles is None else frame_tiles
        self.streaming_context = streaming_context

    @classmethod
    def abstract_params(cls, config: LTX2AutoencoderConfig, dtype: jnp.dtype) -> PyTree:
        """The shapes of the parameters, in the dtype that they are kept in; statistics are kept in float32."""
        shapes = super().abstract_params(config, dtype)
        wide = {name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for name, leaf in shapes[STATISTICS].items()}
        return shapes | {STATISTICS: wide}

    @property
    def largest_at_once(self) -> int:
        """Pixels, of all frames and videos together, that go through the networks at once."""
        return LARGEST_AT_ONCE

    # --- videos in blocks -------------------------------------------------------------------------------------------

    def encode_frames(
        self, videos: Float[Array, "B F H W P"], state: PyTree | None = None, *, tiling: bool | None = None
    ) -> tuple[Float[Array, "B T h w C"], PyTree]:
        """The next frames of a video to their latents; as the class above says, for encoders that are causal."""
        if not self.config.encoder_causal:
            raise UserError(f"this encoder {NOT_CAUSAL}; allowed is a causal one: encode the whole video")
        return super().encode_frames(videos, state, tiling=tiling)

    def decode_frames(
        self, latents: Float[Array, "B T h w C"], state: PyTree | None = None, *, tiling: bool | None = None
    ) -> tuple[Float[Array, "B F H W P"], PyTree]:
        """The next latent frames of a video to their frames; as the class above says, for decoders that are causal.

        One that is not needs ``streaming_context``, and gives frames that are close to the whole video's.
        """
        if self.config.decoder_causal:
            return super().decode_frames(latents, state, tiling=tiling)
        if not self.streaming_context:
            raise UserError(
                f"this decoder {NOT_CAUSAL}; allowed is a causal one, or streaming_context=1 or 2, which decodes a "
                "block with that many latent frames before it again and comes close: decode the whole video"
            )
        return self._decode_with_context(latents, state, tiling)

    def _decode_with_context(
        self, latents: Float[Array, "B T h w C"], state: PyTree | None, tiling: bool | None
    ) -> tuple[Float[Array, "B F H W P"], PyTree]:
        """The last latent frames stand before a block, or copies of the first one; what they decode to is dropped."""
        self._check("decoder", latents)
        latents, count = self._denormalised(latents), self.streaming_context
        shape = (latents.shape[0], count, *latents.shape[2:])
        if state is None:
            before, tiles = jnp.broadcast_to(latents[:, :1], shape), None
        else:
            known = isinstance(state, dict) and state.keys() == {"latents", "tiles"}
            if not known or np.shape(state["latents"]) != shape:
                raise self._other_state("decoder", latents)
            before, tiles = state["latents"], state["tiles"]
        joined = jnp.concatenate([before, latents], 1)
        frames, tiles = self._next("decoder", joined, tiles, tiling)
        frames = jnp.clip(frames[:, count * self.temporal_factor :], -1, 1)
        return frames, {"latents": joined[:, -count:], "tiles": tiles}

    # --- inside -----------------------------------------------------------------------------------------------------

    def _is_causal(self, half: str) -> bool:
        return self.config.encoder_causal if half == "encoder" else self.config.decoder_causal

    @functools.cached_property
    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of the channels, the second for latents that were multiplied by the scaling factor."""
        mean, std = (np.asarray(self.weights.params[STATISTICS][name], np.float32) for name in ("mean", "std"))
        return mean, std / np.float32(self.config.scaling_factor)

    def _normalised(self, mean: Array) -> Array:
        center, deviation = self._statistics
        return (mean - center) / jnp.broadcast_to(deviation, mean.shape)

    def _denormalised(self, latents: Array) -> Array:
        center, deviation = self._statistics
        return jnp.asarray(latents, jnp.float32) * deviation + center

    def _cut_in_time(self, half: str, x: Array, tiling: bool | None) -> bool:
        """Whether a video is decoded in pieces."""
        if half == "encoder" or self._is_causal(half):
            return False
        tiling = self.tiling if tiling is None else tiling
        if tiling is None:
            tiling = math.prod(self._pixels(half, x)) > self.largest_at_once
        return tiling and x.shape[1] > self.frame_tiles.in_latents(self.temporal_factor).size

    def _frames_at_once(self, half: str, x: Array) -> int:
        frames = super()._frames_at_once(half, x)
        return 1 + self.frame_tiles.size if self._cut_in_time(half, x, None) else frames

    def _whole(self, half: str, x: Array, tiling: bool | None, announced: bool = False) -> Array:
        if not self._cut_in_time(half, x, tiling):
            return super()._whole(half, x, tiling, announced)
        if not announced:
            frames, tiles = pixel_frames(x.shape[1], self.temporal_factor), self.frame_tiles
            self._say(
                f"{DOING[half]} {frames} frames in pieces of {tiles.size} every {tiles.stride}, to bound memory; "
                "tiling=False does not"
            )
        # the same for all pieces, of which the last may be short
        tiled = self._tiles_set_in(half, x, tiling, announced)
        run = functools.partial(super()._whole, half, tiling=tiled, announced=True)
        return jnp.asarray(decode_in_time(run, x, self.temporal_factor, self.frame_tiles))
