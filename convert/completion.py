"""A model directory of a part that stands alone: of an original file, or of what a training run has trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from convert.runs import as_directory, without_advice
from convert.sources import (
    SCHEDULER_CONFIG,
    Choices,
    Component,
    Model,
    index_of,
    is_run,
    open_model,
    with_libraries,
)
from sana_jax.contract import Contract, contract_of
from sana_jax.errors import UserError
from sana_jax.files import read_json
from sana_jax.pipelines.base_model_file import BaseModelFile
from sana_jax.pipelines.opening import find_model

# What a text encoder and an autoencoder have to fit.
_FITTING = ("in_channels", "caption_channels")


def open_whole(source: str | Path, choices: Choices | None = None, components_from: str | Path | None = None) -> Model:
    """``open_model``, with the components of another model where they are asked for.

    Args:
        source: as for ``open_model``.
        choices: what it leaves open; with ``components_from``, the variant is of that model's weights.
        components_from: a model directory, a name on the Hub, or a run, for those of the model that it began with.

    Raises:
        as ``open_model``; and UserError where the two are not of these kinds, or do not fit each other.
    """
    if components_from is None:
        return open_model(source, choices)
    choices = choices or Choices()
    model = open_model(source, dataclasses.replace(choices, variant=None))
    return _complete(model, _open_others(components_from, choices.variant), str(components_from))


def completed(model: Model, variant: str | None = None) -> Model:
    """A training run as a whole model directory, with the components of the model that it began with; others as is."""
    if model.origin != "training run" or model.index is not None:
        return model
    others = _open_others(model.path, variant)
    return as_directory(model) if others.path == model.path else _complete(model, others, str(others.path))


def _open_others(where: str | Path, variant: str | None = None) -> Model:
    """The model directory whose components complete another; of a training run, that of the model it began with.

    Args:
        where: a directory, or a name on the Hub.
        variant: of its weight files.

    Raises:
        FileNotFoundError: nothing there, nor where the run began.
        UserError: nothing that can be converted.
    """
    path = find_model(where, variant)
    if is_run(path) and (trained_from := BaseModelFile.read(path)) is not None:
        return _open_others(trained_from.locate(path), variant or trained_from.variant)
    return as_directory(open_model(path, Choices(variant=variant)))


def _complete(model: Model, other: Model, where: str) -> Model:
    """A part that stands alone, with the other components of a model directory.

    The sampler is the part's own, and so is whatever its original file or its run says.

    Args:
        model: of an original file or a training run.
        other: a model directory.
        where: how that was named.

    Raises:
        UserError: they are not of these kinds, or do not fit each other.
    """
    if model.origin not in ("original", "training run") or other.index is None or "_class_name" not in index_of(model):
        raise UserError(
            f"--components-from {where}: it completes an original .pth or .safetensors file of a transformer, or a "
            f"training run, from a model directory, which {model.path} and {where} are not; leave it out"
        )
    model = _in_its_folder(model) if model.origin == "training run" else model
    (part,) = model.components
    _check_fit(part, other, where)
    left = {part.folder, "scheduler"} | ({"controlnet"} if part.folder == "transformer" else set())
    taken = tuple(component for component in other.components if component.folder not in left)
    copies = {file: name for file, name in other.copies.items() if name.split("/")[0] not in left}
    folders = {component.folder for component in taken} | {
        name.split("/")[0] for name in copies.values() if "/" in name
    }
    entries = {name: other.index[name] for name in folders if name in other.index}
    failures = {name: error for name, error in other.failures.items() if name in other.index and name not in left}
    return dataclasses.replace(
        model,
        index={**model.index, **entries},
        components=(*model.components, *taken),
        copies={**model.copies, **copies},
        contract=_contract(model, other),
        notes=(*without_advice(model.notes), f"{', '.join(sorted(folders))} come from {where}"),
        failures={**model.failures, **failures},
    )


def _in_its_folder(model: Model) -> Model:
    """What a run has trained as a component of a model directory, with the run's sampler."""
    (part,) = model.components
    part = dataclasses.replace(part, folder=part.folder or "transformer")
    index = {**with_libraries(index_of(model), model.path), part.folder: ["diffusers", part.network.class_name]}
    kept = {name: value for name, value in index.items() if not isinstance(value, list)}
    kept |= {name: index[name] for name in ("scheduler", part.folder)}
    scheduler = model.path / "scheduler" / SCHEDULER_CONFIG
    copies = {**model.copies, scheduler: f"scheduler/{SCHEDULER_CONFIG}"}
    return dataclasses.replace(model, index=kept, components=(part,), copies=copies)


def _check_fit(part: Component, other: Model, where: str) -> None:
    """Raises ``UserError`` where the other model's encoders are for another transformer."""
    theirs = next((component for component in other.components if component.folder == "transformer"), None)
    if theirs is None:
        return
    for field in _FITTING:
        own, given = (getattr(component.network.config, field, None) for component in (part, theirs))
        if own != given:
            raise UserError(
                f"--components-from {where}: its transformer has {field} {given}, and this one {own}; name a model "
                "with the same text encoder and autoencoder"
            )


def _contract(model: Model, other: Model) -> Contract | None:
    """A run goes on needing what its base model's weights need; an original file needs what its own do."""
    if other.contract is None:
        return model.contract
    if model.origin == "original":
        if model.contract is None:
            return None
        return dataclasses.replace(
            model.contract,
            autoencoder_dtype=other.contract.autoencoder_dtype,
            text_encoder_dtype=other.contract.text_encoder_dtype,
            license=model.contract.license or other.contract.license,
        )
    part = model.components[0]
    if part.folder != "transformer":
        return other.contract
    scheduler = read_json(model.path / "scheduler" / SCHEDULER_CONFIG)
    own = contract_of(part.network.config, names=(), stored={}, scheduler=scheduler)
    of_the_run = {name: getattr(own, name) for name in ("family", "sampler", "flow_shift", "image_size")}
    return dataclasses.replace(other.contract, **of_the_run)
