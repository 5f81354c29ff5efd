"""Which tensor of a published checkpoint is which of our arrays: one table of rules per family, read both ways.

A rule pairs a path of our parameter tree with a name in the checkpoint::

    Rule("transformer_blocks/attn1/to_q/kernel", "transformer_blocks.{layer}.attn1.to_q.weight", LINEAR)

``{layer}`` in the checkpoint's name alone says that our array has all layers stacked on its first axis. Any other
placeholder stands on both sides and for a number. The shapes of our tree say which rules apply and how often, so the
tables hold no sizes; conversion is exact or fails with everything that does not fit.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import PyTree
from sana_jax.errors import CheckpointError
from sana_jax.weights.layouts import LINEAR, SAME, Layout
from sana_jax.weights.lazy import LazyArray
from sana_jax.weights.messages import describe_array, first_few
from sana_jax.weights.safetensors_files import TensorInfo, TensorSource

LAYER = "{layer}"
_MOST_LAYERS = 10_000  # what a configuration may ask for before its weights were looked at


@dataclasses.dataclass(frozen=True)
class Rule:
    """``ours``: path with slashes. ``theirs``: name in the checkpoint. ``layout``: how their axes become ours.

    ``layers``: the numbers of the layers that are stacked, the first of them where the array has fewer; None for 0, 1,
    2 and so on.
    """

    ours: str
    theirs: str
    layout: Layout = SAME
    layers: tuple[int, ...] | None = None


def linear(ours: str, theirs: str, layout: Layout = LINEAR) -> tuple[Rule, Rule]:
    """The rules of a layer with ``kernel`` and, where the tree has one, ``bias``."""
    return Rule(f"{ours}/kernel", f"{theirs}.weight", layout), Rule(f"{ours}/bias", f"{theirs}.bias")


def norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """The rules of a norm with ``scale`` and, where the tree has one, ``bias``."""
    return Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")


class Place(NamedTuple):
    """Where a checkpoint's tensor goes: a leaf of our tree, and the layer of it (None: the whole leaf)."""

    path: tuple[str, ...]
    layer: int | None
    layout: Layout
    shape: tuple[int, ...]  # as the checkpoint has it
    floating: bool = True  # whether its numbers are floating-point ones


