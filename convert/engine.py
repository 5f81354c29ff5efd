"""Conversion in both directions: a component at a time, a tensor at a time, all of it or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from convert.completion import open_whole
from convert.families import parameter_count
from convert.sources import (
    CONFIG,
    INDEX,
    Choices,
    Component,
    Model,
    check_pipeline,
    has_own_components,
    index_of,
    tensor_bytes,
)
from sana_jax.compilation import readable_bytes
from sana_jax.errors import CheckpointError, UserError
from sana_jax.files import atomic_directory, write_json
from sana_jax.pipelines.families import FAMILIES
from sana_jax.pipelines.model_directory import GROWING_PIPELINES
from sana_jax.weights.components import CONVERTED, KEPT
from sana_jax.weights.converted import save_params
from sana_jax.weights.rules import lazy_params
from sana_jax.weights.safetensors_files import TensorInfo, TensorSource, write_safetensors
from sana_jax.weights.trees import check_folder_name, disk_shortage

Report = Callable[[str], None]
# What our index says beside what diffusers knows.
_OURS = ("contract", "defaults")
Layout = Literal["diffusers", "original"]
_FILE_ENDS = (".safetensors", ".pth")  # of layout original
_SHARD = "5GB"


def import_model(
    source: str | Path,
    destination: str | Path,
    choices: Choices | None = None,
    *,
    components_from: str | Path | None = None,
    dry_run: bool = False,
    report: Report = print,
) -> Model:
    """Converts a published or original checkpoint to a directory of ours: the same layout, weights written by Orbax.

    Args:
        source: a model directory, one component's directory, or an original file.
        destination: must not exist yet, or be empty. It appears when everything is in it.
        choices: what the source leaves open.
        components_from: a published model whose other components complete an original file.
        dry_run: says what would be read and written, and stops.
        report: takes one line after another.

    Raises:
        FileNotFoundError: something is missing.
        CheckpointError: weights that do not fit or are damaged, no space, or a destination with something in it.
        UserError: anything else that the user can mend.
    """
    model = open_whole(source, choices, components_from)
    for number, component in enumerate(model.components):
        if component.origin in ("converted", "training run"):
            where = source if components_from is None or number == 0 else f"--components-from {components_from}"
            raise UserError(
                f"{where} has weights of our own ({component.origin}); import takes published or original ones: use "
                "export to give it to PyTorch"
            )
    model.require_whole()
    announce(model, report)
    check_destination(destination, _bytes_of(model))
    check_folder_name(destination)
    if dry_run:
        say_plan(model, report, lambda part: _within(part, f"{CONVERTED}/"), model.copies)
        return model
    with new_directory(destination) as temporary:
        for component in model.components:
            begin = time.perf_counter()
            folder = temporary / component.folder
            write_json(folder / CONFIG, component.config)
            network = component.network
            tree = lazy_params(component.source, network.rules, network.abstract, ignored=network.ignored)
            save_params(folder / CONVERTED, tree)
            _write_kept(folder, component)
            report(f"{describe(component)} -> {_within(component, CONVERTED)} in {time.perf_counter() - begin:.1f} s")
            _say_dropped(component, report)
        _write_small(model, temporary)
        if model.index is not None:
            index = {key: value for key, value in model.index.items() if key != "contract"}
            write_json(temporary / INDEX, _with_contract(index, model))
    report(f"converted: {destination}")
    return model


def export_model(
    source: str | Path,
    destination: str | Path,
    choices: Choices | None = None,
    *,
    components_from: str | Path | None = None,
    layout: Layout = "diffusers",
    max_shard_size: str | None = None,
    dry_run: bool = False,
    report: Report = print,
) -> Model:
    """Writes a directory that diffusers' own ``from_pretrained`` loads, or one file in NVlabs' own layout.

    Args:
        source: a converted or published model directory, one component's, a training run (its transformer), or an
            original file.
        destination: as for ``import_model``; of layout ``original`` a new .safetensors or .pth file.
        choices: what the source leaves open.
        components_from: a model whose other components complete an original file or a training run to a directory of
            layout ``diffusers``; or a run, for those of the model that it began with.
        layout: ``diffusers``, or ``original``, which holds the transformer or ControlNet alone.
        max_shard_size: larger weights of layout ``diffusers`` become several files and an index: "5GB", which is what
            None takes, "500MB".
        dry_run: says what would be read and written, and stops.
        report: takes one line after another.

    Raises:
        as ``import_model``.
    """
    check_layout(destination, layout, max_shard_size)  # before a long reading
    if components_from is not None and layout == "original":
        raise UserError(f"--components-from {components_from}: --layout original writes one network; leave it out")
    choices, written_as = split_pipeline(choices or Choices(), source, layout)
    model = open_whole(source, choices, components_from)
    export_opened(
        model,
        destination,
        layout=layout,
        pipeline=written_as,
        max_shard_size=max_shard_size,
        dry_run=dry_run,
        report=report,
    )
    return model


def export_opened(
    model: Model,
    destination: str | Path,
    *,
    layout: Layout = "diffusers",
    pipeline: str | None = None,
    max_shard_size: str | None = None,
    dry_run: bool = False,
    report: Report = print,
) -> None:
    """``export_model`` of what is open already; arguments and errors as there.

    ``pipeline`` is what a lone transformer of layout ``original`` is written as: SANA-Video's or LongSANA's.
    """
    shard_bytes = check_layout(destination, layout, max_shard_size)
    if layout == "original":
        from convert.original_export import export_original

        export_original(model, destination, pipeline=pipeline, dry_run=dry_run, report=report)
        return
    model.require_whole()
    announce(model, report)
    _say_pipeline(model, destination, report)
    check_destination(destination, _bytes_of(model))
    if dry_run:

        def shards(part: Component) -> str:
            return _within(part, ", ".join(_shards(part.source, _stem(part), shard_bytes)))

        say_plan(model, report, shards, model.copies)
        return
    with new_directory(destination) as temporary:
        for component in model.components:
            begin = time.perf_counter()
            folder = temporary / component.folder
            write_json(folder / CONFIG, _named_config(component, model))
            count = _write_shards(folder, component.source, _stem(component), shard_bytes)
            files = f"{count} file{'s' if count > 1 else ''}"
            report(f"{describe(component)} -> {files} in {time.perf_counter() - begin:.1f} s")
            _say_missing(component, report)
            _say_revision(component, report)
        _write_small(model, temporary)
        if model.index is not None:
            write_json(temporary / INDEX, _exported_index(model.index))
    report(f"exported: {destination}")


def split_pipeline(choices: Choices, source: str | Path, layout: Layout) -> tuple[Choices, str | None]:
    """The choices for reading a source, and the pipeline that a file of layout ``original`` is written as.

    ``choices.pipeline`` says how an original file is read, and of a directory how its transformer is written.

    Raises:
        UserError: a pipeline that is not known.
    """
    if layout != "original" or not Path(source).is_dir():
        return choices, None
    check_pipeline(choices.pipeline)
    return dataclasses.replace(choices, pipeline=None), choices.pipeline


def check_layout(destination: str | Path, layout: str, max_shard_size: str | None) -> int:
    """The bytes of a shard of what is going to be written.

    Raises:
        UserError: no layout, a destination that is not called as the layout wants it, or not a size.
    """
    end = Path(destination).suffix
    if layout == "original":
        if end not in _FILE_ENDS:
            raise UserError(
                f"{destination}: --layout original writes one file; its name must end in {' or '.join(_FILE_ENDS)}"
            )
        if max_shard_size is not None:
            raise UserError(f"--max-shard-size {max_shard_size}: --layout original writes one file; leave it out")
    elif layout != "diffusers":
        raise UserError(f"--layout {layout!r} is not known; allowed are diffusers, original")
    elif end in (*_FILE_ENDS, ".pt"):
        raise UserError(
            f"{destination} is called like a file, and a directory for diffusers would be written: name a directory, "
            f"or add --layout original, which writes a {' or '.join(_FILE_ENDS)} file as NVlabs do"
        )
    return parse_size(max_shard_size or _SHARD)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "2GiB".

    Raises:
        UserError: not a size.
    """
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", text.upper())
    size = int(float(match[1]) * units[match[2] or ""]) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size {text!r} is not a size; allowed is a number with a unit: 5GB, 500MB")
    return size


