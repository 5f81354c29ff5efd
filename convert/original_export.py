"""Export to NVlabs' own layout: one file of weights under their names, which ``convert.original`` reads again."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from convert.engine import Report, announce, check_new_file, describe, say_plan, writing
from convert.original import OriginalFile, read_original
from convert.original_world_model import renamed_world_model
from convert.renames import OriginalSource, Rename
from convert.sources import INDEX, LONGSANA, SCHEDULER_CONFIG, Choices, Component, Model, index_of
from convert.tables import controlnet_original, sana_original, sana_video_original, sana_wm_original
from convert.torch_writer import write_torch
from sana_jax.diffusion.samplers import Sampler, from_scheduler_config
from sana_jax.errors import CheckpointError, UserError
from sana_jax.files import atomic_file, read_json
from sana_jax.weights.messages import first_few, one_line
from sana_jax.weights.safetensors_files import TensorInfo, header_of

_VIDEO, _CONTROLNET, _WORLD = "SanaVideoTransformer3DModel", "SanaControlNetModel", "SanaWMTransformer3DModel"
_PICTURES = ("SanaTransformer2DModel", _CONTROLNET)
_PIXELS = 32  # of a latent's pixel
_NULL_CAPTION, _POSITIONS = "y_embedder.y_embedding", "pos_embed"
# How NVlabs' training saves a network: the section's name, and what is before its tensors' names.
_SECTION, _LONGSANA_SECTION = ("state_dict", ""), ("generator", "model.")


class _Layout(NamedTuple):
    """The renames of a component, and what its original files hold besides."""

    table: tuple[Rename, ...]
    left_out: tuple[str, ...]
    keep_others: bool = False


def _pictures(component: Component) -> _Layout:
    guidance = component.network.config.guidance_embeds
    left_out = (_POSITIONS, _NULL_CAPTION, *(("logvar_linear",) if guidance else ()))
    return _Layout(sana_original.transformer_table(guidance=guidance), left_out)


def _world_model(component: Component) -> _Layout:
    kept = any(name.endswith(".recall_gate") for name in component.source.tensors)
    left_out = (_POSITIONS, _NULL_CAPTION, *(() if kept else ("recall_gate",)))
    return _Layout(sana_wm_original.world_model_table(), left_out, keep_others=True)


# class -> its layout; in this order, a transformer before the ControlNet beside it
_LAYOUTS: dict[str, Callable[[Component], _Layout]] = {
    "SanaTransformer2DModel": _pictures,
    _VIDEO: lambda component: _Layout(sana_video_original.video_transformer_table(), (_NULL_CAPTION,)),
    _WORLD: _world_model,
    _CONTROLNET: lambda component: _Layout(controlnet_original.controlnet_table(), (_POSITIONS, _NULL_CAPTION)),
}


def export_original(
    model: Model,
    destination: str | Path,
    *,
    pipeline: str | None = None,
    dry_run: bool = False,
    report: Report = print,
) -> None:
    """Writes the transformer, or the ControlNet with its transformer where both are there, as NVlabs save it.

    Args:
        model: what is open.
        destination: a new file; ``.pth`` has the section that NVlabs' training gives it, ``.safetensors`` has none.
        pipeline: whether a lone transformer of SANA-Video is that or LongSANA's, as ``Choices.pipeline``.
        dry_run: says what would be read and written, and stops.
        report: takes one line after another.

    Raises:
        CheckpointError: weights that do not fit or are damaged, no space, or something of that name.
        UserError: nothing in the model has an original layout.
    """
    destination = Path(destination)
    left, model = [*_beside(model)], _select(model)
    main = model.components[-1]
    longsana = _is_longsana(model, main, pipeline)
    layouts = [_LAYOUTS[component.network.class_name](component) for component in model.components]
    views = [_view(component, layout) for component, layout in zip(model.components, layouts)]
    view = views[0] if len(views) == 1 else _WithBase(*views, model)
    section, prefix = _LONGSANA_SECTION if longsana else _SECTION
    sections = frozenset({section} if destination.suffix == ".pth" else ())
    announce(model, report)
    if left:
        report(f"left out: {', '.join(left)}; an original file holds the network alone")
    report(_describe_left_out(layouts[-1].left_out))
    if main.network.class_name == _CONTROLNET and len(views) == 1:
        report(
            "NVlabs' files of a ControlNet hold the transformer's blocks too, and this one does not: name a directory "
            "that has both, or load the transformer's own file first"
        )
    for line in _describe_reading(model, main, OriginalFile(destination, view, sections=sections), longsana):
        report(line)
    needed = sum(component.num_bytes for component in model.components)
    check_new_file(destination, needed)
    if dry_run:
        say_plan(model, report, lambda part: destination.name)
        return
    begin = time.perf_counter()
    with writing(destination, "another file"):
        if sections:
            infos = {f"{prefix}{name}": info for name, info in view.tensors.items()}
            write_torch(destination, section, infos, ((f"{prefix}{name}", *rest) for name, *rest in view.pieces()))
        else:
            _write_safetensors(destination, view)
    for component in model.components:
        report(f"{describe(component)} -> {destination.name}")
    report(f"exported: {destination}, {len(view.tensors)} tensors in {time.perf_counter() - begin:.1f} s")


# -- what is written -------------------------------------------------------------------------------------------------


class _View(Protocol):
    """Tensors under original names, which come in pieces; ``OriginalSource`` is one."""

    location: str
    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> np.ndarray: ...

    def pieces(self) -> Iterator[tuple[str, int, np.ndarray]]: ...


def _view(component: Component, layout: _Layout) -> OriginalSource:
    source = component.source
    if source is None:
        raise ValueError("a component without weights")  # require_whole() has refused it
    if component.network.class_name == _WORLD:
        source = renamed_world_model(source)  # a published directory may have the file's own spelling
    return OriginalSource(source, layout.table, keep_others=layout.keep_others)


class _WithBase:
    """A ControlNet beside its transformer, as one original file: both have the transformer's embedders.

    Raises:
        CheckpointError: the two have other embedders, for which the file has no place.
    """

    def __init__(self, base: OriginalSource, controlnet: OriginalSource, model: Model) -> None:
        self.location = str(model.path)
        self.tensors = {**base.tensors, **controlnet.tensors}
        self._base, self._controlnet = base, controlnet
        self._shared = base.tensors.keys() & controlnet.tensors.keys()
        other = [
            name
            for name in base.tensors
            if name in self._shared
            and (
                base.tensors[name] != controlnet.tensors[name]
                or not np.array_equal(base.read(name), controlnet.read(name))
            )
        ]
        if other:
            raise CheckpointError(
                f"{model.path}: the ControlNet's embedders are not the transformer's, and an original file has them "
                f"once: {first_few(other, 'tensors')}; name its transformer or its controlnet directory"
            )

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return (self._base if name in self._base.tensors else self._controlnet).read(name)

    def pieces(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """All tensors' bytes: original name, first byte within it, array."""
        yield from self._base.pieces()
        yield from (piece for piece in self._controlnet.pieces() if piece[0] not in self._shared)


