"""LoRA in conversion: added to a model's weights, for diffusers to load, and taken out of a training run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from convert.completion import completed
from convert.engine import (
    Layout,
    Report,
    check_destination,
    check_layout,
    export_opened,
    new_directory,
    split_pipeline,
)
from convert.families import Network, network_of
from convert.sources import CONFIG, Choices, Component, Model, is_run, open_model
from sana_jax.errors import CheckpointError, UserError
from sana_jax.files import read_json
from sana_jax.lora import Lora, lora_from_tree, read_lora, write_lora
from sana_jax.lora.names import Target, lora_targets
from sana_jax.lora.reading import LoraLayer
from sana_jax.pipelines.base_model_file import BaseModelFile
from sana_jax.pipelines.families import FAMILIES, rules_of
from sana_jax.pipelines.model_directory import pipeline_of, read_model_directory
from sana_jax.pipelines.opening import find_model, model_weights_id
from sana_jax.weights.checkpoints import checkpoint_structure, load_checkpoint_params
from sana_jax.weights.messages import first_few
from sana_jax.weights.safetensors_files import TensorSource, all_finite

_CARD = "README.md"  # in a run's directory
# Of a card: the row of its steps, and where its picture is.
_STEPS_ROW = re.compile(r"^(\| Steps \| )([\d,]+)( \|)$", re.MULTILINE)
_PICTURE = re.compile(r"samples/step_\d+\.png")


def merge_model(
    source: str | Path,
    lora: str | Path,
    destination: str | Path,
    choices: Choices | None = None,
    *,
    weight: float = 1.0,
    layout: Layout = "diffusers",
    max_shard_size: str | None = None,
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
        layout: as for ``export_model``.
        max_shard_size: as for ``export_model``.
        dry_run: says what would be read and written, and stops.
        report: takes one line after another.

    Raises:
        FileNotFoundError: something is missing.
        CheckpointError: weights or a LoRA that do not fit or are damaged, sums that overflow, no space, or something in
            the destination.
        UserError: a source without a transformer, or a weight of 0.
    """
    check_layout(destination, layout, max_shard_size)  # before a long reading
    if weight == 0:
        raise UserError("a LoRA of weight 0 changes nothing; give another weight, or use export")
    choices, written_as = split_pipeline(choices or Choices(), source, layout)
    model = open_model(source, choices)
    model.require_whole()
    network = _transformer(model).network
    # by the names that pipelines know, whatever spelling the source's tensors have
    adapter = read_lora(lora, rules_of(network.config), network.abstract)
    _write_merged(model, adapter, weight, destination, layout, max_shard_size, dry_run, report, written_as)


