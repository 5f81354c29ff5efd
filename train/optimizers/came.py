"""CAME (arXiv 2307.02047): factored second moments, damped where the updates disagree; also with an 8-bit momentum.

A matrix (in, out) keeps the average squared gradient of each output and of each input instead of every element's. Each
layer of a stack is a matrix of its own: its statistics, and the size that its update is clipped to, are its own.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kernels.typing import Array, Float, PyTree
from train.optimizers.paths import Layout, layer_size, map_with_names, parameter_layout


class OutputBlocks(NamedTuple):
    """A matrix (..., in, out) in 8 bits; a block is ``block_size`` outputs with all their inputs, of one layer."""

    codes: Array
    """uint8, of the matrix's shape."""
    block_scales: Array
    """float32 (..., blocks): a 255th of the distance from a block's smallest to its largest value."""
    block_minimums: Array
    """float32 (..., blocks): a block's smallest value."""


class Factored(NamedTuple):
    """Memory of a matrix (..., in, out)."""

    momentum: Array | OutputBlocks
    second_per_output: Array
    """(..., out): average over inputs of the squared gradient."""
    second_per_input: Array
    """(..., in): average over outputs."""
    residual_per_output: Array
    """(..., out): average over inputs of the squared distance of updates from the momentum."""
    residual_per_input: Array
    """(..., in): average over outputs."""


class Full(NamedTuple):
    """Memory of anything else, of the parameter's shape."""

    momentum: Array
    second: Array


class ScaleByCameState(NamedTuple):
    """``Factored`` or ``Full`` for every parameter."""

    moments: PyTree


class _Updated(NamedTuple):
    update: Array
    memory: Factored | Full


def scale_by_came(
    betas: tuple[float, float, float],
    epsilon_gradient: float,
    epsilon_residual: float,
    clip_threshold: float,
    block_size: int | None = None,
    min_8bit_size: int = 0,
) -> optax.GradientTransformation:
    """CAME's update, about 4 bytes of state per parameter, with ``block_size`` about 1.

    Args:
        betas: decay of the momentum, of the second moment, and of the squared residual.
        epsilon_gradient: added to the squared gradient.
        epsilon_residual: added to the squared residual.
        clip_threshold: root mean square to which a layer's update is scaled down.
        block_size: outputs that share a scale in the 8-bit momentum; None keeps it in float32.
        min_8bit_size: matrices of at most so many values keep a float32 momentum.
    """
    beta1, beta2, beta3 = betas

    def init(params: PyTree) -> ScaleByCameState:
        def one(path, leaf):
            if not parameter_layout(path, leaf.shape).is_matrix:
                return Full(jnp.zeros_like(leaf, jnp.float32), jnp.zeros_like(leaf, jnp.float32))
            *stack, inputs, outputs = leaf.shape
            in_8_bits = block_size is not None and layer_size(path, leaf.shape) > min_8bit_size
            momentum = jnp.zeros_like(leaf, jnp.float32)
            momentum = quantize_outputs(momentum, block_size) if in_8_bits else momentum
            # four arrays, not two twice: a step's buffers are donated
            return Factored(momentum, *(jnp.zeros((*stack, size)) for size in (outputs, inputs, outputs, inputs)))

        return ScaleByCameState(map_with_names(one, params))

    def factored(grad, memory: Factored, layout: Layout) -> _Updated:
        squared = grad**2 + epsilon_gradient
        second = _averaged(memory.second_per_output, memory.second_per_input, squared, beta2)
        update = _clip(grad * _inverse_root(*second), layout, clip_threshold)
        is_8bit = isinstance(memory.momentum, OutputBlocks)
        momentum = dequantize_outputs(memory.momentum, block_size) if is_8bit else memory.momentum
        momentum = beta1 * momentum + (1 - beta1) * update
        squared = (update - momentum) ** 2 + epsilon_residual
        residual = _averaged(memory.residual_per_output, memory.residual_per_input, squared, beta3)
        kept = quantize_outputs(momentum, block_size) if is_8bit else momentum
        return _Updated(momentum * _inverse_root(*residual), Factored(kept, *second, *residual))

    def full(grad, memory: Full, layout: Layout) -> _Updated:
        second = beta2 * memory.second + (1 - beta2) * (grad**2 + epsilon_gradient)
        update = _clip(grad * jax.lax.rsqrt(second), layout, clip_threshold)
        momentum = beta1 * memory.momentum + (1 - beta1) * update
        return _Updated(momentum, Full(momentum, second))

    def update(grads: PyTree, state: ScaleByCameState, params: PyTree | None = None):
        del params

        def one(path, grad, memory):
            compute = factored if isinstance(memory, Factored) else full
            return compute(grad, memory, parameter_layout(path, grad.shape))

        updated = map_with_names(one, grads, state.moments)
        update, memory = (
            jax.tree.map(lambda leaf, i=i: leaf[i], updated, is_leaf=lambda leaf: isinstance(leaf, _Updated))
            for i in range(2)
        )
        return update, ScaleByCameState(memory)

    return optax.GradientTransformation(init, update)


