"""The LTX-2 video autoencoder's two networks, top to bottom; channels-last.

Source: LTX-2 (arXiv 2601.03233) and LTX-Video (arXiv 2501.00103), sections on the video autoencoder. A layer that is
causal sees its own frame and the two before it, another one the frames on both sides; beyond the video's ends stand
copies of its first and last frame. A causal network takes a video in one piece or in blocks of frames, one after
another, and gives the same; what a block must know of those before it is its state, the last two frames that each
convolution saw:

    frames, state = decoder.apply({"params": params}, first_latents)            # the video begins: no state
    frames, state = decoder.apply({"params": params}, more_latents, state)      # it goes on

The first frame of a video stands for itself alone and every later latent frame for ``temporal_factor`` frames, so the
block in which a video begins has other shapes than those that follow, and is another program. The state's own shapes
do not change. Parameter paths follow the published names. The statistics of the latents' channels are a part of the
checkpoint, and so of the parameters: ``{"encoder": ..., "decoder": ..., "statistics": {"mean", "std"}}``.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from kernels.typing import Array, Float, PRNGKeyArray, PyTree
from sana_jax.autoencoders.base import check_frames, check_video
from sana_jax.autoencoders.ltx2_config import LTX2AutoencoderConfig
from sana_jax.errors import UserError
from sana_jax.nn.activations import silu
from sana_jax.nn.initializers import torch_uniform

NORM_EPSILON = 1e-8
STATISTICS = "statistics"
NOT_CAUSAL = "is not causal: its frames depend on those after them, which are not there yet"


def init_params(config: LTX2AutoencoderConfig, key: PRNGKeyArray) -> PyTree:
    """Parameters for training from scratch, ``{"encoder", "decoder", "statistics"}``, float32."""
    encoder_key, decoder_key = jax.random.split(key)
    side = config.spatial_factor
    videos = jnp.zeros((1, 1, side, side, config.in_channels))
    latents = jnp.zeros((1, 1, 1, 1, config.latent_channels))
    return {
        "encoder": LTX2Encoder(config).init(encoder_key, videos)["params"],
        "decoder": LTX2Decoder(config).init(decoder_key, latents)["params"],
        STATISTICS: {"mean": jnp.zeros(config.latent_channels), "std": jnp.ones(config.latent_channels)},
    }


class LTX2Encoder(nn.Module):
    """Videos to the mean and logarithm of the variance of their latents, before the statistics of the channels.

    Attributes:
        config: the shape.
        dtype: compute dtype; norms are float32 inside.
    """

    config: LTX2AutoencoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, videos: Float[Array, "B F H W P"], state: PyTree | None = None
    ) -> tuple[Float[Array, "B T h w 2*C"], PyTree]:
        """Encodes frames in [-1, 1]: the first ones of a video (1 + k·temporal_factor), or the next k·temporal_factor.

        Args:
            videos: height and width are multiples of ``config.spatial_factor``.
            state: what encoding the frames before these gave; None where the video begins.

        Returns:
            (means and log-variances side by side, of which the second are the same for all channels; the state for the
            next frames).

        Raises:
            UserError: other sizes, another number of frames or channels, or a state for an encoder that is not causal.
        """
        config = self.config
        check_video("videos", videos, config.in_channels, config.spatial_factor)
        check_frames(videos.shape[1], config.temporal_factor, begins=state is None)
        if state is not None and not config.encoder_causal:
            raise UserError(f"this encoder {NOT_CAUSAL}; allowed is state=None: give it the whole video")
        layers = _Layers(config.encoder_causal, config.encoder_spatial_padding_mode, self.dtype, state)
        side = config.patch_size
        # columns before rows: the published order
        x = rearrange(videos.astype(self.dtype), "b t (h p) (w q) c -> b t h w (c q p)", p=side, q=side)
        x = layers.run(Conv3x3x3, "conv_in", x, features=config.latent_channels)
        for stage, (width, stride) in enumerate(zip(config.block_out_channels, config.downsample_strides)):
            for i in range(config.layers_per_block[stage]):
                x = layers.run(ResBlock, f"down_blocks_{stage}_resnets_{i}", x)
            x = layers.run(Downsample, f"down_blocks_{stage}_downsamplers_0", x, channels=width, stride=stride)
        for i in range(config.layers_per_block[-1]):
            x = layers.run(ResBlock, f"mid_block_resnets_{i}", x)
        x = layers.run(Conv3x3x3, "conv_out", silu(channel_norm(x)), features=config.latent_channels + 1)
        mean, log_variance = x[..., :-1], x[..., -1:]
        return jnp.concatenate([mean, jnp.broadcast_to(log_variance, mean.shape)], -1), layers.now


class LTX2Decoder(nn.Module):
    """Latents, with the statistics of their channels undone, to videos. Attributes as in ``LTX2Encoder``."""

    config: LTX2AutoencoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, latents: Float[Array, "B T h w C"], state: PyTree | None = None
    ) -> tuple[Float[Array, "B F H W P"], PyTree]:
        """Decodes any number of latent frames: the first ones of a video, or the next.

        Args:
            latents: of any height and width.
            state: what decoding the latent frames before these gave; None where the video begins. A decoder that is not
                causal gives an empty one, which says just that a video goes on: nothing is remembered, and frames at
                the edges of a block are not the whole video's.

        Returns:
            (frames, not clamped to [-1, 1]; the state for the next latents). There are 1 + (T-1)·temporal_factor frames
            where the video begins, and T·temporal_factor later on.

        Raises:
            UserError: another number of axes or channels, or a state with frames for a decoder that is not causal.
        """
        config = self.config
        check_video("latents", latents, config.latent_channels, 1)
        if state and not config.decoder_causal:
            raise UserError(f"this decoder {NOT_CAUSAL}; allowed is a state without frames: give it the whole video")
        layers = _Layers(config.decoder_causal, config.decoder_spatial_padding_mode, self.dtype, state)
        counts = tuple(reversed(config.decoder_layers_per_block))
        x = latents.astype(self.dtype)
        x = layers.run(Conv3x3x3, "conv_in", x, features=config.decoder_block_out_channels[-1])
        for i in range(counts[0]):
            x = layers.run(ResBlock, f"mid_block_resnets_{i}", x)
        stages = zip(counts[1:], config.upsample_strides, config.upsample_factors, config.upsample_residuals)
        for stage, (count, stride, factor, residual) in enumerate(stages):
            name = f"up_blocks_{stage}_upsamplers_0"
            options = {"stride": stride, "factor": factor, "residual": residual, "begins": state is None}
            x = layers.run(Upsample, name, x, **options)
            for i in range(count):
                x = layers.run(ResBlock, f"up_blocks_{stage}_resnets_{i}", x)
        side = config.patch_size
        x = layers.run(Conv3x3x3, "conv_out", silu(channel_norm(x)), features=config.out_channels * side * side)
        return rearrange(x, "b t h w (c q p) -> b t (h p) (w q) c", p=side, q=side), layers.now


class _Layers:
    """Runs a network's layers one after another and collects their states."""

    def __init__(self, causal: bool, padding: str, dtype: jnp.dtype, state: PyTree | None) -> None:
        self.now: dict[str, PyTree] = {}
        self._shared = {"causal": causal, "padding": padding, "dtype": dtype}
        self._past = state or {}

    def run(self, kind: type[nn.Module], name: str, x: Array, **fields: object) -> Array:
        """Makes a layer of a kind and runs it."""
        x, now = kind(**self._shared, **fields, name=name)(x, self._past.get(name))
        if self._shared["causal"]:
            self.now[name] = now
        return x


