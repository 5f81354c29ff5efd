"""The deep-compression autoencoder's two networks, top to bottom; channels-last.

Papers: DC-AE (arXiv 2410.10733), for the attention EfficientViT (arXiv 2205.14756). Every published member is covered:
strided convolutions or pixel unshuffling, interpolation or pixel shuffling, RMS or batch norms, attention with or
without multi-scale queries, keys and values. Parameter paths follow the published names.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.depthwise_conv import depthwise_conv2d
from kernels.linear_attention import relu_linear_attention
from kernels.typing import Array, Float, PRNGKeyArray, PyTree
from sana_jax.autoencoders.dc_ae_config import BATCH_NORM, RES_BLOCK, DCAEConfig, Stage
from sana_jax.errors import UserError
from sana_jax.nn.activations import silu
from sana_jax.nn.initializers import torch_uniform
from sana_jax.nn.linear import Linear
from sana_jax.nn.mix_ffn import GLUMBConv

NORM_EPSILON = 1e-5
ATTENTION_EPSILON = 1e-15
FEED_FORWARD_RATIO = 4
ACTIVATIONS = {"relu": jax.nn.relu, "silu": silu}


def init_params(config: DCAEConfig, key: PRNGKeyArray) -> PyTree:
    """Parameters for training from scratch, ``{"encoder": ..., "decoder": ...}``, float32."""
    encoder_key, decoder_key = jax.random.split(key)
    side = config.spatial_factor
    images = jnp.zeros((1, side, side, config.in_channels))
    latents = jnp.zeros((1, 1, 1, config.latent_channels))
    return {
        "encoder": DCEncoder(config).init(encoder_key, images)["params"],
        "decoder": DCDecoder(config).init(decoder_key, latents)["params"],
    }


class DCEncoder(nn.Module):
    """Pictures to latents, before the scaling factor.

    Attributes:
        config: the shape.
        dtype: compute dtype; norms, their statistics and the attention sums are float32.
    """

    config: DCAEConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W P"]) -> Float[Array, "B h w C"]:
        """Encodes pictures in [-1, 1] whose height and width are multiples of ``config.spatial_factor``.

        Raises:
            UserError: other sizes, or another number of channels.
        """
        config = self.config
        check_input("images", images, config.in_channels, config.spatial_factor)
        stages = config.stages("encoder")
        unshuffle = config.downsample_block_type == "pixel_unshuffle"
        x = images.astype(self.dtype)
        if stages[0].layers:
            x = Conv3x3(stages[0].channels, dtype=self.dtype, name="conv_in")(x)
        else:
            x = DownBlock(stages[1].channels, unshuffle, shortcut=False, dtype=self.dtype, name="conv_in")(x)
        for i, stage in enumerate(stages):
            for j in range(stage.layers):
                x = _block(config, stage, self.dtype, f"down_blocks_{i}_{j}")(x)
            if stage.layers and i + 1 < len(stages):
                name = f"down_blocks_{i}_{stage.layers}"
                x = DownBlock(stages[i + 1].channels, unshuffle, dtype=self.dtype, name=name)(x)
        latents = Conv3x3(config.latent_channels, dtype=self.dtype, name="conv_out")(x)
        return latents + _average_groups(x, config.latent_channels) if config.encoder_out_shortcut else latents


class DCDecoder(nn.Module):
    """Latents, divided by the scaling factor, to pictures. Attributes as in ``DCEncoder``."""

    config: DCAEConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W P"]:
        """Decodes latents of any height and width; pictures are not clamped to [-1, 1].

        Raises:
            UserError: another number of channels.
        """
        config = self.config
        check_input("latents", latents, config.latent_channels, 1)
        stages = config.stages("decoder")
        interpolate = config.upsample_block_type == "interpolate"
        latents = latents.astype(self.dtype)
        x = Conv3x3(stages[-1].channels, dtype=self.dtype, name="conv_in")(latents)
        if config.decoder_in_shortcut:
            x = x + jnp.repeat(latents, stages[-1].channels // config.latent_channels, axis=-1)
        # The published numbers count from the highest resolution; it comes last.
        for i, stage in reversed(list(enumerate(stages))):
            upsamples = stage.layers > 0 and i + 1 < len(stages)
            if upsamples:
                x = UpBlock(stage.channels, interpolate, dtype=self.dtype, name=f"up_blocks_{i}_0")(x)
            for j in range(stage.layers):
                x = _block(config, stage, self.dtype, f"up_blocks_{i}_{j + upsamples}")(x)
        x = ACTIVATIONS[config.decoder_conv_act_fn.lower()](RMSNorm(name="norm_out")(x))
        if stages[0].layers:
            return Conv3x3(config.in_channels, dtype=self.dtype, name="conv_out")(x)
        return UpBlock(config.in_channels, interpolate, shortcut=False, dtype=self.dtype, name="conv_out")(x)


def _block(config: DCAEConfig, stage: Stage, dtype: jnp.dtype, name: str) -> nn.Module:
    if stage.block_type == RES_BLOCK:
        return ResBlock(stage.activation, stage.norm, dtype, name=name)
    return EfficientViTBlock(config.attention_head_dim, stage.multiscales, stage.norm, dtype, name=name)


def check_input(name: str, x: Array, channels: int, factor: int) -> None:
    """Raises ``UserError`` unless ``x`` is (batch, height, width, channels) with sizes that ``factor`` divides."""
    if len(x.shape) != 4 or x.shape[-1] != channels or 0 in x.shape:
        raise UserError(
            f"{name} of shape {tuple(x.shape)}; allowed is (batch, height, width, {channels}), none of them 0: bring "
            "them to that form"
        )
    if x.shape[1] % factor or x.shape[2] % factor:
        raise UserError(
            f"{name} of {x.shape[1]}x{x.shape[2]}; height and width must be multiples of {factor}: resize or crop them"
        )


# --- blocks ---------------------------------------------------------------------------------------------------------


class ResBlock(nn.Module):
    """``x + norm(conv(act(conv(x))))``."""

    activation: str
    norm: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Keeps the shape."""
        channels = x.shape[-1]
        hidden = ACTIVATIONS[self.activation](Conv3x3(channels, dtype=self.dtype, name="conv1")(x))
        hidden = Conv3x3(channels, use_bias=False, dtype=self.dtype, name="conv2")(hidden)
        return x + _norm(self.norm, "norm")(hidden)