# -- what is said ----------------------------------------------------------------------------------------------------


def announce(model: Model, report: Report) -> None:
    """What the user should know of a model before it is converted."""
    for note in model.notes:
        report(f"note: {note}")
    if model.contract is not None:
        report(f"contract: {model.contract}")


def describe(component: Component) -> str:
    """A component in half a line: its folder, family, size and dtypes."""
    dtypes = sorted({info.dtype.name for info in component.source.tensors.values()})
    count = parameter_count(component.network.abstract)
    name = f"{component.folder}: " if component.folder else ""
    return f"{name}{component.network.family}, {count:,} parameters, {', '.join(dtypes)}"


def _dropped(component: Component) -> list[TensorInfo]:
    """The source's tensors that our network has no use for."""
    patterns = component.network.dropped if component.network.dropped_part else ()
    return [info for name, info in component.source.tensors.items() if any(re.fullmatch(p, name) for p in patterns)]


def _say_dropped(component: Component, report: Report) -> None:
    """One line where an import leaves a part of the published network out."""
    if infos := _dropped(component):
        part, count = component.network.dropped_part, sum(math.prod(info.shape) for info in infos)
        report(
            f"{_within(component, CONVERTED)}: {len(infos):,} tensors ({count:,} parameters) of {part} are left out; "
            "an export of this directory will be without them"
        )