def _averaged(per_output, per_input, squared, beta: float):
    return (
        beta * per_output + (1 - beta) * squared.mean(-2),
        beta * per_input + (1 - beta) * squared.mean(-1),
    )


def _inverse_root(per_output: Float[Array, "... O"], per_input: Float[Array, "... I"]) -> Float[Array, "... I O"]:
    """1 / sqrt of the squares' approximation by their two averages."""
    outputs = jax.lax.rsqrt(per_output / per_output.mean(-1, keepdims=True))
    return outputs[..., None, :] * jax.lax.rsqrt(per_input)[..., :, None]


def _clip(update, layout: Layout, threshold: float):
    """Scaled down where the root mean square over a layer is above the threshold."""
    own_axes = tuple(range(layout.layers, update.ndim))
    root_mean_square = jnp.sqrt((update**2).mean(own_axes, keepdims=True))
    return update / jnp.maximum(1.0, root_mean_square / threshold)


def quantize_outputs(matrix: Float[Array, "*stack I O"], block_size: int) -> OutputBlocks:
    """Codes from a block's smallest value (0) to its largest (255), rounded to the nearest."""
    # The reduction over inputs comes first: what is padded and cut into blocks is small, whatever the mesh.
    smallest = _per_block(matrix.min(-2), block_size, jnp.inf).min(-1)
    scales = (_per_block(matrix.max(-2), block_size, -jnp.inf).max(-1) - smallest) / 255
    scale = _per_output(jnp.where(scales > 0, scales, 1), block_size, matrix.shape[-1])
    steps = (matrix - _per_output(smallest, block_size, matrix.shape[-1])) / scale
    return OutputBlocks(jnp.clip(jnp.round(steps), 0, 255).astype(jnp.uint8), scales, smallest)


def dequantize_outputs(blocks: OutputBlocks, block_size: int) -> Float[Array, "*stack I O"]:
    """The values, as float32."""
    codes, scales, smallest = blocks
    scale, offset = (_per_output(array, block_size, codes.shape[-1]) for array in (scales, smallest))
    return codes.astype(jnp.float32) * scale + offset


def _per_block(outputs: Float[Array, "*stack O"], block_size: int, filler: float) -> Float[Array, "*stack K S"]:
    missing = -outputs.shape[-1] % block_size
    padded = jnp.pad(outputs, [(0, 0)] * (outputs.ndim - 1) + [(0, missing)], constant_values=filler)
    return padded.reshape(*outputs.shape[:-1], -1, block_size)


def _per_output(blocks: Float[Array, "*stack K"], block_size: int, outputs: int) -> Float[Array, "*stack 1 O"]:
    return jnp.repeat(blocks, block_size, axis=-1)[..., None, :outputs]