class EfficientViTBlock(nn.Module):
    """Attention over the picture, then a gated feed-forward network with a depthwise convolution; both residual."""

    head_dim: int
    multiscales: tuple[int, ...]
    norm: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Keeps the shape."""
        x = x + MultiscaleLinearAttention(self.head_dim, self.multiscales, self.norm, self.dtype, name="attn")(x)
        hidden = GLUMBConv(FEED_FORWARD_RATIO * x.shape[-1], self.dtype, name="conv_out")(x)
        return x + RMSNorm(name="conv_out_norm")(hidden)


class MultiscaleLinearAttention(nn.Module):
    """ReLU attention of all pixels to all pixels.

    The layers ``to_q``, ``to_k`` and ``to_v`` are named so in the checkpoints, but a head takes its query, key and
    value from three neighbouring groups of ``head_dim`` channels of all their outputs side by side, then of the
    multi-scale outputs. The weights were trained that way.
    """

    head_dim: int
    multiscales: tuple[int, ...]
    norm: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Attends, without the residual connection."""
        batch, height, width, channels = x.shape
        heads = channels // self.head_dim
        projected = [self._dense(heads * self.head_dim, name)(x) for name in ("to_q", "to_k", "to_v")]
        scales = [jnp.concatenate(projected, -1)]
        for i, size in enumerate(self.multiscales):
            scales.append(MultiscaleProjection(size, 3 * heads, self.dtype, name=f"to_qkv_multiscale_{i}")(scales[0]))
        heads *= len(scales)
        by_head = jnp.concatenate(scales, -1).reshape(batch, height * width, heads, 3 * self.head_dim)
        # Few pixels cost less in the quadratic form; the value is the same.
        attend = relu_linear_attention if height * width > self.head_dim else _quadratic_attention
        attended = attend(*jnp.split(by_head, 3, -1), epsilon=ATTENTION_EPSILON)
        out = self._dense(channels, "to_out")(attended.reshape(batch, height, width, heads * self.head_dim))
        return _norm(self.norm, "norm_out")(out)

    def _dense(self, features: int, name: str) -> nn.Module:
        return Linear(features, use_bias=False, dtype=self.dtype, kernel_init=_dense_init, name=name)


