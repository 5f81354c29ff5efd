"""The Wan 2.1 video autoencoder's two networks, top to bottom; channels-last.

Source: Wan (arXiv 2503.20314), section on Wan-VAE. Every layer that looks along time is causal: it sees its own frame
and the ones before it. A network therefore takes a video in one piece or in blocks of frames, one after another, and
gives the same. What a block must know of those before it is its state, a nested dict of a few frames per layer:

    frames, state = decoder.apply({"params": params}, first_latents)            # the video begins: no state
    frames, state = decoder.apply({"params": params}, more_latents, state)      # it goes on

The first frame of a video stands for itself alone and every later latent frame for ``temporal_factor`` frames, so the
block in which a video begins has other shapes than those that follow, and is another program. The state's own shapes
do not change. Parameter paths follow the published names.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.softmax_attention import softmax_attention
from kernels.typing import Array, Float, PRNGKeyArray, PyTree
from sana_jax.autoencoders.base import check_frames, check_video
from sana_jax.autoencoders.dc_ae import Conv3x3
from sana_jax.autoencoders.wan_config import WanConfig
from sana_jax.nn.activations import silu
from sana_jax.nn.initializers import torch_uniform
from sana_jax.nn.linear import Linear

NORM_EPSILON = 1e-12


def init_params(config: WanConfig, key: PRNGKeyArray) -> PyTree:
    """Parameters for training from scratch, ``{"encoder": ..., "decoder": ...}``, float32."""
    encoder_key, decoder_key = jax.random.split(key)
    side = config.spatial_factor
    videos = jnp.zeros((1, 1, side, side, config.in_channels))
    latents = jnp.zeros((1, 1, 1, 1, config.z_dim))
    return {
        "encoder": WanEncoder(config).init(encoder_key, videos)["params"],
        "decoder": WanDecoder(config).init(decoder_key, latents)["params"],
    }


class WanEncoder(nn.Module):
    """Videos to the mean and logarithm of the variance of their latents, before the statistics of the channels.

    Attributes:
        config: the shape.
        dtype: compute dtype; norms and attention's weights are float32 inside.
    """

    config: WanConfig
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
            (means and log-variances side by side, the state for the next frames).

        Raises:
            UserError: other sizes, or another number of frames or channels.
        """
        config = self.config
        check_video("videos", videos, config.in_channels, config.spatial_factor)
        check_frames(videos.shape[1], config.temporal_factor, begins=state is None)
        past, now = state or {}, {}
        widths = config.encoder_widths
        x, now["conv_in"] = self._conv(config.base_dim, "conv_in")(videos.astype(self.dtype), past.get("conv_in"))
        number = 0
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                name = f"down_blocks_{number}"
                x, now[name] = ResBlock(width, self.dtype, name=name)(x, past.get(name))
                number += 1
            if level + 1 < len(widths):
                name = f"down_blocks_{number}"
                down = Downsample(config.temperal_downsample[level], self.dtype, name=name)
                x, now[name] = down(x, past.get(name))
                number += 1
        x, now["mid_block"] = MidBlock(self.dtype, name="mid_block")(x, past.get("mid_block"))
        x = silu(ChannelNorm(name="norm_out")(x))
        x, now["conv_out"] = self._conv(2 * config.z_dim, "conv_out")(x, past.get("conv_out"))
        return _dense(2 * config.z_dim, self.dtype, "quant_conv", x.shape[-1])(x), now

    def _conv(self, features: int, name: str) -> nn.Module:
        return CausalConv3x3x3(features, self.dtype, name=name)


class WanDecoder(nn.Module):
    """Latents, with the statistics of their channels undone, to videos. Attributes as in ``WanEncoder``."""

    config: WanConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, latents: Float[Array, "B T h w C"], state: PyTree | None = None
    ) -> tuple[Float[Array, "B F H W P"], PyTree]:
        """Decodes any number of latent frames: the first ones of a video, or the next.

        Args:
            latents: of any height and width.
            state: what decoding the latent frames before these gave; None where the video begins.

        Returns:
            (frames, not clamped to [-1, 1]; the state for the next latents). There are 1 + (T-1)·temporal_factor
            frames where the video begins, and T·temporal_factor later on.

        Raises:
            UserError: another number of axes or channels.
        """
        config = self.config
        check_video("latents", latents, config.z_dim, 1)
        past, now = state or {}, {}
        widths = config.decoder_widths
        latents = _dense(config.z_dim, self.dtype, "post_quant_conv", config.z_dim)(latents.astype(self.dtype))
        x, now["conv_in"] = self._conv(widths[-1], "conv_in")(latents, past.get("conv_in"))
        x, now["mid_block"] = MidBlock(self.dtype, name="mid_block")(x, past.get("mid_block"))
        # The published numbers count from the lowest resolution.
        for number, level in enumerate(reversed(range(len(widths)))):
            for i in range(config.num_res_blocks + 1):
                name = f"up_blocks_{number}_resnets_{i}"
                x, now[name] = ResBlock(widths[level], self.dtype, name=name)(x, past.get(name))
            if level > 0:
                name = f"up_blocks_{number}_upsamplers_0"
                up = Upsample(config.temperal_downsample[level - 1], self.dtype, name=name)
                x, now[name] = up(x, state is None, past.get(name))
        x = silu(ChannelNorm(name="norm_out")(x))
        x, now["conv_out"] = self._conv(config.out_channels, "conv_out")(x, past.get("conv_out"))
        return x, now

    def _conv(self, features: int, name: str) -> nn.Module:
        return CausalConv3x3x3(features, self.dtype, name=name)