def _say_missing(component: Component, report: Report) -> None:
    """One line where an export lacks a part of the published network."""
    part = component.network.dropped_part
    if part and not _dropped(component):
        where = f"{component.folder}: " if component.folder else ""
        report(
            f"{where}exported without {part}, which is not in the source: diffusers reports these weights as missing; "
            "export the published directory to have them"
        )


def _say_revision(component: Component, report: Report) -> None:
    """One line where diffusers would compute something else with what is exported."""
    revision = getattr(component.network.config, "revision", "legacy")
    if revision != "legacy":
        where = f"{component.folder}: " if component.folder else ""
        report(
            f"{where}the revision is {revision}, which diffusers 0.42.1 does not know: it computes these weights as "
            "legacy, without a word"
        )


def _exported_index(index: Mapping[str, Any]) -> dict[str, Any]:
    """An index without what diffusers does not know; with our defaults where a component is one that it cannot open."""
    left_out = ("contract",) if has_own_components(index) else _OURS
    return {key: value for key, value in index.items() if key not in left_out}


def _say_pipeline(model: Model, destination: str | Path, report: Report) -> None:
    """One line where diffusers has no pipeline for what is exported."""
    name = index_of(model).get("_class_name")
    component = next((part for part in model.components if part.network.class_name in FAMILIES), None)
    if name not in GROWING_PIPELINES or component is None:
        return
    folder = f', subfolder="{component.folder}"' if component.folder else ""
    report(
        f"diffusers has no {name} and loads no pipeline from {destination}; it loads the transformer: "
        f'{component.network.class_name}.from_pretrained("{destination}"{folder})'
    )


def _within(component: Component, name: str) -> str:
    return f"{component.folder}/{name}" if component.folder else name


def say_plan(model: Model, report: Report, written: Callable[[Component], str], copies: Iterable[Path] = ()) -> None:
    """Every file that would be read with its bytes, and what would be written, by its name there."""
    total = 0
    for component in model.components:
        for file, size in component.files:
            report(f"would read {size:>14,} bytes  {file}")
            total += size
    for file in copies:
        report(f"would copy {file.stat().st_size:>14,} bytes  {file}")
        total += file.stat().st_size
    for component in model.components:
        report(f"would write {component.num_bytes:>13,} bytes  {describe(component)} -> {written(component)}")
    report(f"dry run: {readable_bytes(total)} would be read; nothing was written")


