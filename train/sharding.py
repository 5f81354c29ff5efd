"""Meshes and where arrays lie on them."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from configs.schema import MeshConfig
from kernels.typing import PyTree
from sana_jax.errors import UserError
from sana_jax.models.sharding_rules import Rule

AXES = ("data", "fsdp", "tensor", "context")
# A batch is cut over both axes: fsdp is data parallelism that also cuts the parameters.
BATCH_AXES = ("data", "fsdp")


def make_mesh(config: MeshConfig, among: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices of all processes, or over those that are given.

    Raises:
        UserError: the axes' product is not the number of devices.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
    devices = jax.device_count() if among is None else len(among)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {shown}: each axis is 1 or more, and at most one is -1 for the rest; set --mesh.AXIS")
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        if devices % known:
            options = " ".join(f"--mesh.{axis} 1" for axis, size in zip(AXES, sizes) if size > 1)
            raise UserError(
                f"mesh {shown}: {known} does not divide the number of devices, {devices}; choose axes whose product "
                f"does, such as {_divisors(devices)}: {options} gives every device a part of the batch"
            )
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        raise UserError(
            f"mesh {shown}: the axes' product {math.prod(sizes)} must be the number of devices, {devices}; "
            f"change --mesh.data (-1 for the rest) or the others"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=among)


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raises ``UserError`` unless the batch divides into equal parts for every device and accumulation step."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES) * accumulation
    if batch_size % parts:
        below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
        raise UserError(
            f"--batch-size {batch_size} does not divide by data x fsdp x accumulation = "
            f"{mesh.shape['data']} x {mesh.shape['fsdp']} x {accumulation} = {parts}; the nearest that does is "
            f"{' or '.join(str(size) for size in (below, above) if size > 0)}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis cut over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


@contextlib.contextmanager
def batch_stays_cut(batch_size: int) -> Iterator[None]:
    """Networks traced inside keep the batch cut over the batch axes of the mesh in ``jax.set_mesh``.

    Left to itself the compiler may leave the weights where they lie instead, give every device the whole batch and add
    up partial products: as much communication as there are activations, and no memory saved. So the output of every
    module is told to keep its first axis cut; the other axes are free, for tensor parallelism. Modules know nothing of
    it, and their parameters are then gathered where they are used.

    Args:
        batch_size: arrays whose first axis is of another length are left alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 1:
        yield
        return

    def constrain(leaf):
        if not leaf.shape or leaf.shape[0] != batch_size:
            return leaf
        free = (PartitionSpec.UNCONSTRAINED,) * (leaf.ndim - 1)
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(BATCH_AXES, *free))

    def interceptor(call, args, kwargs, context):
        outputs = call(*args, **kwargs)
        return jax.tree.map(constrain, outputs) if context.method_name == "__call__" else outputs

    with nn.intercept_methods(interceptor):
        yield


def kept_cut(x: jax.Array, batch_axis: int = 0) -> jax.Array:
    """``x``, and its gradient, with the batch cut over the batch axes of the mesh in ``jax.set_mesh``.

    For functions, as ``batch_stays_cut`` is for modules. A batch that does not divide is left alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if parts == 1 or x.shape[batch_axis] % parts:
        return x
    spec = [PartitionSpec.UNCONSTRAINED] * x.ndim
    spec[batch_axis] = BATCH_AXES
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def parameter_paths(params: PyTree) -> dict[str, jax.ShapeDtypeStruct | jax.Array]:
    """The leaves of a nested dictionary by path, ``transformer_blocks/attn1/to_q/kernel``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {path_name(path): leaf for path, leaf in leaves}


def path_name(path: Sequence) -> str:
    """A key path as text, joined by slashes."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def parameter_shardings(params: PyTree, rules: Sequence[Rule], mesh: Mesh) -> tuple[PyTree, list[str]]:
    """The sharding of every parameter, and the paths of those that had to stay whole along an axis.

    A dimension that its axis does not divide stays whole; the caller says so.

    Raises:
        ValueError: a parameter matches no rule or several, a rule's length is not the parameter's rank, or it uses a
            mesh axis twice or one that is not there. All such parameters are named at once.
    """
    problems, whole = [], []

    def one(path, leaf):
        name = path_name(path)
        matches = [axes for pattern, axes in rules if re.fullmatch(pattern, name)]
        if len(matches) != 1:
            problems.append(f"{name} matches {len(matches)} rules")
            return None
        axes = matches[0]
        used = [axis for entry in axes for axis in _names(entry)]
        if len(axes) != leaf.ndim or len(set(used)) != len(used):
            problems.append(f"{name} of rank {leaf.ndim} has the rule {axes}")
            return None
        if unknown := [axis for axis in used if axis not in mesh.shape]:
            problems.append(f"{name} has the rule {axes}: the mesh has no axis {unknown[0]}")
            return None
        parts = [math.prod(mesh.shape[axis] for axis in _names(entry)) for entry in axes]
        fitting = [entry if size % count == 0 else None for entry, size, count in zip(axes, leaf.shape, parts)]
        if any(entry != fit for entry, fit in zip(axes, fitting)):
            whole.append(name)
        return NamedSharding(mesh, PartitionSpec(*fitting))

    shardings = jax.tree_util.tree_map_with_path(one, params)
    if problems:
        raise ValueError("sharding rules do not fit: " + "; ".join(problems))
    return shardings, whole


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that cut one axis of an array."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def local_rows(sharding: NamedSharding, batch_size: int) -> tuple[int, int]:
    """The rows [first, end) of a global batch that this process's devices hold.

    Raises:
        UserError: they are not one run of rows (a mesh that scatters a process's devices over the batch).
    """
    slices = [index[0] for index in sharding.addressable_devices_indices_map((batch_size,)).values()]
    rows = {row for piece in slices for row in range(*piece.indices(batch_size))}
    first, end = min(rows), max(rows) + 1
    if len(rows) != end - first:
        raise UserError(
            f"this mesh gives process {jax.process_index()} rows of the batch that are not adjacent; put the axes that "
            "cut the batch (data, fsdp) across processes, or use one process"
        )
    return first, end


def to_global(local: PyTree, sharding: NamedSharding, batch_size: int, first_row: int) -> PyTree:
    """Arrays of this process's rows as global arrays over the mesh."""

    def one(rows):
        def shard(index):
            start, stop, _ = index[0].indices(batch_size)
            return rows[(slice(start - first_row, stop - first_row), *index[1:])]

        return jax.make_array_from_callback((batch_size, *rows.shape[1:]), sharding, shard)

    return jax.tree.map(one, local)


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
