"""LoRA files as diffusers writes them: PEFT's tensors under ``transformer.``, rank and alpha in the header."""

from __future__ import annotations

import collections
import json
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kernels.typing import PyTree
from sana_jax.errors import UserError
from sana_jax.lora.adapter_metadata import KEY, PREFIX
from sana_jax.lora.names import lora_targets
from sana_jax.lora.reading import FILE_NAME, Lora, LoraLayer, size_of_change
from sana_jax.weights.messages import first_few
from sana_jax.weights.rules import Rule, flatten, places
from sana_jax.weights.safetensors_files import TensorInfo, write_safetensors

NOTES_KEY = "sana_jax"  # of the header: what we say beside what diffusers reads
_BLOCK = re.compile(r"transformer_blocks\.\d+\.")


def lora_from_tree(tree: PyTree, rules: Sequence[Rule], abstract: PyTree, *, alpha: float | None = None) -> Lora:
    """A tree as it is trained, as a file would hold it: the inverse of reading one and stacking its layers.

    Args:
        tree: leaves ``.../down`` (layers, in, rank) and ``.../up`` (layers, rank, out), without their scale.
        rules: the network's table of published names.
        abstract: the network's parameters, as shapes.
        alpha: of all layers; None for the rank of each, which is a scale of 1.

    Raises:
        UserError: an alpha that is not above 0, a leaf of no layer, or values that are not finite.
    """
    if alpha is not None and not 0 < alpha < math.inf:
        raise UserError(f"LoRA alpha {alpha} is not allowed; choose a number above 0, or None for the rank")
    leaves, layers = flatten(tree), []
    targets = lora_targets(rules, abstract)
    unknown = {path[:-1] for path in leaves} - {target.path for target in targets.values()}
    if unknown:
        raise UserError(f"the LoRA changes {'/'.join(min(unknown))}, which this network does not have; give its own")
    for name, target in targets.items():
        if (*target.path, "down") not in leaves:
            continue
        down, up = (_layer_of(leaves[(*target.path, part)], target.layer) for part in ("down", "up"))
        rank = down.shape[1]
        own_alpha = float(rank if alpha is None else alpha)
        change = size_of_change(down, up, own_alpha / rank)
        if not math.isfinite(change):
            raise UserError(f"the LoRA of {name} has values that are not finite; take an earlier state of the training")
        layers.append(LoraLayer(name, target.path, target.layer, own_alpha, own_alpha / rank, down, up, change))
    return Lora("this LoRA", tuple(layers))


def save_lora_weights(
    path: str | os.PathLike[str],
    tree: PyTree,
    rules: Sequence[Rule],
    abstract: PyTree,
    *,
    alpha: float | None = None,
    dtype: Any = None,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a tree as it is trained to a file that diffusers' ``load_lora_weights`` takes, and ``read_lora``.

    Args:
        path: a directory, for ``pytorch_lora_weights.safetensors`` in it, or a file ``*.safetensors``.
        tree: leaves ``.../down`` and ``.../up``, without their scale.
        rules: the network's table of published names.
        abstract: the network's parameters, as shapes.
        alpha: the scale is alpha / rank; None for the rank, which is a scale of 1.
        dtype: of the tensors, as ``jnp.bfloat16``; None for the tree's own.
        notes: what else the header should say, JSON-able: base model, targets, steps, dropout.

    Returns:
        The file. It appears whole or not at all.

    Raises:
        UserError: as ``lora_from_tree``.
    """
    lora = lora_from_tree(tree, rules, abstract, alpha=alpha)
    return write_lora(path, lora, rules, abstract, dtype=dtype, notes=notes)


def write_lora(
    path: str | os.PathLike[str],
    lora: Lora,
    rules: Sequence[Rule],
    abstract: PyTree,
    *,
    dtype: Any = None,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a LoRA, from whatever kind of file it came, as diffusers writes it; arguments as ``save_lora_weights``.

    What PEFT wrote comes out with the same tensors and the same header. Alphas that a file held as tensors go into the
    header.
    """
    targets = lora_targets(rules, abstract)
    tensors: dict[str, np.ndarray] = {}
    for layer in lora.layers:
        target = targets[layer.module]
        down = target.layout.to_theirs(layer.down)
        up = layer.up.T.reshape(layer.up.shape[::-1] + (1,) * (len(target.shape) - 2))
        for part, array in (("A", down), ("B", up)):
            array = array if dtype is None else array.astype(dtype)
            tensors[f"{PREFIX}{layer.module}.lora_{part}.weight"] = np.ascontiguousarray(array)
    if left := len(lora.unmatched) + len(lora.unsupported):
        shown = first_few([*lora.unmatched, *lora.unsupported], "tensors")
        print(f"LoRA {lora.location}: {left} tensors that are not used are not written: {shown}")
    header = _kept_header(lora)
    if header is None:
        known = [name.removesuffix(".weight") for name in places(rules, abstract) if name.endswith(".weight")]
        metadata = _adapter_metadata(lora.layers, known)
        header = {"format": "pt", KEY: _json({PREFIX + name: value for name, value in metadata.items()})}
    if notes is not None:
        header[NOTES_KEY] = _json(notes)
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / FILE_NAME
    infos = {key: TensorInfo(array.dtype, array.shape) for key, array in tensors.items()}
    write_safetensors(file, infos, tensors.items(), header)
    return file


def _layer_of(leaf: Any, layer: int | None) -> np.ndarray:
    return np.ascontiguousarray(leaf if layer is None else leaf[layer])


def _kept_header(lora: Lora) -> dict[str, str] | None:
    """The header of the file that a LoRA came from, if it goes on being right."""
    if lora.header is None:
        return None
    header = {"format": "pt", **lora.header}
    if KEY in header:
        entries = json.loads(header[KEY])  # it was read before
        if not any(name.startswith(PREFIX) for name in entries):
            header[KEY] = _json({PREFIX + name: value for name, value in entries.items()})
    return header


def _adapter_metadata(layers: Sequence[LoraLayer], known: Collection[str]) -> dict[str, Any]:
    """PEFT's configuration of these layers: the most common rank and alpha, and which layers have others."""
    # of a rank-stabilised LoRA, the alpha that gives the same scale without that
    alphas = {
        layer.module: layer.alpha if layer.scale == layer.alpha / layer.rank else layer.scale * layer.rank
        for layer in layers
    }
    ranks = {layer.module: layer.rank for layer in layers}
    rank, alpha = (collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _whole_if_it_is(alpha),
        "lora_dropout": 0.0,  # which diffusers would sample with: it loads a LoRA in training mode
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "target_modules": _target_modules(list(ranks), known),
        "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
        "alpha_pattern": {module: _whole_if_it_is(own) for module, own in alphas.items() if own != alpha},
    }


def _target_modules(modules: Sequence[str], known: Collection[str]) -> list[str]:
    """Ends of names that PEFT finds exactly these modules by; the whole names where no ends do."""
    ends = sorted({_BLOCK.sub("", module) for module in modules})
    found = {name for name in known if any(name == end or name.endswith(f".{end}") for end in ends)}
    return ends if found == set(modules) else sorted(modules)


def _whole_if_it_is(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _json(entries: Mapping[str, Any]) -> str:
    return json.dumps(entries, indent=2, sort_keys=True)