def _write_safetensors(path: Path, view: _View) -> None:
    head, starts = header_of(view.tensors)
    with atomic_file(path) as file:
        file.write(head)
        for name, begin, array in view.pieces():
            file.seek(starts[name] + begin)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


# -- what is chosen, and what is said --------------------------------------------------------------------------------


def _beside(model: Model) -> list[str]:
    """What a model has that an original file does not hold."""
    others = {part.folder for part in model.components if part.network.class_name not in _LAYOUTS}
    others |= {name.split("/")[0] for name in (*model.copies.values(), *model.written)} | set(model.failures)
    return sorted(others - {"transformer", "controlnet", "contract", ""})


def _select(model: Model) -> Model:
    """The model without what has no original layout."""
    chosen = [part for name in _LAYOUTS for part in model.components if part.network.class_name == name]
    failures = {
        name: error
        for name, error in model.failures.items()
        if name in ("transformer", "controlnet", "contract", "components")
    }
    if not chosen and not failures:
        there = ", ".join(part.network.class_name for part in model.components)
        raise UserError(
            f"{model.path} has no network with an original layout ({there}); allowed are {', '.join(_LAYOUTS)}: leave "
            "--layout original out"
        )
    model = dataclasses.replace(model, components=tuple(chosen), failures=failures)
    model.require_whole()
    return model