@dataclasses.dataclass(frozen=True)
class Misfits:
    """What keeps a checkpoint from being a network's: names with their shapes, ready to be printed."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        parts = {"missing": self.missing, "unexpected": self.unexpected, "of another shape or dtype": self.misshapen}
        return "; ".join(
            f"{len(names)} {what}: {first_few(list(names), 'tensors')}" for what, names in parts.items() if names
        )


def places(rules: Sequence[Rule], abstract: PyTree) -> dict[str, Place]:
    """Every tensor that a checkpoint of this network has: name -> where it goes.

    Args:
        rules: the family's table.
        abstract: our parameter tree of ShapeDtypeStructs (or arrays).

    Raises:
        CheckpointError: more layers than any network has.
        ValueError: a leaf of the tree without a rule or with several, or two leaves that want one tensor. That is a
            mistake in the table.
    """
    compiled = [(_pattern(rule.ours), rule) for rule in rules]
    found: dict[str, Place] = {}
    for path, leaf in flatten(abstract).items():
        name = "/".join(path)
        matches = [(match, rule) for pattern, rule in compiled if (match := pattern.fullmatch(name))]
        if len(matches) != 1:
            raise ValueError(f"{name} has {len(matches)} rules, not one")
        match, rule = matches[0]
        theirs = rule.theirs
        for placeholder, value in match.groupdict().items():
            theirs = theirs.replace(f"{{{placeholder}}}", value)
        stacked = LAYER in theirs
        if stacked and leaf.shape[0] > _MOST_LAYERS:
            raise CheckpointError(
                f"the configuration asks for {leaf.shape[0]} layers; allowed are {_MOST_LAYERS}: give the config.json "
                "that belongs to the weights"
            )
        shape = rule.layout.shape_in_theirs(leaf.shape[1:] if stacked else leaf.shape)
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        for layer in range(leaf.shape[0]) if stacked else (None,):
            key = theirs.replace(LAYER, str(layer if rule.layers is None or layer is None else rule.layers[layer]))
            if key in found:
                raise ValueError(f"{name} and {'/'.join(found[key].path)} both want {key}")
            found[key] = Place(path, layer, rule.layout, shape, floating)
    return found


def misfits(source: TensorSource, wanted: dict[str, Place], ignored: Sequence[str] = ()) -> Misfits:
    """Compares names and shapes; ``ignored`` are patterns (regular expressions) of names that carry no weights."""
    there = source.tensors
    extra = [name for name in there if name not in wanted and not any(re.fullmatch(p, name) for p in ignored)]
    misshapen = [
        f"{name} {describe_array(there[name])}, not {list(place.shape)}"
        for name, place in wanted.items()
        if name in there and tuple(there[name].shape) != place.shape
    ]
    misshapen += [
        f"{name} {describe_array(there[name])}, not {'floating-point' if place.floating else 'whole'} numbers"
        for name, place in wanted.items()
        if name in there and jnp.issubdtype(there[name].dtype, jnp.floating) != place.floating
    ]
    both = {name: there[name].dtype.name for name in wanted if name in there}
    if {"float16", "bfloat16"} <= set(both.values()):
        # No checkpoint mixes them, and one read as the other is wrong without looking wrong.
        rare = min(("float16", "bfloat16"), key=list(both.values()).count)
        misshapen += [f"{name} is {rare} among others" for name, dtype in both.items() if dtype == rare]
    return Misfits(
        tuple(f"{name} {list(place.shape)}" for name, place in wanted.items() if name not in there),
        tuple(f"{name} {describe_array(there[name])}" for name in extra),
        tuple(misshapen),
    )


def read_params(
    source: TensorSource,
    rules: Sequence[Rule],
    abstract: PyTree,
    *,
    ignored: Sequence[str] = (),
    place: Callable[[np.ndarray, Any], Any] | None = None,
) -> PyTree:
    """Reads a checkpoint into our tree: everything is compared first, then one leaf after another is filled.

    Args:
        source: the checkpoint.
        rules: the family's table.
        abstract: our tree of shapes; ``read_params`` keeps the checkpoint's own dtypes.
        ignored: patterns of names that carry no weights.
        place: what becomes of a filled NumPy array, given its abstract leaf (cast it, put it on a device); None
            keeps it.

    Raises:
        CheckpointError: names or shapes do not fit, layers of one array differ in dtype, or a tensor can't be read.
    """

    def read(lazy: LazyArray, leaf: Any) -> Any:
        array = lazy.read()
        return array if place is None else place(array, leaf)

    return jax.tree.map(read, lazy_params(source, rules, abstract, ignored=ignored), abstract)


def lazy_params(
    source: TensorSource, rules: Sequence[Rule], abstract: PyTree, *, ignored: Sequence[str] = ()
) -> PyTree:
    """A checkpoint as our tree of LazyArrays: names, shapes and dtypes are compared, no tensor is read yet.

    Raises:
        CheckpointError: names or shapes do not fit, or layers of one array differ in dtype.
    """
    wanted = places(rules, abstract)
    if problems := misfits(source, wanted, ignored):
        raise CheckpointError(
            f"{source.location} does not fit this network: {problems}. Give the configuration that belongs to it, or "
            "download it again"
        )
    by_path: dict[tuple[str, ...], list[tuple[str, Place]]] = {}
    for name, where in wanted.items():
        by_path.setdefault(where.path, []).append((name, where))
    leaves = flatten(abstract)
    found: dict[tuple[str, ...], LazyArray] = {}
    for path, parts in by_path.items():
        dtype, shape = _one_dtype(source, parts), leaves[path].shape
        found[path] = LazyArray(shape, dtype, functools.partial(_read_leaf, source, parts, shape, dtype))
    return nested(found)


def _one_dtype(source: TensorSource, parts: list[tuple[str, Place]]) -> np.dtype:
    dtypes = {source.tensors[name].dtype for name, _ in parts}
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{source.location}: the layers of {'/'.join(parts[0][1].path)} have dtypes "
            f"{', '.join(sorted(map(str, dtypes)))}; allowed is one: save it in one dtype"
        )
    return dtypes.pop()


def _read_leaf(
    source: TensorSource, parts: list[tuple[str, Place]], shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    array = np.empty(shape, dtype)
    for name, where in parts:
        array[... if where.layer is None else where.layer] = where.layout.to_ours(source.read(name))
    return array


class TreeSource:
    """Our tree as a checkpoint's tensors, in its names and layouts; what ``read_params`` reads.

    Leaves are arrays or LazyArrays. Tensors come leaf by leaf, and the last LazyArray that was read is kept, so reading
    in the order of ``tensors`` reads each once.
    """

    def __init__(self, params: PyTree, rules: Sequence[Rule], location: str = "parameters") -> None:
        self.location = location
        self._leaves = flatten(params)
        self._places = places(rules, params)
        self.tensors = {
            name: TensorInfo(np.dtype(self._leaves[where.path].dtype), where.shape)
            for name, where in self._places.items()
        }
        self._last: tuple[tuple[str, ...], np.ndarray] | None = None

    def read(self, name: str) -> np.ndarray:
        """One tensor, contiguous."""
        where = self._places[name]
        leaf = self._leaves[where.path]
        if isinstance(leaf, LazyArray):
            if self._last is None or self._last[0] != where.path:
                self._last = None  # frees it before the next one is read
                self._last = (where.path, leaf.read())
            leaf = self._last[1]
        array = np.asarray(leaf if where.layer is None else leaf[where.layer])
        return np.asarray(where.layout.to_theirs(array), order="C")


def flatten(tree: PyTree) -> dict[tuple[str, ...], Any]:
    """A nested dict's leaves by their paths."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tuple(key.key for key in path): leaf for path, leaf in flat}


def nested(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The nested dict of leaves by their paths: the inverse of ``flatten``."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def _pattern(ours: str) -> re.Pattern[str]:
    pieces = re.split(r"(\{\w+\})", ours)
    return re.compile("".join(f"(?P<{p[1:-1]}>\\d+)" if p.startswith("{") else re.escape(p) for p in pieces))