# --- blocks ---------------------------------------------------------------------------------------------------------


class ResBlock(nn.Module):
    """``x + conv(silu(norm(conv(silu(norm(x))))))``. Attributes as in ``Conv3x3x3``."""

    causal: bool
    padding: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T H W C"], past: PyTree | None) -> tuple[Float[Array, "B T H W C"], PyTree]:
        """Keeps the shape."""
        past, now = past or {}, {}
        hidden = x
        for name in ("conv1", "conv2"):
            conv = Conv3x3x3(x.shape[-1], self.causal, self.padding, self.dtype, name=name)
            hidden, now[name] = conv(silu(channel_norm(hidden)), past.get(name))
        return x + hidden, now


class Downsample(nn.Module):
    """Joins blocks of pixels and frames: of a convolution, and beside it the means of groups of the input's channels.

    Attributes:
        channels: of the result.
        stride: (frames, rows, columns) that become one.
        causal: as in ``Conv3x3x3``, like the others.
    """

    channels: int
    stride: tuple[int, int, int]
    causal: bool
    padding: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B F H W C"], past: Array | None
    ) -> tuple[Float[Array, "B T h w D"], Array | None]:
        """``past`` is the convolution's state, None where the video begins."""
        if past is None and self.stride[0] > 1:
            # A video's first frame stands for itself alone: it is joined with its own copy.
            x = jnp.concatenate([x[:, :1], x], 1)
        conv = Conv3x3x3(self.channels // math.prod(self.stride), self.causal, self.padding, self.dtype, name="conv")
        hidden, now = conv(x, past)
        joined = _fold(x, self.stride)
        means = joined.reshape(*joined.shape[:-1], self.channels, -1).mean(-1)
        return _fold(hidden, self.stride) + means, now


class Upsample(nn.Module):
    """Unfolds channels into blocks of pixels and frames: of a convolution, and beside it the input's own.

    Attributes:
        stride: (frames, rows, columns) that one becomes.
        begins: whether the first frame is the video's first.
        factor: what the number of channels is divided by.
        residual: whether the input's own are added, repeated as often as the channels are too few.
        causal: as in ``Conv3x3x3``, like the others.
    """

    stride: tuple[int, int, int]
    factor: int
    residual: bool
    begins: bool
    causal: bool
    padding: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T h w C"], past: Array | None
    ) -> tuple[Float[Array, "B F H W D"], Array | None]:
        """``past`` is the convolution's state, None where the video begins."""
        pixels = math.prod(self.stride)
        # A video's first frame stands for itself alone: what it unfolds to before itself is dropped.
        dropped = self.stride[0] - 1 if self.begins else 0
        conv = Conv3x3x3(x.shape[-1] * pixels // self.factor, self.causal, self.padding, self.dtype, name="conv")
        hidden, now = conv(x, past)
        hidden = _unfold(hidden, self.stride)[:, dropped:]
        if self.residual:
            hidden = hidden + jnp.tile(_unfold(x, self.stride)[:, dropped:], (1, 1, 1, 1, pixels // self.factor))
        return hidden, now


def _fold(x: Float[Array, "B F H W C"], stride: tuple[int, int, int]) -> Float[Array, "B T h w D"]:
    """Blocks of pixels and frames as channels."""
    frames, rows, columns = stride
    return rearrange(x, "b (t i) (h j) (w k) c -> b t h w (c i j k)", i=frames, j=rows, k=columns)


def _unfold(x: Float[Array, "B T h w D"], stride: tuple[int, int, int]) -> Float[Array, "B F H W C"]:
    """The inverse of ``_fold``."""
    frames, rows, columns = stride
    return rearrange(x, "b t h w (c i j k) -> b (t i) (h j) (w k) c", i=frames, j=rows, k=columns)


# --- layers ---------------------------------------------------------------------------------------------------------


class Conv3x3x3(nn.Module):
    """A 3x3x3 convolution; before a video's first frame, and after its last one, stand copies of it.

    In three dimensions as three in two over shifted frames, which XLA's CPU backend is up to four times faster at.

    Attributes:
        features: of the result.
        causal: of a frame and the two before it; else of a frame, the one before and the one after it.
        padding: ``zeros``, or ``reflect`` for the picture's own mirror image around it. A picture of one pixel has
            none, and its only row or column stands there.
        dtype: compute dtype.
    """

    features: int
    causal: bool
    padding: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T H W C"], past: Float[Array, "B 2 H W C"] | None
    ) -> tuple[Float[Array, "B T H W D"], Float[Array, "B 2 H W C"] | None]:
        """``past`` is the state, the last two frames of the input before; None where the video begins."""
        shape = (3, 3, 3, x.shape[-1], self.features)
        init = torch_uniform(math.prod(shape[:-1]))
        kernel = self.param("kernel", init, shape, jnp.float32)
        bias = self.param("bias", init, shape[-1:], jnp.float32).astype(self.dtype)
        first, last = x[:, :1], x[:, -1:]
        if past is None and x.shape[1] == 1:
            # all three taps see the one frame that there is
            out = self._convolve(self._mirrored(x), kernel.astype(jnp.float32).sum(0).astype(self.dtype))
            return self._cropped(out) + bias, jnp.concatenate([x, x], 1) if self.causal else None
        if self.causal:
            seen = jnp.concatenate([first, first, x] if past is None else [past, x], 1)
        else:
            seen = jnp.concatenate([first, x, last], 1)
        mirrored, kernel = self._mirrored(seen), kernel.astype(self.dtype)
        out = sum(self._convolve(mirrored[:, tap : tap + x.shape[1]], kernel[tap]) for tap in range(3))
        return self._cropped(out) + bias, seen[:, -2:] if self.causal else None

    # Pictures within their mirror image go through the convolution that pads with zeros, and lose their edges again:
    # XLA's CPU backend is twice as fast at it as at a convolution without padding.
    def _mirrored(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T h w C"]:
        if self.padding == "zeros":
            return x
        return jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")

    def _cropped(self, x: Float[Array, "B T h w D"]) -> Float[Array, "B T H W D"]:
        return x if self.padding == "zeros" else x[:, :, 1:-1, 1:-1]

    def _convolve(
        self, frames: Float[Array, "B T H W C"], kernel: Float[Array, "3 3 C D"]
    ) -> Float[Array, "B T H W D"]:
        pictures = frames.reshape(-1, *frames.shape[2:])
        out = jax.lax.conv_general_dilated(
            pictures, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return out.reshape(*frames.shape[:-1], self.features)


def channel_norm(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """``x / sqrt(mean of x² over the channels + 1e-8)``, in float32, rounded once."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + NORM_EPSILON)).astype(x.dtype)
