"""The dense layer of the networks, and the place where a LoRA enters them."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from kernels.bias import add_bias
from kernels.matrix_product import matrix_product
from kernels.typing import Array, Float, PRNGKeyArray
from sana_jax.quantization.formats import LEAVES
from sana_jax.quantization.products import quantized_product

LORA = "lora"  # the collection beside "params"


class Linear(nn.Module):
    """``x · kernel + bias``, with ``(x · down) · up`` added where the collection ``lora`` has these for the layer.

    A LoRA (arXiv 2106.09685) is thus a second tree beside the parameters: ``apply({"params": ..., "lora": ...}, ...)``.
    Where it has no leaves, and where there is none, the layer is the plain one. ``up`` has the LoRA's scale in it.
    Where it has ``dropout_keys`` (B,) and ``dropout_rate`` as well, as ``sana_jax.lora.with_dropout`` adds them for
    training, the LoRA's own input goes through dropout.

    Where the parameters have a quantised kernel's leaves in place of ``kernel``, the layer multiplies with these: see
    ``sana_jax.quantization.formats``.

    With ``bias_apart`` the bias is not added but given as a second result, for an operation that adds it itself.
    """

    features: int
    use_bias: bool = True
    dtype: jnp.dtype | None = None
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros
    bias_apart: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "... C"]
    ) -> Float[Array, "... D"] | tuple[Float[Array, "... D"], Float[Array, " D"]]:
        """Multiplies the last axis, in the compute dtype."""
        quantized = {name: self.get_variable("params", name) for name in LEAVES if self.has_variable("params", name)}
        kernel = None
        if not quantized:
            kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = quantized_product(x, quantized) if quantized else matrix_product(x, kernel)
        if bias is not None and not self.bias_apart:
            y = add_bias(y, bias)
        if self.has_variable(LORA, "down"):
            down, up = (self.get_variable(LORA, name).astype(y.dtype) for name in ("down", "up"))
            if self.has_variable(LORA, "dropout_keys"):
                x = sample_dropout(x, *(self.get_variable(LORA, name) for name in ("dropout_keys", "dropout_rate")))
            y = y + matrix_product(matrix_product(x, down), up)
        return (y, bias) if self.bias_apart else y


def sample_dropout(x: Float[Array, "R ..."], keys: PRNGKeyArray, rate: Float[Array, ""]) -> Float[Array, "R ..."]:
    """Sets a share ``rate`` of the values to 0 and divides the others by what is left, with one key (B,) per sample.

    The first axis is that of the samples, or has several rows of each, as the times of a video's frames have.
    """
    samples = keys.shape[0]
    if x.shape[0] != samples:
        folded = x.reshape(samples, x.shape[0] // samples, *x.shape[1:])
        return sample_dropout(folded, keys, rate).reshape(x.shape)

    def one(x, key):
        kept = jax.random.bernoulli(key, 1 - rate, x.shape)
        return jnp.where(kept, x.astype(jnp.float32) / (1 - rate), 0).astype(x.dtype)

    return jax.vmap(one)(x, keys)
