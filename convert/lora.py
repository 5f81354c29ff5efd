"""LoRA in conversion: a model's weights with a LoRA added, as a directory that diffusers loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from convert.engine import Report, export_opened, parse_size
from convert.sources import Choices, Component, Model, open_model
from sana_jax.errors import CheckpointError, UserError
from sana_jax.lora import Lora, read_lora
from sana_jax.lora.names import lora_targets
from sana_jax.weights.messages import first_few
from sana_jax.weights.safetensors_files import TensorSource, all_finite

_TRANSFORMER = "SanaTransformer2DModel"


def merge_model(
    source: str | Path,
    lora: str | Path,
    destination: str | Path,
    choices: Choices | None = None,
    *,
    weight: float = 1.0,
    max_shard_size: str = "5GB",
    dry_run: bool = False,
    report: Report = print,
) -> None:
    """Writes a model whose transformer has a LoRA in its weights, as ``export_model`` writes one.

    Sums are float32 and then rounded to the weights' own dtype; tensors that the LoRA does not change keep their bits.

    Args:
        source: a model directory, converted or published, its transformer, a training run, or an original file.
        lora: a LoRA file for its transformer, or a directory with one.
        destination: must not exist yet, or be empty. It appears when everything is in it.
        choices: what the source leaves open.
        weight: how much of the LoRA is added; 1 is as it was trained.
        max_shard_size: larger weights become several files and an index: "5GB", "500MB".
        dry_run: says what would be read and written, and stops.
        report: takes one line after another.

    Raises:
        FileNotFoundError: something is missing.
        CheckpointError: weights or a LoRA that do not fit or are damaged, sums that overflow, no space, or something in
            the destination.
        UserError: a source without a transformer, or a weight of 0.
    """
    parse_size(max_shard_size)  # before a long reading
    if weight == 0:
        raise UserError("a LoRA of weight 0 changes nothing; give another weight, or use export")
    model = open_model(source, choices)
    model.require_whole()
    network = _transformer(model).network
    adapter = read_lora(lora, network.rules, network.abstract)
    for line in adapter.summary():
        report(line)
    report(f"LoRA {adapter.location}: merged with weight {weight:g}")
    merged: list[MergedSource] = []
    parts = []
    for component in model.components:
        if component.network.class_name == _TRANSFORMER:
            merged.append(MergedSource(component, adapter, weight))
            component = dataclasses.replace(component, source=merged[-1])
        parts.append(component)
    export_opened(
        dataclasses.replace(model, components=tuple(parts)),
        destination,
        max_shard_size=max_shard_size,
        dry_run=dry_run,
        report=report,
    )
    if lost := [name for source in merged for name in source.unchanged]:
        report(
            f"{len(lost)} of {len(adapter.layers)} layers are as they were, since the LoRA's change is smaller than "
            f"the rounding of their dtype: {first_few(lost, 'layers')}"
        )


class MergedSource:
    """A transformer's tensors with a LoRA added, each when it is read."""

    def __init__(self, component: Component, lora: Lora, weight: float) -> None:
        source = component.source
        if source is None:
            raise ValueError("a component without weights")  # require_whole() has refused it
        self.location, self.tensors = source.location, source.tensors
        self.unchanged: list[str] = []
        self._source: TensorSource = source
        self._lora, self._weight = lora.location, weight
        self._targets = lora_targets(component.network.rules, component.network.abstract)
        self._layers = {f"{layer.module}.weight": layer for layer in lora.layers}

    def read(self, name: str) -> np.ndarray:
        """One tensor, with what the LoRA adds to it.

        Raises:
            CheckpointError: the sum is too large for the dtype.
        """
        tensor = self._source.read(name)
        layer = self._layers.get(name)
        if layer is None:
            return tensor
        scale = np.float32(layer.scale * self._weight)
        change = layer.down.astype(np.float32) @ (layer.up.astype(np.float32) * scale)
        change = self._targets[layer.module].layout.to_theirs(change)
        with np.errstate(over="ignore"):
            total = (tensor.astype(np.float32) + change).astype(tensor.dtype)
        if not all_finite(total):
            raise CheckpointError(
                f"{layer.module} with the LoRA {self._lora} is too large for {tensor.dtype}; use a smaller weight than "
                f"{self._weight:g}, or weights in another dtype"
            )
        if change.any() and np.array_equal(total, tensor):
            self.unchanged.append(layer.module)
        return np.ascontiguousarray(np.where(change == 0, tensor, total))


def _transformer(model: Model) -> Component:
    for component in model.components:
        if component.network.class_name == _TRANSFORMER:
            return component
    there = ", ".join(component.network.class_name for component in model.components) or "none"
    raise UserError(f"{model.path} has no transformer ({there}), which a LoRA is for; name a whole model")
