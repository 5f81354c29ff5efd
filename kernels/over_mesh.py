"""Kernels under a mesh: every device runs them on its own part of the batch and of the heads.

XLA cuts its own operations up by how their operands lie. Of a kernel it knows nothing but its name, and would give
every device all of the operands. So a kernel is put into ``jax.shard_map`` over the mesh of ``jax.set_mesh``, by the
names that its operation gives to the axes of its arrays:

- ``B``, the batch, is cut by the mesh axes ``data`` and ``fsdp``, as far as these divide it;
- ``h`` and ``k``, heads, by ``tensor``;
- ``C``, channels of a token that ``tensor`` cuts elsewhere, are needed whole: under that axis the kernel refuses;
- all others are whole, as they are without a kernel.

A mesh that is not in ``jax.set_mesh`` cannot be seen while a program is traced. Inside ``jax.shard_map``, what it has
cut already is cut, and the rest is done here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from kernels.refusal import Refusal

BATCH_AXES = ("data", "fsdp")
WIDTH_AXES = ("tensor",)
_BATCH, _HEADS, _CHANNELS = "B", ("h", "k"), "C"


@dataclasses.dataclass(frozen=True)
class Axes:
    """Names of the axes of an operation's arrays, such as ``"B N h d"``.

    Attributes:
        arguments: for every positional argument its axes, a tree of them where it is a tree, None where it has no
            array. An axis of size 1 is one that is broadcast.
        results: the axes of what comes out, of the same structure.
    """

    arguments: tuple[Any, ...]
    results: Any


def over_mesh(function: Callable, axes: Axes | None, implementation: str) -> Callable:
    """``function`` of positional arguments, run by every device on its own part; itself where there is no mesh.

    Args:
        function: a kernel's call; it may have a gradient of its own.
        axes: of its arrays; None if it cannot run under a mesh.
        implementation: its name, for messages.

    Returns:
        A function that raises ``Refusal`` under a mesh that cuts what the kernel needs whole.
    """

    def run(*arguments: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        own = {name: kind for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual}
        if all(mesh.shape[name] == 1 for name in own):
            return function(*arguments)
        places = [place for place, names in enumerate(_entries(axes, arguments)) if names is not None]
        arrays, structure = jax.tree.flatten([arguments[place] for place in places])
        names = jax.tree.leaves([axes.arguments[place] for place in places])
        sizes: dict[str, int] = {}
        for array, its_names in zip(arrays, names, strict=True):
            for name, size in zip(its_names.split(), array.shape, strict=True):
                sizes[name] = max(size, sizes.get(name, 1))
        try:
            cuts = _cuts(mesh, own, sizes)
        except Refusal as reason:
            raise Refusal(f"implementation={implementation!r}: {reason}; use 'xla'") from None

        def one_part(*parts: Any) -> Any:
            given = list(arguments)
            for place, part in zip(places, jax.tree.unflatten(structure, parts)):
                given[place] = part
            return function(*given)

        specs = tuple(
            PartitionSpec(*(None if size == 1 else cuts.get(name) for name, size in zip(each.split(), array.shape)))
            for each, array in zip(names, arrays)
        )
        results = jax.tree.map(lambda each: PartitionSpec(*map(cuts.get, each.split())), axes.results)
        # Every axis that is left becomes the kernel's: under one that cuts nothing here, devices do the same.
        mapped = jax.shard_map(one_part, in_specs=specs, out_specs=results, axis_names=set(own), check_vma=False)
        return mapped(*arrays)

    return run


def _entries(axes: Axes | None, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if axes is None or len(axes.arguments) != len(arguments):
        raise TypeError(f"{axes} for {len(arguments)} arguments: a kernel under a mesh needs the axes of each")
    return axes.arguments


def _cuts(mesh: Any, own: dict[str, AxisType], sizes: dict[str, int]) -> dict[str, Any]:
    """The mesh axes that cut each named axis.

    Raises:
        Refusal: for a mesh axis that the kernel cannot be cut by.
    """
    for name, kind in own.items():
        count = mesh.shape[name]
        if count == 1:
            continue
        if name not in (*BATCH_AXES, *WIDTH_AXES) or kind != AxisType.Auto:
            known = ", ".join((*BATCH_AXES, *WIDTH_AXES))
            raise Refusal(f"mesh axis {name!r} of {count} devices ({kind.name}): it is cut by Auto axes {known} alone")
        if name in WIDTH_AXES and _CHANNELS in sizes:
            raise Refusal(f"it needs all {sizes[_CHANNELS]} channels of a token, which mesh axis {name!r} cuts")
        uneven = [sizes[heads] for heads in _HEADS if sizes.get(heads, count) % count]
        if name in WIDTH_AXES and uneven:
            raise Refusal(f"{uneven[0]} heads do not divide by the {count} devices of mesh axis {name!r}")
    batch_axes: list[str] = []
    for name in BATCH_AXES:
        if name in own and sizes.get(_BATCH, 1) % math.prod(mesh.shape[axis] for axis in (*batch_axes, name)) == 0:
            batch_axes.append(name)
    width_axes = tuple(name for name in WIDTH_AXES if name in own)
    return {_BATCH: tuple(batch_axes) or None, **dict.fromkeys(_HEADS, width_axes or None)}