class MultiscaleProjection(nn.Module):
    """A depthwise convolution, then a product over each of ``groups`` groups of channels."""

    size: int
    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Keeps the shape."""
        per_group = x.shape[-1] // self.groups
        x = DepthwiseConv(self.size, self.dtype, name="proj_in")(x)
        kernel = GroupedKernel(self.groups, per_group, name="proj_out")().astype(self.dtype)
        grouped = x.reshape(*x.shape[:3], self.groups, per_group)
        return jnp.einsum("bhwgi,gio->bhwgo", grouped, kernel).reshape(x.shape)


def _quadratic_attention(
    query: Float[Array, "B N h d"], key: Float[Array, "B N h d"], value: Float[Array, "B N h d"], epsilon: float
) -> Float[Array, "B N h d"]:
    """``relu_linear_attention`` with the weights of all pairs spelt out; float32 inside."""
    query, key, wide_value = (x.astype(jnp.float32) for x in (query, key, value))
    weights = jnp.einsum("bnhd,bmhd->bhnm", jax.nn.relu(query), jax.nn.relu(key), precision="highest")
    weights = weights / (weights.sum(-1, keepdims=True) + epsilon)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, wide_value, precision="highest").astype(value.dtype)


class DownBlock(nn.Module):
    """Halves height and width: a convolution, plus the input's pixels averaged in groups of channels."""

    channels: int
    unshuffle: bool
    shortcut: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H/2 W/2 D"]:
        """Gives ``channels`` channels."""
        if self.unshuffle:
            out = _unshuffle(Conv3x3(self.channels // 4, dtype=self.dtype, name="conv")(x))
        else:
            out = Conv3x3(self.channels, stride=2, dtype=self.dtype, name="conv")(x)
        return out + _average_groups(_unshuffle(x), self.channels) if self.shortcut else out


class UpBlock(nn.Module):
    """Doubles height and width: a convolution, plus the input's channels spread over the new pixels."""

    channels: int
    interpolate: bool
    shortcut: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W D"]:
        """Gives ``channels`` channels."""
        if self.interpolate:
            out = Conv3x3(self.channels, upsample=True, dtype=self.dtype, name="conv")(x)
        else:
            out = _shuffle(Conv3x3(4 * self.channels, dtype=self.dtype, name="conv")(x))
        if not self.shortcut:
            return out
        return out + _shuffle(jnp.repeat(x, 4 * self.channels // x.shape[-1], axis=-1))


# --- layers ---------------------------------------------------------------------------------------------------------


def _dense_init(key: PRNGKeyArray, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    return torch_uniform(shape[0])(key, shape, dtype)


class Conv3x3(nn.Module):
    """A dense 3x3 convolution, zero outside the picture; of every second pixel, or of the doubled picture."""

    features: int
    use_bias: bool = True
    stride: int = 1
    upsample: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H1 W1 D"]:
        """Convolves."""
        init = torch_uniform(9 * x.shape[-1])
        kernel = self.param("kernel", init, (3, 3, x.shape[-1], self.features), jnp.float32)
        if self.upsample:
            out = _upsampled_convolution(x, kernel, self.dtype)
        else:
            out = _convolution(x, kernel.astype(self.dtype), self.stride)
        if self.use_bias:
            out = out + self.param("bias", init, (self.features,), jnp.float32).astype(self.dtype)
        return out


def _convolution(x: Array, kernel: Array, stride: int = 1) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _upsampled_convolution(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    """The 3x3 convolution of a picture whose pixels are doubled in both directions, without doubling them.

    Of the three taps along an axis two always fall on one pixel of ``x``, so each of the four pixels that one pixel
    becomes is a 2x2 convolution of ``x``: 4/9 of the products.
    """
    kernel = kernel.astype(jnp.float32)
    # [first, second] taps for the even and for the odd new rows; then the same for columns.
    rows = jnp.stack([jnp.stack([kernel[0], kernel[1] + kernel[2]]), jnp.stack([kernel[0] + kernel[1], kernel[2]])])
    first, middle, last = rows[:, :, 0], rows[:, :, 1], rows[:, :, 2]
    both = jnp.stack([jnp.stack([first, middle + last], 2), jnp.stack([first + middle, last], 2)], 1)
    # both: (row parity, column parity, 2, 2, C, D)
    height, width, features = *x.shape[1:3], kernel.shape[-1]
    taps = both.transpose(2, 3, 4, 0, 1, 5).reshape(2, 2, x.shape[-1], 4 * features).astype(dtype)
    out = jax.lax.conv_general_dilated(
        x, taps, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(x.shape[0], height + 1, width + 1, 2, 2, features)
    # An even pixel's window ends at its own place, an odd one's begins there.
    parts = [[out[:, i : i + height, j : j + width, i, j] for j in (0, 1)] for i in (0, 1)]
    doubled = jnp.stack([jnp.stack(row, 3) for row in parts], 2)
    return doubled.reshape(x.shape[0], 2 * height, 2 * width, features)


class DepthwiseConv(nn.Module):
    """A kernel for each channel, no bias."""

    size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Convolves every channel, zero outside the picture."""
        kernel = self.param("kernel", torch_uniform(self.size**2), (self.size, self.size, x.shape[-1]), jnp.float32)
        return depthwise_conv2d(x, kernel.astype(self.dtype))


class GroupedKernel(nn.Module):
    """The matrices of a product in groups."""

    groups: int
    per_group: int

    @nn.compact
    def __call__(self) -> Float[Array, "g i o"]:
        """Gives them."""
        shape = (self.groups, self.per_group, self.per_group)
        return self.param("kernel", torch_uniform(self.per_group), shape, jnp.float32)


def _norm(kind: str, name: str) -> nn.Module:
    return BatchNorm(name=name) if kind == BATCH_NORM else RMSNorm(name=name)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + ε) · scale + bias`` over the channels, in float32, rounded once to ``x``'s dtype."""

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """Normalises every pixel."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        factor = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + NORM_EPSILON)
        return (wide * factor * scale + bias).astype(x.dtype)


class BatchNorm(nn.Module):
    """Batch norm as inference has it: ``(x - mean) / sqrt(var + ε) · scale + bias`` with fixed statistics.

    The statistics are parameters that no gradient reaches; float32 inside.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """Normalises every channel."""

        def vector(name: str, init: nn.initializers.Initializer) -> Array:
            return self.param(name, init, (x.shape[-1],), jnp.float32).astype(jnp.float32)

        scale, bias = vector("scale", nn.initializers.ones), vector("bias", nn.initializers.zeros)
        mean = jax.lax.stop_gradient(vector("mean", nn.initializers.zeros))
        variance = jax.lax.stop_gradient(vector("var", nn.initializers.ones))
        factor = scale * jax.lax.rsqrt(variance + NORM_EPSILON)
        return ((x.astype(jnp.float32) - mean) * factor + bias).astype(x.dtype)


def _unshuffle(x: Float[Array, "B H W C"]) -> Float[Array, "B H/2 W/2 4*C"]:
    """Every 2x2 pixels become one; its channels count (channel, row, column), the last fastest."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // 2, width // 2, 4 * channels)


def _shuffle(x: Float[Array, "B H W 4*C"]) -> Float[Array, "B 2*H 2*W C"]:
    """The inverse of ``_unshuffle``."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, channels // 4, 2, 2)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, 2 * height, 2 * width, channels // 4)


def _average_groups(x: Float[Array, "B H W C"], channels: int) -> Float[Array, "B H W D"]:
    """Means of neighbouring channels, ``channels`` of them."""
    return x.reshape(*x.shape[:3], channels, -1).mean(-1)
