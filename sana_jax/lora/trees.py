"""LoRA as trees beside the parameters: made from files, merged into the parameters, or fresh for training."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Bool, Float, PRNGKeyArray, PyTree
from sana_jax.errors import UserError
from sana_jax.lora.reading import Lora
from sana_jax.lora.targets import LARGEST_RANK, match_targets
from sana_jax.weights.messages import first_few
from sana_jax.weights.rules import flatten, nested

Init = Literal["gaussian", "kaiming"]


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
    flat: dict[tuple[str, ...], Any] = {}
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
        flat |= {(*path, "down"): down, (*path, "up"): up}
    return nested(flat)


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


def init_lora(
    abstract: PyTree, targets: Sequence[str], rank: int, key: PRNGKeyArray, init: Init = "gaussian"
) -> PyTree:
    """A fresh float32 LoRA, without its scale: ``up`` is zero, so that it changes nothing yet.

    The draw of a layer depends on (key, its path) alone.

    Args:
        abstract: the network's parameters, as shapes.
        targets: names of ``sana_jax.lora.targets.PRESETS``, or patterns of paths.
        rank: of every layer.
        key: for the draws.
        init: how ``down`` is drawn: ``gaussian`` from N(0, 1/rank²), as diffusers' training scripts have it;
            ``kaiming`` uniformly from ±1/sqrt(inputs), PEFT's own default.

    Raises:
        UserError: a rank or an init that is not allowed, or a target that no layer matches.
    """
    if not 1 <= rank <= LARGEST_RANK:
        raise UserError(f"LoRA rank {rank} is not allowed; choose 1 to {LARGEST_RANK}, 4 to 64 are usual")
    if init not in ("gaussian", "kaiming"):
        raise UserError(f"LoRA init {init!r} is not allowed; choose gaussian or kaiming")
    flat: dict[tuple[str, ...], Any] = {}
    for layer in match_targets(abstract, targets):
        stack = () if layer.layers is None else (layer.layers,)
        own_key, shape = jax.random.fold_in(key, _name_hash(layer.path)), (*stack, layer.inputs, rank)
        if init == "gaussian":
            down = jax.random.normal(own_key, shape, jnp.float32) / rank
        else:
            bound = layer.inputs**-0.5
            down = jax.random.uniform(own_key, shape, jnp.float32, -bound, bound)
        up = jnp.zeros((*stack, rank, layer.outputs), jnp.float32)
        flat |= {(*layer.path, "down"): down, (*layer.path, "up"): up}
    return nested(flat)


def scaled_lora(lora: PyTree, scale: float | Float[Array, ""]) -> PyTree:
    """The collection ``lora`` that networks read, from a tree as it is trained: the scale goes into ``up``.

    Differentiable: training calls it in its loss and updates the tree without the scale, whose leaves are then what a
    LoRA file holds.

    Args:
        lora: leaves ``down`` and ``up``.
        scale: alpha / rank.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * scale if path[-1].key == "up" else leaf, lora)


def with_dropout(lora: PyTree, rate: float, keys: PRNGKeyArray) -> PyTree:
    """The collection ``lora`` with dropout on the LoRA's inputs, for training; the base layers' inputs stay whole.

    Every layer draws its own mask for every sample, from (the sample's key, the layer's path and number), whatever the
    sharding and the accumulation of the batch. See ``sana_jax.nn.linear``.

    Args:
        lora: as ``scaled_lora`` gives it.
        rate: share of a layer's inputs that is dropped; what is left is multiplied with 1 / (1 - rate).
        keys: one per sample, in the order of the batch: for instance
            ``jax.random.split(stream(seed, step, "lora_dropout"), batch_size)``.

    Raises:
        UserError: a rate outside 0 <= rate < 1.
    """
    if not 0 <= rate < 1:
        raise UserError(f"LoRA dropout {rate} is not allowed; choose 0 (none) up to, not including, 1")
    if rate == 0:
        return lora
    flat: dict[tuple[str, ...], Any] = {}
    leaves = flatten(lora)
    for path in dict.fromkeys(path[:-1] for path in leaves):
        down, up = leaves[(*path, "down")], leaves[(*path, "up")]
        own = jax.vmap(functools.partial(jax.random.fold_in, data=_name_hash(path)))(keys)
        stack = down.shape[:-2]
        if stack:
            own = jax.vmap(lambda layer, own=own: jax.vmap(lambda key: jax.random.fold_in(key, layer))(own))(
                jnp.arange(stack[0])
            )
        rates = jnp.full(stack, rate, jnp.float32)
        parts = {"down": down, "up": up, "dropout_keys": own, "dropout_rate": rates}
        flat |= {(*path, name): leaf for name, leaf in parts.items()}
    return nested(flat)


def _name_hash(path: Sequence[str]) -> int:
    return zlib.crc32("/".join(path).encode())


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
