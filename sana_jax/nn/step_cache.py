"""Step caching inside a network: its blocks run, or what they last added is added again."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from kernels.typing import Array, Float
from sana_jax.diffusion.step_caching import Decision, StepCache, decide


def blocks_or_residual(
    network: nn.Module,
    x: Float[Array, "B N D"],
    cache: StepCache,
    signal: Float[Array, "B N D"],
    run: Callable[[nn.Module, Float[Array, "B N D"]], Float[Array, "B N D"]],
) -> tuple[Float[Array, "B N D"], StepCache, Decision]:
    """Tokens after a network's blocks, computed or not: see ``sana_jax.diffusion.step_caching``.

    Args:
        network: whose blocks they are; it is inside its own call.
        x: tokens before the first block.
        cache: of this step.
        signal: the first block's input, normalised and modulated by time.
        run: (network, tokens) -> the tokens after the last block.

    Returns:
        The tokens, the cache of the next step, and what was decided.
    """
    decision = decide(cache, signal)

    def compute(network, x):
        output = run(network, x)
        return output, output.astype(jnp.float32) - x.astype(jnp.float32)

    def reuse(network, x):
        return (x.astype(jnp.float32) + cache.residual).astype(x.dtype), cache.residual

    x, residual = nn.cond(decision.compute, compute, reuse, network, x)
    return x, cache._replace(signal=signal, residual=residual, accumulated=decision.accumulated), decision
