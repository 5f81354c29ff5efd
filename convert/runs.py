"""Training runs as what can be converted: what a run has trained, as a component of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from convert.sources import (
    CONFIG,
    INDEX,
    SCHEDULER_CONFIG,
    Choices,
    Component,
    Model,
    has_own_components,
    index_of,
    lone_contract,
    open_saved,
    refuse,
    refuse_of_originals,
)
from sana_jax.errors import CheckpointError, UserError
from sana_jax.files import read_json
from sana_jax.models.controlnet import SanaControlNetConfig
from sana_jax.pipelines.base_model_file import BaseModelFile
from sana_jax.pipelines.model_directory import GROWING_PIPELINES
from sana_jax.weights.checkpoints import choose_checkpoint, damaged_checkpoint
from sana_jax.weights.manifest import find_damage, saved_items

# Kinds of runs whose checkpoints hold the whole transformer among other networks, and those that train it in blocks.
_AMONG_OTHERS = ("sprint", "self_forcing")
_IN_BLOCKS = ("chunk_causal", "world_chunk_causal")
_NO_DIRECTORY = "which is no model directory"


def open_run(path: Path, choices: Choices, checksums: bool) -> Model:
    """A training run: its transformer or ControlNet, as a component of its own."""
    refuse(choices, path, "variant", "image_size", "flow_shift")
    refuse_of_originals(choices, path)
    trained_from = BaseModelFile.read(path)
    kind = "whole" if trained_from is None else trained_from.kind
    controlnet = kind == "controlnet"
    if kind == "lora":
        raise UserError(
            f"{path} is a run that has trained a LoRA beside {trained_from.model}, and holds no whole transformer: "
            "give --lora only or --lora merged to export"
        )
    folder = "controlnet" if controlnet else "transformer"
    config = _controlnet_config(path, trained_from) if controlnet else read_json(path / folder / CONFIG)
    checkpoints = path / "checkpoints"
    step = choose_checkpoint(checkpoints, choices.checkpoint_step)
    try:
        items = saved_items(checkpoints / str(step))
    except ValueError as error:
        raise damaged_checkpoint(checkpoints, step, str(error), "load") from None
    which = choices.weights
    if which == "ema" and "ema" not in items:
        raise CheckpointError(f"{path} was trained without averaged weights; leave --weights ema out")
    if which == "auto":
        which = "ema" if "ema" in items else "params"
    if problem := find_damage(checkpoints / str(step), [which], checksums=checksums):
        raise damaged_checkpoint(checkpoints, step, problem, "load")
    saved = checkpoints / str(step) / which
    notes = [f"training run: the {which} weights of step {step}"]
    branch = "transformer" if kind in _AMONG_OTHERS else None
    component = open_saved(path / folder, "", config, saved, "training run", branch=branch, notes=notes)
    if controlnet:
        return _controlnet_model(path, component, trained_from, notes)
    index = read_json(path / INDEX)
    if kind in _IN_BLOCKS:
        notes.append("trained in causal blocks of frames; diffusers' network takes all frames at once")
    if index.get("_class_name") in GROWING_PIPELINES:
        notes.append(f"the run is for {index['_class_name']}, whose few steps and causal blocks it was trained for")
    others = sorted(name for name, entry in index.items() if isinstance(entry, list))
    left = [name for name in others if name != "transformer"]
    if left:
        alone = f"of a training run the transformer alone is converted, {_NO_DIRECTORY}"
        notes.append(f"left out: {', '.join(left)}; {alone}{_sampled(path, trained_from, index)}")
    # weights of our own components have no needs, and sizes that no published autoencoder makes
    contract = None if has_own_components(index) else lone_contract(path, component)
    return Model(path, None, (component,), contract=contract, notes=tuple(notes))


def _sampled(path: Path, trained_from: BaseModelFile | None, index: Mapping[str, Any]) -> str:
    """What samples a training run, and what makes a whole model directory of it; nothing where no pipeline does."""
    if trained_from is not None and trained_from.kind == "chunk_causal":
        return ""
    others = path if has_own_components(index) or trained_from is None else trained_from.path
    return (
        f": python -m sana_jax.generate --model {path} samples the run as it is, and export with "
        f"--components-from {others} writes a whole model directory of it"
    )


def as_directory(model: Model) -> Model:
    """A training run's transformer as a whole model directory, where the run's own files describe the other components.

    Others stay as they are: their text encoder and autoencoder are those of a published model.
    """
    index = index_of(model)
    folders = [name for name, entry in index.items() if isinstance(entry, list) and name != "transformer"]
    files = {name: SCHEDULER_CONFIG if name == "scheduler" else CONFIG for name in folders}
    if not has_own_components(index) or not all((model.path / name / file).is_file() for name, file in files.items()):
        return model
    copies = {model.path / name / file: f"{name}/{file}" for name, file in files.items()}
    (transformer,) = model.components
    components = (dataclasses.replace(transformer, folder="transformer"),)
    notes = without_advice(model.notes)
    return dataclasses.replace(model, index=index, components=components, copies=copies, notes=notes)


def without_advice(notes: Iterable[str]) -> tuple[str, ...]:
    """The notes without those on what is missing beside a part that stands alone."""
    return tuple(note for note in notes if "--components-from" not in note and _NO_DIRECTORY not in note)


def _controlnet_config(path: Path, trained_from: BaseModelFile) -> dict[str, Any]:
    """The ``config.json`` of the ControlNet that a run has trained.

    Raises:
        UserError: the run's settings are no ControlNet's.
    """
    settings = trained_from.settings.get("controlnet")
    if not isinstance(settings, dict):
        raise UserError(f"base_model.json of {path} does not say the ControlNet's shape; mend it, or train again")
    try:
        return SanaControlNetConfig(**settings).to_dict()
    except TypeError as error:
        raise UserError(f"base_model.json of {path} describes no ControlNet ({error}); mend it") from error


def _controlnet_model(path: Path, component: Component, trained_from: BaseModelFile, notes: list[str]) -> Model:
    """A run's ControlNet in the folder of a ControlNet, where there is a place for it in diffusers.

    Raises:
        UserError: its blocks have norms that diffusers' ControlNet does not.
    """
    if component.config.get("qk_norm") is not None:
        raise UserError(
            f"{path} has trained a ControlNet beside a model with q/k norms (as SANA-1.5), which diffusers' "
            "SanaControlNetModel has no place for; use it with SanaControlNetPipeline of sana_jax, or train one "
            "beside a SANA without such norms"
        )
    scale = read_json(path / "transformer" / CONFIG).get("timestep_scale", 1.0)
    if scale != 1.0:
        notes.append(
            f"the ControlNet was trained with timesteps times {scale:g}, as its base model is; diffusers' pipeline "
            "gives a ControlNet timesteps as they are"
        )
    notes.append(
        "left out: the base model; give it to diffusers as it was published, or export with --components-from "
        f"{trained_from.path}, which writes a whole model directory"
    )
    return Model(path, None, (dataclasses.replace(component, folder="controlnet"),), notes=tuple(notes))
