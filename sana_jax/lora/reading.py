"""LoRA files: which layers they change, by how much, and what of them is not used."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from kernels.typing import PyTree
from sana_jax.errors import CheckpointError, UserError
from sana_jax.lora.adapter_metadata import AdapterMetadata, read_adapter_metadata
from sana_jax.lora.names import ModuleNames, Target, lora_targets, split_key, why_unsupported
from sana_jax.lora.targets import LARGEST_RANK
from sana_jax.weights.layouts import DEPTHWISE
from sana_jax.weights.messages import describe_array, first_few
from sana_jax.weights.rules import Rule
from sana_jax.weights.safetensors_files import SafetensorsSource

FILE_NAME = "pytorch_lora_weights.safetensors"


@dataclasses.dataclass(frozen=True)
class LoraLayer:
    """What a LoRA adds to one layer: ``scale · down · up``.

    Attributes:
        module: the layer's published name.
        path: where it is in our parameters.
        layer: which block of a stack it is in; None outside the blocks.
        alpha: as the file has it; the rank where it has none.
        scale: alpha / rank, or alpha / sqrt(rank) of a rank-stabilised LoRA.
        down: (in, rank), in our order of the input channels, in the file's dtype.
        up: (rank, out), likewise, without the scale.
        change: Frobenius norm of what is added to the kernel.
    """

    module: str
    path: tuple[str, ...]
    layer: int | None
    alpha: float
    scale: float
    down: np.ndarray
    up: np.ndarray
    change: float

    @property
    def rank(self) -> int:
        """Channels between ``down`` and ``up``."""
        return self.down.shape[1]


@dataclasses.dataclass(frozen=True)
class Lora:
    """A LoRA file that was matched with a network.

    Attributes:
        location: the file.
        layers: what it adds.
        unmatched: tensors of layers that the network does not have.
        unsupported: tensors that are no part of a plain LoRA, and why.
        header: the file's header, where it says all that its tensors do not; None where there is no file, or where
            tensors say more than the header (alpha) or are not used, so that the header is not right for the rest.
    """

    location: str
    layers: tuple[LoraLayer, ...]
    unmatched: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()
    header: Mapping[str, str] | None = None

    def table(self) -> str:
        """Every layer with rank, alpha, scale and the size of its change, then the tensors that are not used."""
        width = max(len("layer"), *(len(layer.module) for layer in self.layers))
        lines = [f"{'layer':{width}}  {'rank':>5}  {'alpha':>9}  {'scale':>9}  {'change':>9}"]
        lines += [
            f"{layer.module:{width}}  {layer.rank:5d}  {layer.alpha:9.4g}  {layer.scale:9.4g}  {layer.change:9.3g}"
            for layer in self.layers
        ]
        lines += [f"not matched: {key}" for key in self.unmatched]
        lines += [f"not supported: {entry}" for entry in self.unsupported]
        return "\n".join(lines)

    def summary(self) -> list[str]:
        """One line on what the file changes, and one for each kind of thing that is not as one would expect."""
        ranks, scales = ([getattr(layer, name) for layer in self.layers] for name in ("rank", "scale"))
        blocks = sorted({layer.layer for layer in self.layers if layer.layer is not None})
        where = ""
        if blocks:
            where = f" in block {blocks[0]}" if len(blocks) == 1 else f" in blocks {blocks[0]} to {blocks[-1]}"
        lines = [
            f"LoRA {self.location}: changes {len(self.layers)} layers{where}, rank {_range(ranks)}, scale "
            f"{_range(scales)}"
        ]
        if self.unmatched:
            lines.append(
                f"LoRA {self.location}: {len(self.unmatched)} tensors are not used, since this network has no such "
                f"layer: {first_few(list(self.unmatched), 'tensors')}"
            )
        if self.unsupported:
            lines.append(
                f"LoRA {self.location}: {len(self.unsupported)} tensors are not supported and not used, so pictures "
                f"may differ from what was trained: {first_few(list(self.unsupported), 'tensors')}"
            )
        idle = sum(layer.change == 0 for layer in self.layers)
        if idle:
            which = "all" if idle == len(self.layers) else f"{idle} of {len(self.layers)}"
            lines.append(f"LoRA {self.location}: {which} of its layers change nothing, since their product is zero")
        return lines


def read_lora(
    path: str | os.PathLike[str], rules: Sequence[Rule], abstract: PyTree, *, weight_name: str | None = None
) -> Lora:
    """Reads a LoRA file and finds the network's layers that it changes.

    Args:
        path: a safetensors file, or a directory with ``pytorch_lora_weights.safetensors`` or a single other one.
        rules: the network's table of published names (``sana_jax.weights.tables``).
        abstract: the network's parameters, as shapes.
        weight_name: the file's name in the directory.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a damaged file, one for another network, or one of which nothing fits.
        UserError: a directory with several files and no ``weight_name``.
    """
    source = SafetensorsSource(find_lora_file(path, weight_name))
    targets = lora_targets(rules, abstract)
    names = ModuleNames(targets)
    found: dict[str, dict[str, str]] = {}
    unmatched, unsupported = [], []
    for key in source.tensors:
        split = split_key(key)
        if split is None:
            unsupported.append(f"{key[:200]} ({why_unsupported(key)})")
            continue
        module, part = split
        name = names.find(module)
        if name is None:
            _refuse_more_blocks(source.location, names, module, targets)
            unmatched.append(key[:200])
            continue
        parts = found.setdefault(name, {})
        if part in parts:
            raise CheckpointError(
                f"{source.location} has two tensors for {part} of {name}: {parts[part]} and {key}; allowed is one"
            )
        parts[part] = key
    if not found:
        raise CheckpointError(
            f"nothing of {source.location} fits this network. Its tensors are called {_examples(source.tensors)}; "
            f"expected are {_examples([f'transformer.{name}.lora_A.weight' for name in targets])}: choose a LoRA for "
            "the transformer of this model"
        )
    _check_shapes(source, found, targets)
    metadata = read_adapter_metadata(source)
    layers = tuple(
        _read_layer(source, name, found[name], target, metadata) for name, target in targets.items() if name in found
    )
    told_by_tensors = any("alpha" in parts for parts in found.values())
    header = None if told_by_tensors or unmatched or unsupported else dict(source.metadata)
    return Lora(source.location, layers, tuple(unmatched), tuple(unsupported), header)


def find_lora_file(path: str | os.PathLike[str], weight_name: str | None = None) -> Path:
    """The safetensors file that a path and a name in it mean.

    Raises:
        FileNotFoundError: no such file.
        UserError: a directory with several files and no ``weight_name``, or a file with one.
    """
    path = Path(path)
    if path.is_dir():
        there = sorted(file.name for file in path.glob("*.safetensors"))
        if weight_name is None and FILE_NAME not in there and len(there) > 1:
            raise UserError(f"{path} has several LoRA files; name one of them: {first_few(there, 'files')}")
        fallback = FILE_NAME if FILE_NAME in there or not there else there[0]
        path = path / (fallback if weight_name is None else weight_name)
    elif weight_name is not None and path.is_file():
        raise UserError(f"weight_name={weight_name!r} would not be used, since {path} is a file; leave it out")
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no LoRA file {path}; name a .safetensors file, or a directory with {FILE_NAME}"
        )
    return path


def parse_lora_option(text: str) -> tuple[str, float]:
    """``FILE`` or ``FILE:WEIGHT`` of a command line, as a path and a weight, which is 1 where there is none.

    Raises:
        UserError: no file, or a weight that is not a finite number.
    """
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        path, weight = text, "1"
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not path or not math.isfinite(number):
        raise UserError(f"LoRA {text!r} is not allowed; give FILE or FILE:WEIGHT with a finite number, as style:0.8")
    return path, number


def _check_shapes(
    source: SafetensorsSource, found: Mapping[str, Mapping[str, str]], targets: Mapping[str, Target]
) -> None:
    """Raises ``CheckpointError`` unless every pair of tensors is whole and fits its layer."""
    for name, keys in found.items():
        if missing := [part for part in ("down", "up") if part not in keys]:
            raise CheckpointError(
                f"{source.location} has {', '.join(sorted(keys.values()))} but no {missing[0]} tensor of {name}, which "
                "makes a pair with it: save it again"
            )
        if targets[name].layout is DEPTHWISE:
            raise CheckpointError(
                f"{source.location} changes {name}, a depthwise convolution, which a LoRA here cannot: it has one "
                "3x3 kernel for each channel and no product to add to. Train without that layer"
            )
        for key in keys.values():
            if not jnp.issubdtype(source.tensors[key].dtype, jnp.floating):
                raise CheckpointError(
                    f"{source.location}: {key} is {describe_array(source.tensors[key])}; allowed are floating-point "
                    "numbers: use a LoRA that is not quantised"
                )
    misshapen = []
    for name, keys in found.items():
        target, down, up = targets[name], source.tensors[keys["down"]], source.tensors[keys["up"]]
        rank = down.shape[0] if down.shape else 0
        if not 1 <= rank <= LARGEST_RANK:
            raise CheckpointError(
                f"{source.location}: {keys['down']} is {describe_array(down)}, of rank {rank}; allowed is 1 to "
                f"{LARGEST_RANK}"
            )
        expected = (rank, *target.shape[1:]), (target.shape[0], rank)
        if not _same_shape(down.shape, expected[0]) or not _same_shape(up.shape, expected[1]):
            misshapen.append((name, down, up, expected))
    if misshapen:
        _refuse_other_shapes(source.location, misshapen, len(found), targets)


def _refuse_other_shapes(location: str, misshapen: list, count: int, targets: Mapping[str, Target]) -> None:
    # A layer that is square with us says most: its input is the network's width.
    square = [entry for entry in misshapen if targets[entry[0]].shape[0] == targets[entry[0]].shape[1]]
    name, down, up, expected = (square or misshapen)[0]
    width, ours = down.shape[1] if len(down.shape) > 1 else 0, expected[0][1]
    reason = "its tensors do not fit this network"
    if square and width != ours and width == up.shape[0]:
        reason = f"it is a LoRA for width {width}, and this model has width {ours}"
    raise CheckpointError(
        f"{location}: {reason}. {len(misshapen)} of {count} layers do not fit, for example {name}: "
        f"{describe_array(down)} and {describe_array(up)}, where {list(expected[0])} and {list(expected[1])} are "
        "allowed; choose a LoRA that was trained for this model"
    )


def _same_shape(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether shapes are alike but for trailing axes of length 1, which 1x1 convolutions have."""
    longer, shorter = sorted((tuple(shape), expected), key=len, reverse=True)
    return longer[: len(shorter)] == shorter and all(length == 1 for length in longer[len(shorter) :])


