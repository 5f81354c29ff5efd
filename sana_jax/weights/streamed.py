"""A network whose blocks stay in host memory and are copied to the device one ahead of the computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, PyTree
from sana_jax.errors import UserError
from sana_jax.weights.lazy import LazyArray
from sana_jax.weights.resident import Resident
from sana_jax.weights.trees import tree_bytes

# Memory of the host that a device copies from by itself, while it computes.
_HOST_MEMORY = "pinned_host"


class StreamedParams(NamedTuple):
    """A network's parameters.

    Attributes:
        outside: all but the blocks', on the device.
        blocks: every block's own, without the layer axis, in host memory.
    """

    outside: PyTree
    blocks: tuple[PyTree, ...]


class StreamedResident(Resident):
    """A ``Resident`` whose blocks never lie on the device together.

    ``free`` lets go of what is on the device; the blocks stay in host memory, and are read once.

    Attributes:
        num_bytes: what is on the device while the network runs: what is outside the blocks, and two of them.
        host_bytes: what its blocks take in host memory.
        bytes_beside_a_block: of ``num_bytes``, what is there beside the block that computes.
        block_count: how many blocks there are.
        stacked: the key of the tree under which they are.
    """

    def __init__(self, name: str, abstract: PyTree, stacked: str, open_tree: Callable[[], PyTree]) -> None:
        """Weights that are read when they are needed.

        Args:
            name: of the network, for messages.
            abstract: its parameters as ShapeDtypeStructs: floating-point weights are cast to their dtypes.
            stacked: the key of the tree under which every leaf has the blocks on its first axis.
            open_tree: gives the parameters, as LazyArrays or arrays.
        """
        lengths = {leaf.shape[0] for leaf in jax.tree.leaves(abstract[stacked])}
        if len(lengths) != 1:
            raise ValueError(f"{stacked} has stacks of {sorted(lengths)} blocks, not of one number")
        self.block_count = lengths.pop()
        self.host_bytes = tree_bytes(abstract[stacked])
        block = self.host_bytes // self.block_count
        self.bytes_beside_a_block = tree_bytes(abstract) - self.host_bytes + block
        super().__init__(name, self.bytes_beside_a_block + block, self._to_device, abstract, open_tree)
        self.stacked = stacked
        self._read_already: tuple[PyTree, tuple[PyTree, ...]] | None = None

    @classmethod
    def from_params(cls, name: str, params: PyTree, stacked: str) -> StreamedResident:
        """Of parameters that are there; who holds them on the device is to let go of them."""
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        return cls(name, abstract, stacked, lambda: params)

    def keep_on_host(self) -> bool:
        """Nothing to do: they are there."""
        return False

    def stream(self) -> Iterator[PyTree]:
        """Every block's parameters on the device, in order; the next block's are on their way by then.

        ::

            for own in weights.stream():
                x, before = run(own, x), x
                before.block_until_ready()   # what the block before has used is free for the next copy

        The caller waits, as above, for the block before the one that it has started; then no more than two blocks are
        on the device at any time.
        """
        blocks = self.params.blocks
        ahead = _put(blocks[0])
        for index in range(len(blocks)):
            yield ahead
            # Now the block computes; the one before it has ended, and no one holds its parameters any more.
            ahead = _put(blocks[index + 1]) if index + 1 < len(blocks) else None

    def _to_device(self) -> StreamedParams:
        if self._read_already is None:
            self._read_already = self._read_to_host()
        outside, blocks = self._read_already
        return StreamedParams(_put(outside), blocks)

    def _read_to_host(self) -> tuple[PyTree, tuple[PyTree, ...]]:
        """The parameters outside the blocks, and every block's; one stack after another is read and cut."""
        tree = dict(self.open_tree())
        shapes = dict(self.abstract)
        stacks, shapes_of_stacks = tree.pop(self.stacked), shapes.pop(self.stacked)
        outside = jax.tree.map(lambda array, leaf: _host(_numpy(array), leaf), tree, shapes)
        leaves, structure = jax.tree.flatten(shapes_of_stacks)
        cut: list[list[Array]] = []
        for stack, leaf in zip(structure.flatten_up_to(stacks), leaves, strict=True):
            whole = _numpy(stack)
            cut.append([_host(whole[layer], leaf) for layer in range(self.block_count)])
            jax.block_until_ready(cut[-1])
            del whole
        return outside, tuple(jax.tree.unflatten(structure, own) for own in zip(*cut, strict=True))


def _numpy(array: object) -> np.ndarray:
    return array.read() if isinstance(array, LazyArray) else np.asarray(array)


def _host(array: np.ndarray, leaf: jax.ShapeDtypeStruct) -> Array:
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(leaf.dtype, copy=False)
    return jax.device_put(array, _placed(_HOST_MEMORY))


def _put(tree: PyTree) -> PyTree:
    return jax.device_put(tree, _placed(jax.local_devices()[0].default_memory().kind))


def _placed(kind: str) -> jax.sharding.Sharding:
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if kind not in kinds:
        raise UserError(
            f"blocks cannot be streamed to {device.device_kind}, whose kinds of memory are {', '.join(kinds)} and not "
            f"{kind}; leave stream_blocks out"
        )
    return jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