def _is_longsana(model: Model, component: Component, pipeline: str | None) -> bool:
    if component.network.class_name != _VIDEO:
        if pipeline is not None:
            raise UserError(
                f"--pipeline {pipeline} is for SANA-Video or LongSANA; {model.path} is neither: leave the option out"
            )
        return False
    said = index_of(model).get("_class_name")
    if said is None or pipeline is None:
        return (said or pipeline) == LONGSANA
    if said != pipeline:
        raise UserError(f"--pipeline {pipeline}: {model.path / INDEX} says {said}; leave the option out")
    return said == LONGSANA


def _describe_left_out(names: tuple[str, ...]) -> str:
    """What original files hold besides, and what NVlabs' code does without it (``diffusion/utils/checkpoint.py``)."""
    does = f"NVlabs' code loads with strict=False and, to train, takes {_NULL_CAPTION} from its null_embed_path"
    drops = f"; it drops {_POSITIONS} of any file" if _POSITIONS in names else ""
    return f"not in the file, since no weights of the network: {', '.join(names)}; {does}{drops}"


def _describe_reading(model: Model, component: Component, file: OriginalFile, longsana: bool) -> list[str]:
    """With which options ``import`` makes the same of the file, and what no option says."""
    config = component.network.config
    options: dict[str, Any] = {}
    if component.network.class_name in _PICTURES:
        options["image_size"] = _PIXELS * config.sample_size
    if getattr(config, "revision", "legacy") != "legacy":
        options["revision"] = config.revision
    if longsana and not file.sections:
        options["pipeline"] = LONGSANA
    notes = []
    if component.network.class_name == _VIDEO and not longsana and "_class_name" not in index_of(model):
        notes.append(
            f"{model.path} does not say whether it is SANA-Video or LongSANA: written as SANA-Video; --pipeline "
            f"{LONGSANA} writes it as that"
        )
    try:
        found = read_original(file, Choices(**options), [])
        found.require_whole()
    except UserError as error:
        return [*notes, f"python -m convert.main import will not read this file: {one_line(error, 1000)}"]
    lost = _differences(config, found.components[0].network.config)
    if model.contract is not None and found.contract is not None:
        saturation = model.contract.fp16_saturation, found.contract.fp16_saturation
        if saturation[0] is not None and saturation[0] != saturation[1]:
            lost.append(f"fp16_saturation {saturation[0]}, not {saturation[1]}")
    samplers = _sampler_of(model), _sampler_of(found)
    if None not in samplers:
        shifts = [getattr(sampler, "flow_shift", None) for sampler in samplers]
        if None not in shifts and shifts[0] != shifts[1]:
            options["flow_shift"] = f"{shifts[0]:g}"
        if type(samplers[0]) is type(samplers[1]):
            lost += _differences(*samplers, apart_from=("flow_shift",))
        else:
            lost.append(f"sampler {', not '.join(_name_of(sampler) for sampler in samplers)}")
    if options:
        words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
        notes.append(f"the file has no configuration: import it with {words}")
    if lost:
        notes.append(f"the file cannot say, and import takes it otherwise: {'; '.join(lost)}")
    return notes


def _differences(ours: Any, read: Any, apart_from: tuple[str, ...] = ()) -> list[str]:
    """The fields of two dataclasses of one type that are not equal."""
    return [
        f"{field.name} {getattr(ours, field.name)}, not {getattr(read, field.name)}"
        for field in dataclasses.fields(ours)
        if field.name not in apart_from and getattr(ours, field.name) != getattr(read, field.name)
    ]


def _sampler_of(model: Model) -> Sampler | str | None:
    """What a model's scheduler describes: its class alone where that is not available here, None where it has none."""
    place = f"scheduler/{SCHEDULER_CONFIG}"
    config = model.written.get(place)
    if config is None and (model.path / place).is_file():
        config = read_json(model.path / place)
    if config is None:
        return None
    try:
        return from_scheduler_config(config)
    except UserError:
        return str(config.get("_class_name"))


def _name_of(sampler: Sampler | str) -> str:
    return sampler if isinstance(sampler, str) else type(sampler).__name__
