"""The feed-forward network of a SANA block ("Mix-FFN", a gated inverted bottleneck; arXiv 2410.10629 §2.2).

SANA-Video (arXiv 2509.24695) adds a convolution over frames behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from kernels.bias import add_bias
from kernels.depthwise_conv import depthwise_conv2d
from kernels.mix_ffn import mix_ffn
from kernels.mix_ffn.api import IMPLEMENTATIONS
from kernels.selection import DEFAULT, PLATFORMS, preferred
from kernels.split_frames import all_frames, earlier_frames, later_frames, own_part
from kernels.typing import Array, Float
from kernels.written_once import written_once
from sana_jax.errors import UserError
from sana_jax.nn.activations import silu
from sana_jax.nn.initializers import torch_uniform
from sana_jax.nn.linear import Linear


class GLUMBConv(nn.Module):
    """Pointwise D -> 2·hidden, SiLU, depthwise 3x3, ``a · SiLU(gate)``, pointwise hidden -> D.

    No norm and no residual. The 3x3 convolution is also what tells a SANA without position table where a token is.
    """

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        """Mixes channels, and each token with its eight neighbours."""
        return _gated_bottleneck(x, self.hidden, self.dtype)


def _gated_bottleneck(x: Float[Array, "B H W D"], hidden: int, dtype: Any) -> Float[Array, "B H W D"]:
    """The layers of ``GLUMBConv``, made in the module that calls this.

    One after another, so that each can be looked at, unless their middle is preferred as one operation somewhere.
    """
    features, wide = x.shape[-1], 2 * hidden
    fused = any(preferred("mix_ffn", IMPLEMENTATIONS, platform) != DEFAULT for platform in PLATFORMS)
    inverted = Linear(
        wide,
        dtype=dtype,
        kernel_init=torch_uniform(features),
        bias_init=torch_uniform(features),
        bias_apart=fused,
        name="conv_inverted",
    )(x)
    depth = DepthwiseConv(wide, dtype=dtype, weights_apart=fused, name="conv_depth")
    if fused:
        gated = mix_ffn(*inverted, *depth())
    else:
        value, gate = jnp.split(written_once(depth(silu(inverted))), 2, axis=-1)
        gated = value * silu(gate)
    return Linear(features, use_bias=False, dtype=dtype, kernel_init=torch_uniform(hidden), name="conv_point")(gated)


class TemporalGLUMBConv(nn.Module):
    """``GLUMBConv`` on every frame, and ``u + conv(u)`` with a dense kernel over three frames of its output ``u``.

    In blocks (``block_starts``), a frame sees the one before it across blocks, and the one after it in its own block
    alone, so that no block depends on a later one. The frame before the first is zero or given. Training from scratch
    starts with a kernel of zeros.
    """

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T H W D"],
        block_starts: Sequence[int] = (0,),
        previous: Float[Array, "B H W D"] | None = None,
        axis_name: str | None = None,
    ) -> tuple[Float[Array, "B T H W D"], Float[Array, "B H W D"]]:
        """Mixes channels, neighbouring tokens and neighbouring frames.

        Args:
            x: frames of tokens.
            block_starts: the first frame of every block, ascending from 0.
            previous: what this function gave as its second result for the frames before; None where there are none.
            axis_name: inside ``jax.shard_map``, the mesh axis over which frames are split (``kernels.split_frames``),
                and with them those before: there is no ``previous``. ``block_starts`` are those of all frames.

        Returns:
            The frames, and the last frame as it was before the convolution over frames.
        """
        batch, frames, *size, features = x.shape
        u = _gated_bottleneck(x.reshape(batch * frames, *size, features), self.hidden, self.dtype)
        u = u.reshape(batch, frames, *size, features)
        # One product over three frames' channels adds up in one accumulator.
        over_frames = Linear(
            features, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="conv_temp"
        )
        return u + over_frames(_three_frames(u, block_starts, previous, axis_name)), u[:, -1]


def check_block_starts(starts: tuple[int, ...], frames: int, name: str = "block_starts") -> None:
    """Raises ``UserError`` unless these are the first frames of the blocks that a video of latent frames is cut into.

    Args:
        starts: the first frame of every block.
        frames: T, of the whole video.
        name: of the argument.
    """
    if not starts or starts[0] != 0 or any(b <= a for a, b in zip(starts, (*starts[1:], frames))):
        raise UserError(
            f"{name}={starts}: the first latent frames of the blocks must ascend from 0 and stay below the video's "
            f"{frames}"
        )


def _three_frames(
    u: Float[Array, "B T H W D"],
    block_starts: Sequence[int],
    previous: Float[Array, "B H W D"] | None,
    axis_name: str | None,
) -> Float[Array, "B T H W E"]:
    """The channels of the frame before, the frame and the frame after, side by side; arguments as above."""
    frames = u.shape[1]
    first = earlier_frames(u, 1, axis_name) if previous is None else previous[:, None].astype(u.dtype)
    before = jnp.concatenate([first, u[:, :-1]], axis=1)
    after = jnp.concatenate([u[:, 1:], later_frames(u, 1, axis_name)], axis=1)
    ends = np.isin(np.arange(1, all_frames(frames, axis_name) + 1), block_starts)  # the next frame is another block's
    if ends.any():
        after = jnp.where(own_part(ends, frames, axis_name)[:, None, None, None], 0, after)
    return jnp.concatenate([before, u, after], axis=-1)


class DepthwiseConv(nn.Module):
    """A 3x3 kernel (3, 3, C) and a bias per channel.

    With ``weights_apart`` it convolves nothing and gives both, in the compute dtype, to an operation that does.
    """

    channels: int
    dtype: jnp.dtype = jnp.float32
    weights_apart: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"] | None = None
    ) -> Float[Array, "B H W C"] | tuple[Float[Array, "3 3 C"], Float[Array, " C"]]:
        """Convolves every channel with its own kernel, zero outside the picture."""
        init = torch_uniform(9)
        kernel = self.param("kernel", init, (3, 3, self.channels), jnp.float32).astype(self.dtype)
        bias = self.param("bias", init, (self.channels,), jnp.float32).astype(self.dtype)
        return (kernel, bias) if self.weights_apart else add_bias(depthwise_conv2d(x, kernel), bias)
