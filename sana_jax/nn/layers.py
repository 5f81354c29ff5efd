"""Trees whose leaves hold one array per layer of a network, stacked on a leading axis."""

from __future__ import annotations

import jax

from kernels.typing import PyTree


def layers_of(stacked: PyTree, count: int) -> list[PyTree]:
    """The tree of each of ``count`` layers.

    Cut in one piece of work: the gradients of ``count`` single indexings are as many whole stacks, nearly all zero, to
    be added up; that of one cut is the gradients side by side.
    """
    leaves, structure = jax.tree.flatten(stacked)
    cut = [jax.lax.split(leaf, [1] * count) for leaf in leaves]
    return [jax.tree.unflatten(structure, [parts[layer].squeeze(0) for parts in cut]) for layer in range(count)]
