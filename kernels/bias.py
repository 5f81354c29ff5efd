"""A bias per channel, whose gradient is summed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.typing import Array, Float


@jax.custom_jvp
def add_bias(x: Float[Array, "... C"], bias: Float[Array, " C"]) -> Float[Array, "... C"]:
    """``x + bias`` in ``x``'s dtype; differentiable in forward and reverse mode.

    The gradient of a bias is a sum over all other axes, and XLA adds numbers of 16 bits in 16 bits: over three axes its
    CPU backend loses half of a sum of 2,048 bfloat16 numbers, which stands still once it is 256 times one of them.
    """
    return x + bias.astype(x.dtype)


@add_bias.defjvp
def _add_bias_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, bias), (of_x, of_bias) = primals, tangents
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return add_bias(x, bias), (of_x.astype(wide) + of_bias.astype(wide)).astype(x.dtype)  # the transpose sums in wide