def _refuse_more_blocks(location: str, names: ModuleNames, module: str, targets: Mapping[str, Target]) -> None:
    if (block := names.beyond_the_last_block(module)) is not None:
        count = 1 + max(target.layer for target in targets.values() if target.layer is not None)
        raise CheckpointError(
            f"{location} is a LoRA for {block + 1} blocks or more, and this model has {count}: choose a LoRA that was "
            "trained for this model"
        )


def _read_layer(
    source: SafetensorsSource, name: str, keys: Mapping[str, str], target: Target, metadata: AdapterMetadata | None
) -> LoraLayer:
    down, up = source.read(keys["down"]), source.read(keys["up"])
    rank = down.shape[0]
    down = np.ascontiguousarray(target.layout.to_ours(down.reshape(rank, *target.shape[1:])))
    up = np.ascontiguousarray(up.reshape(target.shape[0], rank).T)
    alpha, scale = _alpha_and_scale(source, name, keys.get("alpha"), rank, metadata)
    change = size_of_change(down, up, scale)
    if not math.isfinite(change) or change > float(np.finfo(np.float32).max):
        raise CheckpointError(f"{source.location}: what it adds to {name} is too large for float32; download it again")
    return LoraLayer(name, target.path, target.layer, alpha, scale, down, up, change)