# --- blocks ---------------------------------------------------------------------------------------------------------


class MidBlock(nn.Module):
    """A residual block, attention within each frame, another residual block."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T H W C"], past: PyTree | None) -> tuple[Float[Array, "B T H W C"], PyTree]:
        """Keeps the shape."""
        past, now = past or {}, {}
        x, now["resnets_0"] = ResBlock(x.shape[-1], self.dtype, name="resnets_0")(x, past.get("resnets_0"))
        x = FrameAttention(self.dtype, name="attentions_0")(x)
        x, now["resnets_1"] = ResBlock(x.shape[-1], self.dtype, name="resnets_1")(x, past.get("resnets_1"))
        return x, now


class ResBlock(nn.Module):
    """``shortcut(x) + conv(silu(norm(conv(silu(norm(x))))))``; the shortcut is a product where the width changes."""

    channels: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T H W C"], past: PyTree | None) -> tuple[Float[Array, "B T H W D"], PyTree]:
        """Gives ``channels`` channels."""
        past, now = past or {}, {}
        hidden = x
        for i in (1, 2):
            hidden = silu(ChannelNorm(name=f"norm{i}")(hidden))
            conv = CausalConv3x3x3(self.channels, self.dtype, name=f"conv{i}")
            hidden, now[f"conv{i}"] = conv(hidden, past.get(f"conv{i}"))
        if x.shape[-1] != self.channels:
            x = _dense(self.channels, self.dtype, "conv_shortcut", x.shape[-1])(x)
        return x + hidden, now


class FrameAttention(nn.Module):
    """Softmax attention of all pixels of a frame to each other, with one head; residual."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        """Keeps the shape."""
        batch, frames, height, width, channels = x.shape
        normed = ChannelNorm(name="norm")(x)
        joined = _dense(3 * channels, self.dtype, "to_qkv", channels)(normed)
        heads = (batch * frames, height * width, 1, channels)
        query, key, value = (part.reshape(heads) for part in jnp.split(joined, 3, -1))
        # The default scale is 1/sqrt(channels); logits and softmax are float32 inside.
        attended = softmax_attention(query, key, value).reshape(x.shape)
        return x + _dense(channels, self.dtype, "proj", channels)(attended)


class Downsample(nn.Module):
    """Halves height and width, and where ``temporal`` the number of frames after the first."""

    temporal: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B F H W C"], past: PyTree | None
    ) -> tuple[Float[Array, "B T H/2 W/2 C"], PyTree]:
        """Keeps the channels."""
        batch, frames, height, width, channels = x.shape
        kernel, bias = ConvWeights((3, 3, channels, channels), self.dtype, name="resample")()
        # zeros below and to the right only
        pictures = jax.lax.conv_general_dilated(
            _pictures(x), kernel, (2, 2), ((0, 1), (0, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = (pictures + bias).reshape(batch, frames, height // 2, width // 2, channels)
        if not self.temporal:
            return x, {}
        kernel, bias = ConvWeights((3, channels, channels), self.dtype, name="time_conv")()
        last = x[:, -1:]
        # Two frames become one, which also sees the frame before them. A video's first frame stays as it is.
        seen = x if past is None else jnp.concatenate([past["last"], x], 1)
        out = sum(seen[:, i : seen.shape[1] - 2 + i : 2] @ kernel[i] for i in range(3)) + bias
        return jnp.concatenate([x[:, :1], out], 1) if past is None else out, {"last": last}


class Upsample(nn.Module):
    """Doubles height and width and halves the channels; where ``temporal`` doubles the frames after the first."""

    temporal: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T H W C"], begins: bool, past: PyTree | None
    ) -> tuple[Float[Array, "B F 2*H 2*W C/2"], PyTree]:
        """``begins``: whether the first frame of ``x`` is the video's first."""
        now = {}
        channels = x.shape[-1]
        if self.temporal:
            conv = CausalConv3(2 * channels, self.dtype, name="time_conv")
            # A video's first frame stays single, and the frames after it do not see it.
            doubled, now["time_conv"] = conv(x[:, 1:] if begins else x, None if begins else past["time_conv"])
            # the first half of the channels is the earlier frame
            doubled = jnp.stack(jnp.split(doubled, 2, -1), 2)
            doubled = doubled.reshape(x.shape[0], 2 * doubled.shape[1], *x.shape[2:])
            x = jnp.concatenate([x[:, :1], doubled], 1) if begins else doubled
        out = Conv3x3(channels // 2, upsample=True, dtype=self.dtype, name="resample")(_pictures(x))
        return out.reshape(*x.shape[:2], *out.shape[1:]), now


# --- layers ---------------------------------------------------------------------------------------------------------


class CausalConv3x3x3(nn.Module):
    """A 3x3x3 convolution of a frame and the two before it, zero outside the pictures and before the video.

    The state is the last two frames of the input.
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T H W C"], past: Float[Array, "B 2 H W C"] | None
    ) -> tuple[Float[Array, "B T H W D"], Float[Array, "B 2 H W C"]]:
        """Convolves; ``past`` is the state, None where the video begins."""
        kernel, bias = conv_weights(self, (3, 3, 3, x.shape[-1], self.features))

        def convolve(frames: Array, tap: int) -> Array:
            out = jax.lax.conv_general_dilated(
                _pictures(frames), kernel[tap], (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return out.reshape(*frames.shape[:-1], self.features)

        out, now = _sum_over_taps(convolve, x, past)
        return out + bias, now


class CausalConv3(nn.Module):
    """A convolution along time alone, of a frame and the two before it; the state is as in ``CausalConv3x3x3``."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T H W C"], past: Float[Array, "B 2 H W C"] | None
    ) -> tuple[Float[Array, "B T H W D"], Float[Array, "B 2 H W C"]]:
        """Convolves; ``past`` is the state, None where the video begins."""
        kernel, bias = conv_weights(self, (3, x.shape[-1], self.features))
        out, now = _sum_over_taps(lambda frames, tap: frames @ kernel[tap], x, past)
        return out + bias, now