# -- writing ---------------------------------------------------------------------------------------------------------


def _bytes_of(model: Model) -> int:
    return sum(component.num_bytes for component in model.components) + sum(f.stat().st_size for f in model.copies)


def check_destination(destination: str | Path, needed: int) -> None:
    """Raises ``CheckpointError`` for a destination with something in it, or without space for ``needed`` bytes."""
    final = Path(destination).absolute()
    if os.path.lexists(final) and (not final.is_dir() or any(final.iterdir())):
        raise CheckpointError(f"{destination} exists already; delete it or name another directory")
    _check_space(destination, needed)


def check_new_file(destination: str | Path, needed: int) -> None:
    """Raises ``CheckpointError`` for a file that exists, or without space for ``needed`` bytes."""
    if os.path.lexists(destination):
        raise CheckpointError(f"{destination} exists already; delete it or name another file")
    _check_space(destination, needed)


def _check_space(destination: str | Path, needed: int) -> None:
    if shortage := disk_shortage(Path(destination).absolute(), needed):
        raise CheckpointError(f"not writing {destination}: {shortage}; free some space or name another disk")


@contextlib.contextmanager
def new_directory(destination: str | Path) -> Iterator[Path]:
    """A directory that appears when the block ends well, with a failure to write it in our words."""
    with writing(destination, "another directory"), atomic_directory(destination) as temporary:
        yield temporary


@contextlib.contextmanager
def writing(destination: str | Path, instead: str) -> Iterator[None]:
    """Turns a failure to write into a ``CheckpointError`` that advises to name something ``instead``."""
    try:
        yield
    except FileNotFoundError:
        raise  # something to be read is missing, and the message names it
    except OSError as error:
        raise CheckpointError(
            f"writing {destination} failed: {error.strerror or error}; nothing was left there, name {instead}"
        ) from error


def _named_config(component: Component, model: Model) -> dict[str, Any]:
    """A configuration that goes on saying which weights need float16's saturation: diffusers has no contract."""
    contract = model.contract
    if component.folder != "transformer" or contract is None or not contract.fp16_saturation or not contract.source:
        return component.config
    return {**component.config, "_name_or_path": contract.source}


def _write_small(model: Model, temporary: Path) -> None:
    for file, name in model.copies.items():
        (temporary / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, temporary / name)
    for name, content in model.written.items():
        write_json(temporary / name, content)


def _with_contract(index: dict[str, Any], model: Model) -> dict[str, Any]:
    return index if model.contract is None else {**index, "contract": model.contract.to_dict()}


def _write_kept(folder: Path, component: Component) -> None:
    """Published tensors that are no parameters of ours, and that an export needs."""
    kept = {
        name: info
        for name, info in component.source.tensors.items()
        if any(re.fullmatch(pattern, name) for pattern in component.network.kept)
    }
    if kept:
        write_safetensors(folder / KEPT, kept, ((name, component.source.read(name)) for name in kept))


def _stem(component: Component) -> str:
    return component.network.stem


def _shards(source: TensorSource, stem: str, shard_bytes: int) -> dict[str, dict[str, TensorInfo]]:
    """File name -> its tensors, as diffusers and transformers name and fill them."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in source.tensors.items():
        more = tensor_bytes(info)
        if shards[-1] and size + more > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += more
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    count = len(shards)
    return {f"{stem}-{number:05d}-of-{count:05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def _write_shards(folder: Path, source: TensorSource, stem: str, shard_bytes: int) -> int:
    shards = _shards(source, stem, shard_bytes)
    for file, infos in shards.items():
        write_safetensors(folder / file, infos, ((name, source.read(name)) for name in infos), {"format": "pt"})
    if len(shards) > 1:
        total = sum(tensor_bytes(info) for info in source.tensors.values())
        weight_map = {name: file for file, infos in shards.items() for name in infos}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{stem}.safetensors.index.json", index)
    return len(shards)
