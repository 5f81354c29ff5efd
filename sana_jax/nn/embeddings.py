"""Embeddings of timesteps, captions, patches and positions."""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float
from sana_jax.nn.activations import gelu_tanh, silu
from sana_jax.nn.initializers import scaled_normal, torch_uniform, xavier_uniform
from sana_jax.nn.linear import Linear


def timestep_sinusoid(timestep: Float[Array, "*B"], channels: int = 256) -> Float[Array, "*B C"]:
    """Sinusoids ``[cos(t f) | sin(t f)]`` with ``f_k = 10000^(-k / (channels/2))``, in float32.

    ``timestep`` is taken as it is: no scaling, no truncation.
    """
    half = channels // 2
    # The weights were trained with exponents rounded to float32. At t = 1000 the next rounding, of the exponential, is
    # already seen in the angle, so it is done here exactly and not by the device's approximation.
    exponents = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = timestep.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def sincos_position_table(
    height: int, width: int, channels: int, *, base_size: int, interpolation_scale: float
) -> Float[np.ndarray, "N C"]:
    """2-D sin-cos position table of the 2K and 4K models, (height·width, channels), row-major, float32.

    Coordinates are ``index / (size / base_size) / interpolation_scale``, so a square picture always spans
    0..base_size/interpolation_scale. The first half of the channels encodes the column, the second half the row.
    """

    def one_axis(size: int) -> np.ndarray:
        # float32 positions and float64 angles, as the weights were trained
        position = np.arange(size, dtype=np.float32) / np.float32(size / base_size) / np.float32(interpolation_scale)
        frequencies = 1.0 / 10000.0 ** (np.arange(channels // 4, dtype=np.float64) / (channels / 4))
        angles = np.outer(position, frequencies)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    columns = np.broadcast_to(one_axis(width)[None], (height, width, channels // 2))
    rows = np.broadcast_to(one_axis(height)[:, None], (height, width, channels // 2))
    return np.concatenate([columns, rows], axis=-1).reshape(height * width, channels).astype(np.float32)


class TimestepEmbedder(nn.Module):
    """Sinusoid -> Linear -> SiLU -> Linear."""

    features: int
    dtype: jnp.dtype = jnp.float32
    zero_output: bool = False

    @nn.compact
    def __call__(self, timestep: Float[Array, "*B"]) -> Float[Array, "*B D"]:
        """Embeds every number by itself."""
        normal = scaled_normal(0.02)
        last = nn.initializers.zeros if self.zero_output else normal
        hidden = timestep_sinusoid(timestep).astype(self.dtype)
        hidden = Linear(self.features, dtype=self.dtype, kernel_init=normal, name="linear_1")(hidden)
        return Linear(self.features, dtype=self.dtype, kernel_init=last, name="linear_2")(silu(hidden))


class TimeEmbedding(nn.Module):
    """The embedding of the timestep (and, in distilled models, of the guidance scale) and its adaLN projection.

    Returns ``(e, t6)``: the raw embedding (*B, D), which the output layer uses, and ``Linear(SiLU(e))`` as (*B, 6, D),
    which the blocks use. Videos' times are (B, F), one per frame or one in all: with samples first they stay, over
    several devices, where their samples are.
    """

    features: int
    guidance_embeds: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, timestep: Float[Array, "*B"], guidance: Float[Array, "*B"] | None
    ) -> tuple[Float[Array, "*B D"], Float[Array, "*B 6 D"]]:
        """Embeds the timestep and, where the model takes it, the guidance scale."""
        embedding = TimestepEmbedder(self.features, self.dtype, name="timestep_embedder")(timestep)
        if self.guidance_embeds:
            guidance_embedder = TimestepEmbedder(self.features, self.dtype, zero_output=True, name="guidance_embedder")
            embedding = embedding + guidance_embedder(guidance)
        projection = Linear(6 * self.features, dtype=self.dtype, kernel_init=scaled_normal(0.02), name="linear")
        return embedding, projection(silu(embedding)).reshape(*embedding.shape[:-1], 6, self.features)


class CaptionProjection(nn.Module):
    """Linear -> GELU (tanh form) -> Linear over the text encoder's channels."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, caption: Float[Array, "B L C"]) -> Float[Array, "B L D"]:
        """Projects every caption token."""
        normal = scaled_normal(0.02)
        hidden = Linear(self.features, dtype=self.dtype, kernel_init=normal, name="linear_1")(caption)
        hidden = gelu_tanh(hidden)
        return Linear(self.features, dtype=self.dtype, kernel_init=normal, name="linear_2")(hidden)


class PatchEmbed(nn.Module):
    """A p x p convolution of stride p, as the dense product over each patch's (row, column, channel) values."""

    features: int
    patch_size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B N D"]:
        """Cuts the latent into patches, row by row, and projects each to a token."""
        batch, height, width, channels = x.shape
        p = self.patch_size
        patches = x.reshape(batch, height // p, p, width // p, p, channels).swapaxes(2, 3)
        patches = patches.reshape(batch, (height // p) * (width // p), p * p * channels)
        dense = Linear(
            self.features,
            dtype=self.dtype,
            kernel_init=xavier_uniform(),
            bias_init=torch_uniform(p * p * channels),
            name="proj",
        )
        return dense(patches)