def _sum_over_taps(convolve: Callable[[Array, int], Array], x: Array, past: Array | None) -> tuple[Array, Array]:
    """The sum of ``convolve(frames, tap)`` over the taps 0, 1, 2: two frames earlier, one frame earlier, the frame.

    A convolution in three dimensions as three in two over shifted frames, which XLA's CPU backend is up to four times
    faster at. Frames before a video's first are zeros, which are not multiplied.
    """
    frames = x.shape[1]
    if past is None:
        out = convolve(x, 2)
        for tap, shift in ((1, 1), (0, 2)):
            if frames > shift:
                later = convolve(x[:, : frames - shift], tap)
                out = out + jnp.pad(later, ((0, 0), (shift, 0), (0, 0), (0, 0), (0, 0)))
        return out, jnp.pad(x[:, -2:], ((0, 0), (max(0, 2 - frames), 0), (0, 0), (0, 0), (0, 0)))
    seen = jnp.concatenate([past, x], 1)
    return sum(convolve(seen[:, tap : tap + frames], tap) for tap in range(3)), seen[:, -2:]


class ConvWeights(nn.Module):
    """The kernel and bias of a convolution."""

    shape: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        """Gives both."""
        return conv_weights(self, self.shape)


def conv_weights(module: nn.Module, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Kernel and bias of a module that is a convolution, in its compute dtype."""
    init = torch_uniform(math.prod(shape[:-1]))
    kernel, bias = (
        module.param(name, init, size, jnp.float32) for name, size in (("kernel", shape), ("bias", shape[-1:]))
    )
    return kernel.astype(module.dtype), bias.astype(module.dtype)


class ChannelNorm(nn.Module):
    """``x / max(length of x, 1e-12) · sqrt(C) · gamma`` over the channels, in float32, rounded once."""

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """Normalises every pixel."""
        gamma = self.param("gamma", nn.initializers.ones, (x.shape[-1],), jnp.float32).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        # of the square, so that pixels of zeros have a gradient
        square = jnp.maximum(jnp.square(wide).sum(-1, keepdims=True), NORM_EPSILON**2)
        return (wide * jax.lax.rsqrt(square) * (x.shape[-1] ** 0.5 * gamma)).astype(x.dtype)


def _dense(features: int, dtype: jnp.dtype, name: str, fan_in: int) -> nn.Module:
    """A convolution of a single pixel."""
    init = torch_uniform(fan_in)
    return Linear(features, dtype=dtype, kernel_init=init, bias_init=init, name=name)


def _pictures(x: Float[Array, "B T H W C"]) -> Float[Array, "N H W C"]:
    """The frames of all videos one after another."""
    return x.reshape(-1, *x.shape[2:])