def export_run(
    run: str | Path,
    destination: str | Path,
    form: Literal["only", "merged"],
    choices: Choices | None = None,
    *,
    layout: Layout = "diffusers",
    max_shard_size: str | None = None,
    dry_run: bool = False,
    report: Report = print,
) -> None:
    """Writes what a training run of a LoRA has made, for diffusers.

    Args:
        run: the run's directory.
        destination: must not exist yet, or be empty. It appears when everything is in it.
        form: ``only`` the LoRA, as a file for ``load_lora_weights`` and, where the run has one, its model card; or
            ``merged`` with the base model, as ``merge_model`` does it.
        choices: which of the run's checkpoints and weights; the variant of the base model's weights, for ``merged``.
        layout: of ``merged``, as for ``export_model``.
        max_shard_size: of ``merged``.
        dry_run: says what would be read and written, and stops.
        report: takes one line after another.

    Raises:
        as ``merge_model``; and UserError for a directory that is not a run of a LoRA.
    """
    run, choices = Path(run), choices or Choices()
    check_layout(destination, layout, max_shard_size)
    trained_from = BaseModelFile.read(run)
    if trained_from is None or trained_from.kind != "lora":
        kind = "no training run of a LoRA" if trained_from is None else f"a training run of kind {trained_from.kind}"
        raise UserError(f"--lora {form}: {run} is {kind}; leave --lora out, or name the directory of a LoRA's run")
    found = _read_run(run, trained_from, choices)
    report(f"training run: the {found.which} weights of step {found.step}")
    if found.others:
        report(f"left out: {', '.join(found.others)}, which the run has trained too and diffusers cannot load")
    if form == "merged":
        variant = choices.variant or trained_from.variant
        base = find_model(trained_from.locate(run), variant)
        parts = read_model_directory(base, pipeline_of(base), variant=variant)
        trained_from.check(model_weights_id(parts), run)
        of_others = layout == "diffusers" and is_run(base)  # a run itself has one set of weights
        model = open_model(base, Choices(variant=None if of_others else variant))
        model = completed(model, variant) if layout == "diffusers" else model
        _write_merged(model, found.lora, 1.0, destination, layout, max_shard_size, dry_run, report)
        return
    if choices.variant is not None:
        raise UserError(f"--variant {choices.variant}: the LoRA alone has no variants; leave it out")
    num_bytes = sum(layer.down.nbytes + layer.up.nbytes for layer in found.lora.layers)
    check_destination(destination, num_bytes)
    if dry_run:
        report(f"dry run: would write {num_bytes:,} bytes; nothing was written")
        return
    with new_directory(destination) as temporary:
        notes = {"base_model": Path(trained_from.model).name, "step": found.step, "weights": found.which}
        network, settings = found.network, found.settings
        notes["targets"] = list(settings.get("targets", ()))
        notes["dropout"] = settings.get("dropout", 0.0)
        write_lora(temporary, found.lora, network.rules, network.abstract, notes=notes)
        if (run / _CARD).is_file():
            _copy_card(run, temporary, found.step)
    report(f"exported: {destination}")


def _copy_card(run: Path, directory: Path, step: int) -> None:
    """Copies a run's model card with the picture that it shows, as of a checkpoint.

    The card is that of the newest one. Of another the steps are put right, and the picture is that of the same step,
    or left out where the run has none.
    """
    text = (run / _CARD).read_text(encoding="utf-8")
    is_newest = any(row[2].replace(",", "") == str(step) for row in _STEPS_ROW.finditer(text))
    text = _STEPS_ROW.sub(lambda row: f"{row[1]}{step:,}{row[3]}", text)
    for picture in dict.fromkeys(_PICTURE.findall(text)):
        candidates = [f"samples/step_{step:06d}.png", *([picture] if is_newest else [])]
        shown = next((name for name in candidates if (run / name).is_file()), None)
        if shown is None:
            text = "".join(line for line in text.splitlines(keepends=True) if picture not in line)
            continue
        text = text.replace(picture, shown)
        (directory / shown).parent.mkdir(exist_ok=True)
        (directory / shown).write_bytes((run / shown).read_bytes())
    (directory / _CARD).write_text(text, encoding="utf-8")


class _RunLora(NamedTuple):
    """The LoRA of a training run's checkpoint."""

    lora: Lora
    network: Network
    settings: dict[str, Any]  # those of its training
    step: int
    which: str
    others: tuple[str, ...]  # what was trained beside it


def _read_run(run: Path, trained_from: BaseModelFile, choices: Choices) -> _RunLora:
    config = run / "transformer" / CONFIG
    network = network_of(read_json(config), str(config))
    settings = trained_from.settings.get("lora")
    if not isinstance(settings, dict) or "alpha" not in settings:
        raise UserError(f"the settings of {run} do not say the LoRA's alpha; mend base_model.json, or train again")
    checkpoints = run / "checkpoints"
    options = {"which": choices.weights, "step": choices.checkpoint_step}
    tree, step, which = load_checkpoint_params(checkpoints, checkpoint_structure(checkpoints, **options), **options)
    lora = lora_from_tree(tree["lora"], network.rules, network.abstract, alpha=settings["alpha"])
    lora = dataclasses.replace(lora, location=f"of {run}")
    return _RunLora(lora, network, settings, step, which, tuple(sorted(name for name in tree if name != "lora")))


