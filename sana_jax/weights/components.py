"""One network's weights, published or converted, read when they are needed and dropped when they are not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import PyTree
from sana_jax.errors import CheckpointError
from sana_jax.quantization.trees import quantized_abstract, stored_formats
from sana_jax.weights.converted import lazy_params_of_saved, load_params
from sana_jax.weights.recognition import looks_like
from sana_jax.weights.resident import Resident
from sana_jax.weights.rules import Rule, lazy_params, misfits, places, read_params
from sana_jax.weights.safetensors_files import STEMS, SafetensorsSource, TensorSource, find_weights_file
from sana_jax.weights.streamed import StreamedResident
from sana_jax.weights.trees import abstract_tree, saved_structure, tree_bytes

DIFFUSERS_STEM, TRANSFORMERS_STEM = STEMS
CONVERTED = "params"
# Published tensors that our tree has no place for and an export needs, beside a converted component's ``params``.
KEPT = "kept_tensors.safetensors"


def open_component(
    directory: str | os.PathLike[str],
    rules: Sequence[Rule],
    abstract: PyTree,
    *,
    stem: str = DIFFUSERS_STEM,
    variant: str | None = None,
    ignored: Sequence[str] = (),
    streamed: str | None = None,
) -> Resident:
    """Finds a component's weights and compares names and shapes; the weights themselves are read later.

    Args:
        directory: a model directory's ``transformer``, ``vae``, ...: with ``params/`` (converted) or safetensors files.
        rules: how the published tensors become our tree.
        abstract: our tree of ShapeDtypeStructs: floating-point weights are cast to its dtypes and go to its shardings.
        stem: how the published file is called: ``diffusion_pytorch_model`` or ``model``.
        variant: ``bf16``, ``fp16``, ... of the published files; where this component of a model lacks it and another
            has it, a line says which file is read.
        ignored: patterns of published tensors that carry no weights.
        streamed: the key of the tree under which blocks are stacked that are to stay in host memory: what is returned
            is a ``StreamedResident`` then.

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
        # Kernels that were quantised before they were saved are read as they are.
        abstract = quantized_abstract(abstract, _saved_formats(converted))

        def open_tree() -> PyTree:
            return lazy_params_of_saved(converted, abstract)

        def read() -> PyTree:
            return load_params(converted, abstract)

        opened = Resident(name, tree_bytes(abstract), read, abstract, open_tree)
    else:
        source = SafetensorsSource(find_weights_file(directory, stem, variant, say=print))
        opened = open_tensors(name, source, rules, abstract, ignored)
    if streamed is not None:
        opened = StreamedResident(name, abstract, streamed, opened.open_tree)
    opened.directory = directory
    return opened


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
        name,
        tree_bytes(abstract),
        lambda: read_params(source, rules, abstract, ignored=ignored, place=_put),
        abstract,
        lambda: lazy_params(source, rules, abstract, ignored=ignored),
    )


def _saved_formats(converted: Path) -> dict[tuple[str, ...], str]:
    """The layers that are stored quantised; none where the weights cannot be read, which reading them will say."""
    try:
        return stored_formats(saved_structure(converted))
    except Exception:  # Orbax raises bare Exceptions for unreadable data
        return {}


def _put(array: np.ndarray, leaf: Any) -> jax.Array:
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(leaf.dtype, copy=False)
    return jax.device_put(array, abstract_tree(leaf).sharding)
