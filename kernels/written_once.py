"""An array that several parts of a backward pass read, computed once on a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.typing import Array, Float


@jax.custom_jvp
def written_once(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x``; where it is differentiated, XLA's CPU backend writes it to memory and every reader reads it there.

    It takes sums and products for cheap and puts them into each of their readers anew, also a convolution of 9 taps.
    Not differentiated, nothing is done. Differentiable in both modes and any number of times.
    """
    return x


@jax.custom_jvp
def _written(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jax.lax.platform_dependent(x, cpu=_through_a_conditional, default=lambda x: x)


def _through_a_conditional(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Nothing is fused across a conditional; across a barrier it is, as that is taken out before.

    The barrier hides from XLA that the other branch never runs.
    """
    always = jax.lax.optimization_barrier(jnp.array(True))
    return jax.lax.cond(always, lambda x: x, lambda x: jnp.full_like(x, jnp.nan), x)


for _each in (written_once, _written):
    _each.defjvp(lambda primals, tangents: (_written(*primals), *tangents))