def size_of_change(down: np.ndarray, up: np.ndarray, scale: float) -> float:
    """Frobenius norm of ``scale · down · up``, (in, rank) and (rank, out)."""
    wide_down, wide_up = down.astype(np.float64), up.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        # the norm of a product by the small products of its factors with themselves
        square = ((wide_down.T @ wide_down) * (wide_up @ wide_up.T)).sum()
    return abs(scale) * math.sqrt(np.maximum(square, 0.0))  # rounding may leave less than 0; a NaN stays one


def _alpha_and_scale(
    source: SafetensorsSource, name: str, key: str | None, rank: int, metadata: AdapterMetadata | None
) -> tuple[float, float]:
    """Alpha by the layer's own tensor, by the header, or, where there is neither, the rank; and the scale of it."""
    told = None if metadata is None else metadata.of_module(name, rank, source.location)
    alpha = float(rank) if told is None else told
    if key is not None:
        tensor = source.read(key)
        if tensor.size != 1:
            raise CheckpointError(f"{source.location}: {key} is {describe_array(tensor)}; allowed is one number")
        alpha = float(tensor.reshape(())[()])
        if told is not None and not math.isclose(alpha, told, rel_tol=1e-2):
            raise CheckpointError(
                f"{source.location}: alpha of {name} is {alpha:g} by its tensor and {told:g} by the file's header; "
                "allowed is one of the two: save it again"
            )
    if not 0 < alpha < math.inf:
        raise CheckpointError(f"{source.location}: alpha of {name} is {alpha:g}; allowed is a number above 0")
    stabilised = metadata is not None and metadata.rank_stabilised
    return alpha, alpha / (math.sqrt(rank) if stabilised else rank)


def _examples(names: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(name[:200] for name in list(names)[:3]) or "(it has none)"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