def _write_merged(
    model: Model,
    adapter: Lora,
    weight: float,
    destination: str | Path,
    layout: Layout,
    max_shard_size: str | None,
    dry_run: bool,
    report: Report,
    written_as: str | None = None,
) -> None:
    model.require_whole()
    transformer = _transformer(model)
    merged = MergedSource(transformer, adapter, weight)
    for line in adapter.summary():
        report(line)
    report(f"LoRA {adapter.location}: merged with weight {weight:g}")
    with_lora = dataclasses.replace(transformer, source=merged)
    export_opened(
        dataclasses.replace(
            model, components=tuple(with_lora if part is transformer else part for part in model.components)
        ),
        destination,
        layout=layout,
        pipeline=written_as,
        max_shard_size=max_shard_size,
        dry_run=dry_run,
        report=report,
    )
    if merged.unchanged:
        report(
            f"{len(merged.unchanged)} of {len(adapter.layers)} layers are as they were, since the LoRA's change is "
            f"smaller than the rounding of their dtype: {first_few(merged.unchanged, 'layers')}"
        )


class MergedSource:
    """A transformer's tensors with a LoRA added, each when it is read.

    Raises:
        CheckpointError: the LoRA changes layers that the transformer does not have.
    """

    def __init__(self, component: Component, lora: Lora, weight: float) -> None:
        source = component.source
        if source is None:
            raise ValueError("a component without weights")  # require_whole() has refused it
        self.location, self.tensors = source.location, source.tensors
        self.unchanged: list[str] = []
        self._source: TensorSource = source
        self._lora, self._weight = lora.location, weight
        # by the places in our parameters: the source may spell a layer's name in another way than the LoRA does
        targets = lora_targets(component.network.rules, component.network.abstract)
        places = {(target.path, target.layer): (f"{name}.weight", target) for name, target in targets.items()}
        self._layers: dict[str, tuple[LoraLayer, Target]] = {}
        for layer in lora.layers:
            name, target = places.get((layer.path, layer.layer), ("", None))
            if name not in source.tensors:
                raise CheckpointError(
                    f"the LoRA {lora.location} changes {layer.module}, which {source.location} does not have; choose a "
                    "LoRA that was trained for this model"
                )
            self._layers[name] = layer, target

    def read(self, name: str) -> np.ndarray:
        """One tensor, with what the LoRA adds to it.

        Raises:
            CheckpointError: the sum is too large for the dtype.
        """
        tensor = self._source.read(name)
        if name not in self._layers:
            return tensor
        layer, target = self._layers[name]
        scale = np.float32(layer.scale * self._weight)
        change = layer.down.astype(np.float32) @ (layer.up.astype(np.float32) * scale)
        change = target.layout.to_theirs(change)
        with np.errstate(over="ignore"):
            total = (tensor.astype(np.float32) + change).astype(tensor.dtype)
        if not all_finite(total):
            raise CheckpointError(
                f"{layer.module} with the LoRA {self._lora} is too large for {tensor.dtype}; use a smaller weight than "
                f"{self._weight:g}, or weights in another dtype"
            )
        # a ControlNet's embedders are compared with these, so that a tensor may be read twice
        if change.any() and np.array_equal(total, tensor) and layer.module not in self.unchanged:
            self.unchanged.append(layer.module)
        return np.ascontiguousarray(np.where(change == 0, tensor, total))


def _transformer(model: Model) -> Component:
    for component in model.components:
        if component.network.class_name in FAMILIES:
            return component
    there = ", ".join(component.network.class_name for component in model.components) or "none"
    raise UserError(f"{model.path} has no transformer ({there}), which a LoRA is for; name a whole model")
