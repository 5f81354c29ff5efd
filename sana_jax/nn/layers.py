"""A network's layers, whose parameters are one array each with all layers stacked on a leading axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.typing import Array, Float, PyTree
from sana_jax.nn.linear import LORA


def run_layers(
    block: nn.Module,
    step: Callable[[nn.Module, Array, Any], tuple[Array, PyTree]],
    x: Float[Array, "..."],
    by_layer: PyTree,
    count: int,
    *,
    scanned: bool,
    keep_outputs: bool = False,
) -> tuple[Float[Array, "..."], PyTree, Float[Array, "layers ..."] | None]:
    """Runs ``count`` layers of one kind one after another: compiled once and scanned, or unrolled. Equal outputs.

    Args:
        block: the network's own submodule that stands for all of them, inside the network's call. Its parameters are
            stacked under its name, and so is its LoRA.
        step: (the block with one layer's parameters, x, that layer's part of ``by_layer``) -> (x, what else is found).
        x: what goes in at the first layer.
        by_layer: arrays with an axis of layers in front.
        count: of the layers.
        scanned: whether they are scanned; drawing parameters needs that.
        keep_outputs: whether ``x`` after every layer is kept.

    Returns:
        ``x`` after the last layer, what else was found, stacked, and ``x`` after every layer, stacked, or None.
    """
    if scanned:

        def body(block: nn.Module, x: Array, own: Any) -> tuple[Array, tuple[PyTree, Array | None]]:
            x, found = step(block, x, own)
            return x, (found, x if keep_outputs else None)

        scan = nn.scan(
            body,
            variable_axes={"params": 0, LORA: 0, "intermediates": 0},
            split_rngs={"params": True},
            length=count,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, (found, outputs) = scan(block, x, by_layer)
        return x, found, outputs

    stacked = {
        collection: block.variables[collection] for collection in ("params", LORA) if collection in block.variables
    }
    run = nn.apply(step, block.clone(parent=None))
    each, outputs = [], []
    for variables, own in layers_of((stacked, by_layer), count):
        x, found = run(variables, x, own)
        each.append(found)
        outputs.append(x)
    found = jax.tree.map(lambda *parts: jnp.stack(parts), *each)
    return x, found, jnp.stack(outputs) if keep_outputs else None


def layers_of(stacked: PyTree, count: int) -> list[PyTree]:
    """The tree of each of ``count`` layers.

    Cut in one piece of work: the gradients of ``count`` single indexings are as many whole stacks, nearly all zero, to
    be added up; that of one cut is the gradients side by side.
    """
    leaves, structure = jax.tree.flatten(stacked)
    cut = [jax.lax.split(leaf, [1] * count) for leaf in leaves]
    return [jax.tree.unflatten(structure, [parts[layer].squeeze(0) for parts in cut]) for layer in range(count)]
