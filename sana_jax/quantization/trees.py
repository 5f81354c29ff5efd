"""Which layers of a network are quantised, and the parameters with their leaves in place of those layers' kernels."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import PyTree
from sana_jax.errors import UserError
from sana_jax.quantization.formats import (
    BLOCK_SCALE,
    FORMATS,
    LEAVES,
    OUTPUTS_FIRST,
    SCALE,
    TENSOR_SCALE,
    codes_name,
    format_of,
    leaf_shapes,
    quantize_kernel,
)
from sana_jax.weights.lazy import LazyArray
from sana_jax.weights.rules import flatten, nested

Path = tuple[str, ...]

# Keys under which layers are stacked on a first axis. Elsewhere a kernel of three axes is a convolution's.
_STACKS = ("transformer_blocks", "delta_blocks", "softmax_blocks", "layers", "blocks")

# Layers that keep their dtype: they are small, or what they compute goes into every token or comes out of all of them.
# Embeddings and the output; times and with them adaLN; gates with one output per head; zero-initialised projections.
DEFAULT_EXCLUDE = (
    r"(^|/)(patch_embed|patch_embedding|plucker_embedding|raymap_embedding|position_embedding|embeddings|embed_tokens)(/|$)",
    r"(^|/)(time_embed|caption_projection|proj_in|proj_out|text_proj_in|input_block|controlnet_blocks)(/|$)",
    r"(^|/)(to_gate_logits|to_beta|to_decay|plucker_proj|conv_depth|head)(/|$)",
)


def quantizable_layers(abstract: PyTree, exclude: tuple[str, ...] = DEFAULT_EXCLUDE) -> dict[Path, tuple[int, ...]]:
    """Paths of the dense layers, without ``kernel``, and the shapes of their kernels.

    Args:
        abstract: the network's parameters, as shapes.
        exclude: regular expressions; a layer in whose path one is found is left out.

    Raises:
        UserError: one that is no regular expression.
    """
    try:
        patterns = [re.compile(pattern) for pattern in exclude]
    except re.error as error:
        raise UserError(f"quantization: exclude {exclude!r} is no regular expression ({error}); mend it") from None
    layers = {}
    for path, leaf in flatten(abstract).items():
        stacked = len(leaf.shape) == 3 and any(key in _STACKS for key in path)
        dense = path[-1] == "kernel" and (len(leaf.shape) == 2 or stacked)
        if dense and not any(pattern.search("/".join(path[:-1])) for pattern in patterns):
            layers[path[:-1]] = tuple(leaf.shape)
    return layers


def quantized_abstract(abstract: PyTree, formats: dict[Path, str]) -> PyTree:
    """Shapes of the parameters with some layers quantised, each in its format; shardings go along.

    A kernel's sharding is that of its values; a scale is cut as the outputs are, and blocks of inputs as the inputs.
    """
    flat = {}
    for path, leaf in flatten(abstract).items():
        format_name = formats.get(path[:-1]) if path[-1] == "kernel" else None
        if format_name is None:
            flat[path] = leaf
            continue
        for name, shape in leaf_shapes(tuple(leaf.shape), format_name).items():
            sharding = _leaf_sharding(leaf, name)
            flat[(*path[:-1], name)] = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
    return nested(flat)


def quantize_params(params: PyTree, formats: dict[Path, str]) -> PyTree:
    """Parameters with some layers quantised, as LazyArrays that are made when they are read.

    A stack is quantised layer by layer on this process's first device, which never holds more than one of its layers.

    Args:
        params: arrays or LazyArrays, of any floating-point dtype; kernels are quantised from the values that they have.
        formats: paths of layers, without ``kernel``, and their formats.
    """
    flat: dict[Path, Any] = {}
    for path, leaf in flatten(params).items():
        format_name = formats.get(path[:-1]) if path[-1] == "kernel" else None
        if format_name is None:
            flat[path] = LazyArray.of(leaf)
            continue
        leaves = _LeavesOfAKernel(LazyArray.of(leaf), format_name)
        for name, shape in leaf_shapes(tuple(leaf.shape), format_name).items():
            read = functools.partial(leaves.read, name)
            flat[(*path[:-1], name)] = LazyArray(shape.shape, np.dtype(shape.dtype), read)
    return nested(flat)


class _LeavesOfAKernel:
    """The leaves of one kernel, all made at the first reading and let go of one after another."""

    def __init__(self, kernel: LazyArray, format_name: str) -> None:
        self._kernel, self._format = kernel, format_name
        self._made: dict[str, np.ndarray] = {}

    def read(self, name: str) -> np.ndarray:
        if name not in self._made:
            self._made = self._make()
        return self._made.pop(name)

    def _make(self) -> dict[str, np.ndarray]:
        kernel = self._kernel.read()
        if kernel.ndim == 2:
            return {name: np.asarray(leaf) for name, leaf in _quantize(jnp.asarray(kernel), self._format).items()}
        shapes = leaf_shapes(kernel.shape, self._format)
        made = {name: np.empty(shape.shape, shape.dtype) for name, shape in shapes.items()}
        for layer, own in enumerate(kernel):
            for name, leaf in _quantize(jnp.asarray(own), self._format).items():
                made[name][layer] = np.asarray(leaf)
        return made


_quantize = jax.jit(quantize_kernel, static_argnums=1)


def stored_formats(tree: PyTree) -> dict[Path, str]:
    """The quantised layers of a tree, by its leaves' names, and their formats."""
    names: dict[Path, set[str]] = {}
    for path in flatten(tree):
        names.setdefault(path[:-1], set()).add(path[-1])
    found = {path: format_of(own) for path, own in names.items()}
    return {path: format_name for path, format_name in found.items() if format_name is not None}


def plain_dtypes(tree: PyTree) -> set[str]:
    """The names of the dtypes of all leaves that are no quantised kernel's."""
    return {np.dtype(leaf.dtype).name for path, leaf in flatten(tree).items() if path[-1] not in LEAVES}


def quantized_rules(rules: tuple[tuple[str, tuple[Any, ...]], ...]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """Sharding rules with those of quantised kernels behind them: values lie as the kernel would.

    The rules of ``sana_jax.models.sharding_rules``, pattern by pattern; scales as in ``quantized_abstract``.
    """
    added = []
    for pattern, axes in rules:
        if pattern.endswith("/kernel") and len(axes) in (2, 3):  # a depthwise convolution's has more
            layer = pattern.removesuffix("/kernel")
            names = (*map(codes_name, FORMATS), BLOCK_SCALE, SCALE, TENSOR_SCALE)
            added += [(f"({layer})/{name}", _leaf_axes(axes, name)) for name in names]
    return (*rules, *added)


def _leaf_axes(axes: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    """The mesh axes of a leaf, from those of the kernel (..., C, D)."""
    turned = dict.fromkeys(map(codes_name, OUTPUTS_FIRST), (*axes[:-2], axes[-1], axes[-2]))
    return {SCALE: (*axes[:-2], axes[-1]), TENSOR_SCALE: axes[:-2], **turned}.get(name, axes)


def _leaf_sharding(leaf: Any, name: str) -> Any:
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    axes = (*sharding.spec, *(None,) * (len(leaf.shape) - len(sharding.spec)))
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*_leaf_axes(axes, name)))
