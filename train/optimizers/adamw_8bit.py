"""Adam whose moments are kept in 8 bits (after arXiv 2110.02861, with codes of our own)."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kernels.typing import Array, Int, PyTree
from train.optimizers.paths import layer_size, map_with_names
from train.optimizers.quantization import LastAxisBlocks, dequantize, quantize_positive, quantize_signed


class ScaleByAdam8bitState(NamedTuple):
    """Moments of the parameters; those of large ones in 8 bits."""

    count: Int[Array, ""]
    mu: PyTree
    """First moments: float32 arrays or ``LastAxisBlocks``."""
    root_nu: PyTree
    """Roots of the second moments, whose range is half as many powers of ten; float32 or ``LastAxisBlocks``."""


class _Updated(NamedTuple):
    update: Array
    mu: Array | LastAxisBlocks
    root_nu: Array | LastAxisBlocks


def scale_by_adam_8bit(
    beta1: float, beta2: float, epsilon: float, block_size: int, min_8bit_size: int
) -> optax.GradientTransformation:
    """Adam's update with moments in 8 bits, about 2.1 bytes of state per parameter.

    The update of a step is computed from float32 moments; they are rounded afterwards, the second one at random,
    which is a function of the step's number and the parameter's path alone.

    Args:
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        block_size: most values that share a scale.
        min_8bit_size: parameters of at most so many values in a layer keep float32 moments.
    """

    def is_8bit(path: str, leaf) -> bool:
        return leaf.ndim > 0 and layer_size(path, leaf.shape) > min_8bit_size

    def init(params: PyTree) -> ScaleByAdam8bitState:
        def first(path, leaf):
            zeros = jnp.zeros_like(leaf, jnp.float32)
            return quantize_signed(zeros, block_size) if is_8bit(path, leaf) else zeros

        def second(path, leaf):
            zeros = jnp.zeros_like(leaf, jnp.float32)
            return quantize_positive(zeros, block_size, jnp.uint32(0)) if is_8bit(path, leaf) else zeros

        return ScaleByAdam8bitState(
            jnp.zeros((), jnp.int32), map_with_names(first, params), map_with_names(second, params)
        )

    def update(grads: PyTree, state: ScaleByAdam8bitState, params: PyTree | None = None):
        del params
        count = optax.safe_increment(state.count)

        def one(path, grad, mu, root_nu) -> _Updated:
            small = not isinstance(mu, LastAxisBlocks)
            mu, root_nu = (mu, root_nu) if small else (dequantize(mu), dequantize(root_nu))
            mu = beta1 * mu + (1 - beta1) * grad
            root_nu = jnp.sqrt(beta2 * root_nu**2 + (1 - beta2) * grad**2)
            bias1, bias2 = 1 - beta1**count, 1 - beta2**count
            step = (mu / bias1) / (root_nu / jnp.sqrt(bias2) + epsilon)
            if small:
                return _Updated(step, mu, root_nu)
            # places of an array are numbered from the hash of its seed: other parameters and steps are elsewhere
            seed = jnp.uint32(zlib.crc32(path.encode())) + count.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
            return _Updated(step, quantize_signed(mu, block_size), quantize_positive(root_nu, block_size, seed))

        updated = map_with_names(one, grads, state.mu, state.root_nu)
        update, mu, root_nu = (
            jax.tree.map(lambda leaf, i=i: leaf[i], updated, is_leaf=lambda leaf: isinstance(leaf, _Updated))
            for i in range(3)
        )
        return update, ScaleByAdam8bitState(count, mu, root_nu)

    return optax.GradientTransformation(init, update)
