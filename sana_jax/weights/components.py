"""One network's weights, published or converted, read when they are needed and dropped when they are not."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import PyTree
from sana_jax.errors import CheckpointError
from sana_jax.weights.converted import load_params
from sana_jax.weights.recognition import looks_like
from sana_jax.weights.rules import Rule, misfits, places, read_params
from sana_jax.weights.safetensors_files import SafetensorsSource, TensorSource, find_weights_file
from sana_jax.weights.trees import abstract_tree, tree_bytes

DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
CONVERTED = "params"
# Published tensors that our tree has no place for and an export needs, beside a converted component's ``params``.
KEPT = "kept_tensors.safetensors"


class Resident:
    """Parameters that are on the device between the first ``params`` and ``free``.

    Attributes:
        name: of the network, for messages.
        num_bytes: what they take on the device.
        stays: whether someone else holds them, so that ``free`` frees nothing.
    """

    def __init__(self, name: str, num_bytes: int, read: Callable[[], PyTree]) -> None:
        self.name = name
        self.num_bytes = num_bytes
        self._read = read
        self._params: PyTree | None = None
        self.stays = False

    @classmethod
    def of(cls, name: str, params: PyTree) -> Resident:
        """Parameters that someone else holds: always in memory, whatever is freed."""
        resident = cls(name, tree_bytes(params), lambda: params)
        resident.stays = True
        return resident

    @property
    def params(self) -> PyTree:
        """The parameters; the first call reads them."""
        if self._params is None:
            self._params = self._read()
        return self._params

    def take(self) -> PyTree:
        """The parameters, let go of: each array is freed as soon as the caller lets go of it too."""
        params = self.params
        self.free()
        return params

    @property
    def loaded(self) -> bool:
        """Whether they are in memory."""
        return self.stays or self._params is not None

    def free(self) -> None:
        """Lets go of them; the next ``params`` reads them again."""
        self._params = None


def open_component(
    directory: str | os.PathLike[str],
    rules: Sequence[Rule],
    abstract: PyTree,
    *,
    stem: str = DIFFUSERS_STEM,
    variant: str | None = None,
    ignored: Sequence[str] = (),
) -> Resident:
    """Finds a component's weights and compares names and shapes; the weights themselves are read later.

    Args:
        directory: a model directory's ``transformer``, ``vae``, ...: with ``params/`` (converted) or safetensors files.
        rules: how the published tensors become our tree.
        abstract: our tree of ShapeDtypeStructs: floating-point weights are cast to its dtypes and go to its shardings.
        stem: how the published file is called: ``diffusion_pytorch_model`` or ``model``.
        variant: ``bf16``, ``fp16``, ... of the published files.
        ignored: patterns of published tensors that carry no weights.

    Raises:
        FileNotFoundError: no weights there.
        CheckpointError: weights that do not fit or are damaged.
    """
    directory = Path(directory)
    name = directory.name
    converted = directory / CONVERTED
    if converted.is_dir():
        if variant is not None:
            raise CheckpointError(f"{directory} is converted and has no variants; leave variant={variant!r} out")
        return Resident(name, tree_bytes(abstract), lambda: load_params(converted, abstract))
    return open_tensors(name, SafetensorsSource(find_weights_file(directory, stem, variant)), rules, abstract, ignored)


def open_tensors(
    name: str, source: TensorSource, rules: Sequence[Rule], abstract: PyTree, ignored: Sequence[str] = ()
) -> Resident:
    """``open_component`` for tensors that are open; ``name`` is the network's, for messages.

    Raises:
        CheckpointError: weights that do not fit.
    """
    wanted = places(rules, abstract)
    if problems := misfits(source, wanted, ignored):
        family = None if wanted.keys() & source.tensors.keys() else looks_like(source.tensors)
        seen = f" ({family})" if family else ""
        raise CheckpointError(
            f"{source.location} does not fit its config.json{seen}: {problems}; give the one that belongs to it, or "
            "download it again"
        )
    return Resident(
        name, tree_bytes(abstract), lambda: read_params(source, rules, abstract, ignored=ignored, place=_put)
    )


def _put(array: np.ndarray, leaf: Any) -> jax.Array:
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(leaf.dtype, copy=False)
    return jax.device_put(array, abstract_tree(leaf).sharding)
