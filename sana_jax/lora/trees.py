"""LoRA as trees beside the parameters: made from files, merged into the parameters, or fresh for training."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Bool, Float, PRNGKeyArray, PyTree
from sana_jax.errors import UserError
from sana_jax.lora.reading import Lora
from sana_jax.weights.messages import first_few
from sana_jax.weights.rules import flatten

# Which layers training changes, by name: patterns of paths in the parameters.
ATTENTION = (r"transformer_blocks/attn[12]/to_[qkv]",)  # what diffusers' training scripts change
ALL_ATTENTION = (r"transformer_blocks/attn[12]/to_(q|k|v|out)",)


def lora_tree(adapters: Sequence[tuple[Lora, float]], abstract: PyTree, dtype: Any = np.float32) -> PyTree:
    """The ``lora`` collection of one or several files, each with a weight: their changes are added up.

    Scale and weight are folded into ``up``. Several LoRAs of a layer lie side by side along the rank; in a stack every
    layer has the largest rank, with zeros where a LoRA has less or nothing.

    Args:
        adapters: files as ``read_lora`` gives them for this network, and their weights.
        abstract: the network's parameters, as shapes.
        dtype: of the leaves.

    Returns:
        NumPy leaves ``.../down`` (layers, in, rank) and ``.../up`` (layers, rank, out), without the layer axis outside
        the blocks.
    """
    kernels = flatten(abstract)
    tree: dict[str, Any] = {}
    paths = dict.fromkeys(layer.path for lora, _ in adapters for layer in lora.layers)
    for path in paths:
        own = [([layer for layer in lora.layers if layer.path == path], weight) for lora, weight in adapters]
        ranks = [max((layer.rank for layer in layers), default=0) for layers, _ in own]
        *stack, inputs, outputs = kernels[(*path, "kernel")].shape
        down = np.zeros((*stack, inputs, sum(ranks)), dtype)
        up = np.zeros((*stack, sum(ranks), outputs), dtype)
        begin = 0
        for (layers, weight), rank in zip(own, ranks):
            for layer in layers:
                where = slice(begin, begin + layer.rank)
                index = () if layer.layer is None else (layer.layer,)
                down[(*index, slice(None), where)] = layer.down
                up[(*index, where)] = layer.up.astype(np.float32) * np.float32(layer.scale * weight)
            begin += rank
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node.update(down=down, up=up)
    return tree


def merge_lora(params: PyTree, lora: PyTree) -> PyTree:
    """New parameters with the LoRA's changes added, in float32 and then rounded to the parameters' own dtype.

    Where the change is 0 the kernel keeps its bits. Kernels are merged one after another, and a block at a time; if the
    caller keeps no reference to ``params``, each old kernel is freed before the next is made. Changes that rounding
    swallows whole are said in a line.
    """
    changes = flatten(lora)
    structure = jax.tree.structure(params)
    kernels = flatten(params)
    del params
    lost = []
    for path in dict.fromkeys(path[:-1] for path in changes):
        down, up = changes[(*path, "down")], changes[(*path, "up")]
        kernel, swallowed = _merge_kernel(kernels[(*path, "kernel")], jnp.asarray(down), jnp.asarray(up))
        kernels[(*path, "kernel")] = kernel
        if swallowed:
            lost.append("/".join(path))
    if lost:
        print(
            f"merging the LoRA leaves {len(lost)} kernels as they were, since the change is smaller than the rounding "
            f"of their dtype: {first_few(lost, 'kernels')}"
        )
    return jax.tree.unflatten(structure, list(kernels.values()))


def init_lora(abstract: PyTree, targets: Sequence[str], rank: int, key: PRNGKeyArray) -> PyTree:
    """A fresh float32 LoRA: ``down`` is drawn from N(0, 1/rank²) and ``up`` is zero, so that it changes nothing yet.

    The draw of a layer depends on (key, its path) alone.

    Args:
        abstract: the network's parameters, as shapes.
        targets: regular expressions; each matches the whole path of at least one dense layer, ``/kernel`` left out.
        rank: of every layer.
        key: for the draws.

    Raises:
        UserError: a rank below 1, or a pattern that no layer matches.
    """
    if rank < 1:
        raise UserError(f"LoRA rank {rank} is not allowed; choose 1 or more, 4 to 64 are usual")
    flat = flatten(abstract)
    dense = {path[:-1]: leaf for path, leaf in flat.items() if path[-1] == "kernel" and leaf.ndim <= 3}
    for pattern in targets:
        if not any(re.fullmatch(pattern, "/".join(path)) for path in dense):
            raise UserError(
                f"LoRA target {pattern!r} matches no layer; some that there are: "
                f"{', '.join('/'.join(path) for path in list(dense)[:5])}"
            )
    tree: dict[str, Any] = {}
    for path, kernel in dense.items():
        name = "/".join(path)
        if not any(re.fullmatch(pattern, name) for pattern in targets):
            continue
        *stack, inputs, outputs = kernel.shape
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node["down"] = jax.random.normal(own_key, (*stack, inputs, rank), jnp.float32) / rank
        node["up"] = jnp.zeros((*stack, rank, outputs), jnp.float32)
    return tree


@jax.jit
def _merge_kernel(
    kernel: Float[Array, "*layers C D"], down: Float[Array, "*layers C r"], up: Float[Array, "*layers r D"]
) -> tuple[Float[Array, "*layers C D"], Bool[Array, ""]]:
    """The merged kernel, and whether there was a change of which nothing is left."""

    def merge(parts):
        kernel, down, up = parts
        change = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        merged = jnp.where(change == 0, kernel, (kernel.astype(jnp.float32) + change).astype(kernel.dtype))
        return merged, jnp.any(change != 0), jnp.any(merged != kernel)

    parts = (kernel, down, up)
    merged, asked, done = merge(parts) if kernel.ndim == 2 else jax.lax.map(merge, parts)
    return merged, jnp.any(asked) & ~jnp.any(done)
