"""What can be converted: model directories, single components, training runs, original files. Opened, not yet read."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert.families import WITHOUT_WEIGHTS, Network, class_of, is_without_weights, network_of, stem_of
from sana_jax.contract import Contract, contract_of, license_of, names_of
from sana_jax.errors import CheckpointError, UserError
from sana_jax.files import read_json
from sana_jax.pipelines.model_directory import GROWING_PIPELINES
from sana_jax.text_encoders.tokenizer import PromptTokenizer
from sana_jax.weights.components import CONVERTED, KEPT, TRANSFORMERS_STEM
from sana_jax.weights.converted import lazy_saved_tree, refuse_quantised
from sana_jax.weights.manifest import find_damage
from sana_jax.weights.messages import describe_array
from sana_jax.weights.recognition import looks_like
from sana_jax.weights.rules import Misfits, TreeSource, flatten, misfits, places
from sana_jax.weights.safetensors_files import (
    SafetensorsSource,
    TensorInfo,
    TensorSource,
    check_variant,
    find_weights_file,
)

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
WeightsChoice = Literal["auto", "params", "ema"]
# Their weights have the same names and shapes.
SANA_VIDEO, LONGSANA = VIDEO_PIPELINES = ("SanaVideoPipeline", "LongSanaVideoPipeline")


# Files of a tokenizer; whatever else lies there is not copied.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_SMALL_FILES = {"tokenizer": _TOKENIZER_FILES, "scheduler": (SCHEDULER_CONFIG,)}
# files that a network of this class needs beside its own, where it stands alone
_BESIDE = {"SiglipVisionModel": ("preprocessor_config.json", "spiece.model", *_TOKENIZER_FILES)}
_LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a source may leave open.

    Attributes:
        variant: of published weight files: ``bf16``, ``fp16``; None takes the plain ones.
        weights: of a training run or an original file: averaged (``ema``) or raw (``params``).
        checkpoint_step: of a training run; None for the newest.
        image_size: of an original file: pixels per side that it was trained for.
        flow_shift: of an original file: shift of the noise schedule.
        revision: of an original file of SANA-WM: ``legacy`` or ``current``; None takes legacy, and says so.
        pipeline: of an original file that may be SANA-Video or LongSANA: ``SanaVideoPipeline``, which None takes and
            says so, or ``LongSanaVideoPipeline``.
    """

    variant: str | None = None
    weights: WeightsChoice = "auto"
    checkpoint_step: int | None = None
    image_size: int | None = None
    flow_shift: float | None = None
    revision: str | None = None
    pipeline: str | None = None


@dataclasses.dataclass(frozen=True)
class Component:
    """One network with its weights, under their published names.

    Attributes:
        folder: ``transformer``, ``vae``, ...; "" where it is not part of a model.
        network: what its configuration describes.
        config: its ``config.json``, as it is.
        source: the tensors; None where converted weights do not fit their configuration.
        problems: what does not fit.
        files: the weight files with their sizes in bytes.
        origin: "published", "converted", "training run" or "original".
    """

    folder: str
    network: Network
    config: Mapping[str, Any]
    source: TensorSource | None
    problems: Misfits
    files: tuple[tuple[Path, int], ...]
    origin: str

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        infos = self.source.tensors.values() if self.source is not None else ()
        return sum(tensor_bytes(info) for info in infos)


@dataclasses.dataclass(frozen=True)
class Model:
    """Everything that a source holds.

    Attributes:
        path: the directory or file.
        index: its ``model_index.json``; None for a single component.
        components: those that could be opened.
        copies: file -> path below the destination, for what is copied as it is.
        written: path below the destination -> JSON, for what the source does not have and the destination needs.
        contract: None where no transformer says anything.
        notes: lines that the user should see.
        failures: component -> the error that kept it from being opened.
    """

    path: Path
    index: Mapping[str, Any] | None
    components: tuple[Component, ...]
    copies: Mapping[Path, str] = dataclasses.field(default_factory=dict)
    written: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    contract: Contract | None = None
    notes: tuple[str, ...] = ()
    failures: Mapping[str, Exception] = dataclasses.field(default_factory=dict)

    @property
    def origin(self) -> str:
        """Where it comes from."""
        return self.components[0].origin if self.components else "published"

    def require_whole(self) -> None:
        """Raises ``CheckpointError`` with everything that is wrong with any component."""
        problems = [f"{name}: {error}" for name, error in self.failures.items()]
        problems += [
            f"{component.folder or self.path}: the weights do not fit {CONFIG}: {component.problems}"
            for component in self.components
            if component.problems
        ]
        if len(self.failures) == len(problems) == 1:
            raise next(iter(self.failures.values()))
        if problems:
            raise CheckpointError(
                f"{self.path} cannot be converted. {'. '.join(problems)}. Nothing was written; python -m convert.main "
                f"inspect {self.path} --all lists every tensor"
            )


def tensor_bytes(info: TensorInfo) -> int:
    """Bytes of one tensor."""
    count = info.dtype.itemsize
    for length in info.shape:
        count *= length
    return count


def open_model(path: str | Path, choices: Choices | None = None, *, checksums: bool = True) -> Model:
    """Finds out what a source is and opens all of it. No tensor is read.

    Args:
        path: a directory or file.
        choices: what it leaves open.
        checksums: whether files of ours are compared with their checksums, which reads them, or by their sizes alone.

    Raises:
        FileNotFoundError: there is nothing of this name.
        UserError: it is nothing that can be converted. What is wrong with single components is in the result.
    """
    choices = choices or Choices()
    path = Path(path)
    if path.is_file():
        from convert.original import open_original

        return open_original(path, choices)
    if not path.is_dir():
        raise FileNotFoundError(
            f"there is no {path}; name a model directory, one component's directory, a training run, or an original "
            ".pth or .safetensors file"
        )
    if is_run(path):
        from convert.runs import open_run

        return open_run(path, choices, checksums)
    refuse(choices, path, "weights", "checkpoint_step")
    refuse_of_originals(choices, path)
    if (path / INDEX).is_file():
        return _open_directory(path, choices, checksums)
    if (path / CONFIG).is_file():
        notes: list[str] = []
        component = open_component(path, "", choices.variant, notes, checksums)
        copies = {file: file.name for file in _small_files(path, _BESIDE.get(component.network.class_name, ()), None)}
        return Model(path, None, (component,), copies, contract=lone_contract(path, component), notes=tuple(notes))
    inside = sorted(str(found) for end in ("pth", "pt") for found in path.glob(f"**/*.{end}"))[:3]
    advice = f"name the file: {', '.join(inside)}" if inside else "name another directory"
    raise FileNotFoundError(f"{path} has neither {INDEX} nor {CONFIG}, so it is no model; {advice}")


def is_run(path: Path) -> bool:
    """Whether a directory is a training run's."""
    return (path / INDEX).is_file() and (path / "checkpoints").is_dir()


def refuse(choices: Choices, path: Path, *names: str) -> None:
    """An option that would not be used is an error."""
    default = Choices()
    for name in names:
        if (value := getattr(choices, name)) != getattr(default, name):
            raise UserError(
                f"--{name.replace('_', '-')} {value} has no meaning for {path}, which has one set of weights; leave it "
                "out"
            )


def check_pipeline(pipeline: str | None) -> None:
    """Raises ``UserError`` for what is no pipeline of SANA-Video's weights."""
    if pipeline not in (None, *VIDEO_PIPELINES):
        raise UserError(f"--pipeline {pipeline} is not known here; allowed are {', '.join(VIDEO_PIPELINES)}")


def refuse_of_originals(choices: Choices, path: Path) -> None:
    """What is asked of original files alone is an error for a directory."""
    if choices.pipeline is not None:
        raise UserError(
            f"--pipeline {choices.pipeline} is for an original file, which may not say whether it is SANA-Video or "
            f"LongSANA; {path} is a directory: leave the option out"
        )
    if choices.revision is not None:
        raise UserError(
            f"--revision {choices.revision} is for an original file of SANA-WM; {path} has a config.json that says its "
            'own, "revision" where it is not legacy: leave the option out, or write it there'
        )


def _open_directory(path: Path, choices: Choices, checksums: bool) -> Model:
    refuse(choices, path, "image_size", "flow_shift")
    index = with_libraries(read_json(path / INDEX), path)
    if choices.variant is not None:
        check_variant(path, choices.variant)  # of the whole, not once more of every component
    components, copies, notes, failures = [], {}, [], {}
    for name, entry in index.items():
        if not isinstance(entry, list) or name.startswith("_") or not entry or entry[0] is None:
            continue
        folder = path / name
        if Path(name).name != name or name in (".", ".."):
            failures[name] = UserError(f"{path / INDEX} names the component {name!r}, which is no folder's name")
        elif name in _SMALL_FILES:
            found = _small_files(folder, _SMALL_FILES[name], notes)
            copies |= {file: f"{name}/{file.name}" for file in found}
            try:
                _check_small(name, folder, notes)
            except (UserError, FileNotFoundError) as error:
                failures[name] = error
        else:
            try:
                if is_without_weights(read_json(folder / CONFIG)):
                    copies[folder / CONFIG] = f"{name}/{CONFIG}"
                    notes.append(f"{name}: {entry[-1]}, which has no weights")
                    continue
                components.append(open_component(folder, name, choices.variant, notes, checksums))
            except (UserError, FileNotFoundError) as error:
                failures[name] = error
    copies |= {file: file.name for file in _small_files(path, _LICENSE_FILES, None)}
    contract = None
    try:
        contract = _contract(path, index, components)
    except (UserError, FileNotFoundError) as error:
        failures["contract"] = error
    if not components and not failures:
        failures["components"] = UserError(f"{path / INDEX} names no network; download the model again")
    return Model(path, index, tuple(components), copies, {}, contract, tuple(notes), failures)


def with_libraries(index: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The index of a model that a pipeline of ours has saved, as diffusers has one.

    Ours names neither the tokenizer nor the ControlNet that lie there, and no library that diffusers could load from.
    """
    named = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry[:1] == ["sana_jax"]}
    if not {"transformer", "text_encoder"} <= set(named):
        return dict(index)
    full = dict(index)
    for name, (_, class_name) in named.items():
        is_own = class_name in WITHOUT_WEIGHTS or (
            name == "scheduler" and index.get("_class_name") in GROWING_PIPELINES
        )  # diffusers has none of these
        if not is_own:
            full[name] = ["transformers" if stem_of(class_name) == TRANSFORMERS_STEM else "diffusers", class_name]
    if (path / "controlnet" / CONFIG).is_file():
        full.setdefault("controlnet", ["diffusers", class_of(read_json(path / "controlnet" / CONFIG))])
    settings = path / "tokenizer" / "tokenizer_config.json"
    if settings.parent.is_dir():
        given = read_json(settings).get("tokenizer_class") if settings.is_file() else None
        full.setdefault("tokenizer", ["transformers", given or "PreTrainedTokenizerFast"])
    return full


def index_of(model: Model) -> Mapping[str, Any]:
    """A model's index, of a training run too, whose transformer is a component of its own; empty where it has none."""
    if model.index is not None:
        return model.index
    return read_json(model.path / INDEX) if (model.path / INDEX).is_file() else {}


def open_component(
    directory: Path, folder: str, variant: str | None, notes: list[str], checksums: bool = True
) -> Component:
    """One component's directory, published or converted; ``notes`` gets what the user should know.

    Raises:
        FileNotFoundError: no configuration or no weights.
        UserError: a class that cannot be converted, or damaged files.
    """
    config = read_json(directory / CONFIG)
    converted = directory / CONVERTED
    if converted.is_dir():
        if variant is not None:
            raise UserError(f"--variant {variant}: {directory} is converted and has no variants; leave it out")
        if problem := find_damage(converted, checksums=checksums):
            raise CheckpointError(f"the weights in {converted} are damaged: {problem}; delete them and convert again")
        return open_saved(directory, folder, config, converted, "converted", directory / KEPT)
    file = find_weights_file(directory, stem_of(class_of(config)), variant, say=notes.append)
    source = SafetensorsSource(file)
    network = network_of(config, str(directory / CONFIG), source.tensors)
    problems = misfits(source, places(network.rules, network.abstract), network.ignored)
    if problems and (seen := looks_like(source.tensors)):
        notes.append(f"{folder or directory.name}: {seen}")
    return Component(folder, network, config, source, problems, source.files, "published")


def open_saved(
    directory: Path,
    folder: str,
    config: Mapping[str, Any],
    saved: Path,
    origin: str,
    kept_file: Path | None = None,
    *,
    branch: str | None = None,
    notes: list[str] | None = None,
) -> Component:
    """Weights that Orbax wrote, under their published names.

    ``branch`` is where they are among others that were trained together, which are named in ``notes``.
    """
    network = network_of(config, str(directory / CONFIG))
    files = tuple((file, file.stat().st_size) for file in sorted(saved.rglob("*")) if file.is_file())
    tree = lazy_saved_tree(saved)
    refuse_quantised(saved, tree)  # their tensors have no published names
    if branch is not None:
        if notes is not None and (left := sorted(tree.keys() - {branch})):
            notes.append(f"left out: {', '.join(left)}, which the run trains beside it")
        tree = tree.get(branch, {})
    problems = _tree_misfits(tree, network.abstract)
    if problems:
        return Component(folder, network, config, None, problems, files, origin)
    source: TensorSource = TreeSource(tree, network.rules, str(saved))
    if kept_file is not None and kept_file.is_file():
        kept = SafetensorsSource(kept_file)
        source = JoinedSource(source, kept)
        files += kept.files
    elif class_of(config) == "AutoencoderDC":
        source = JoinedSource(source, ZeroCounts(source))
    return Component(folder, network, config, source, problems, files, origin)


class JoinedSource:
    """The tensors of two sources."""

    def __init__(self, first: TensorSource, second: TensorSource) -> None:
        if both := first.tensors.keys() & second.tensors.keys():
            raise CheckpointError(f"{min(both)} is in {first.location} and in {second.location}; convert again")
        self.location = first.location
        self.tensors = {**first.tensors, **second.tensors}
        self._first, self._second = first, second

    def read(self, name: str) -> Any:
        """One tensor."""
        return (self._second if name in self._second.tensors else self._first).read(name)


class ZeroCounts:
    """The counts of batches that PyTorch's batch norms want, for weights that came without: zero, as untrained."""

    def __init__(self, source: TensorSource) -> None:
        self.location = source.location
        stems = [name.removesuffix("running_mean") for name in source.tensors if name.endswith(".running_mean")]
        self.tensors = {f"{stem}num_batches_tracked": TensorInfo(np.dtype(np.int64), ()) for stem in stems}

    def read(self, name: str) -> np.ndarray:
        """Zero."""
        return np.zeros((), np.int64)


def _tree_misfits(saved: Any, abstract: Any) -> Misfits:
    there, wanted = flatten(saved), flatten(abstract)
    return Misfits(
        tuple(f"{'/'.join(path)} {list(wanted[path].shape)}" for path in sorted(wanted.keys() - there.keys())),
        tuple(f"{'/'.join(path)} {describe_array(there[path])}" for path in sorted(there.keys() - wanted.keys())),
        tuple(
            f"{'/'.join(path)} {describe_array(there[path])}, not {list(leaf.shape)}"
            for path, leaf in wanted.items()
            if path in there and tuple(there[path].shape) != tuple(leaf.shape)
        ),
    )


def has_own_components(index: Mapping[str, Any]) -> bool:
    """Whether an index names a component of our training runs that is described in full, and has no weights."""
    return any(isinstance(entry, list) and entry[-1:] and entry[-1] in WITHOUT_WEIGHTS for entry in index.values())


def _small_files(folder: Path, names: Collection[str], notes: list[str] | None) -> list[Path]:
    """Those of ``names`` that are there; what else lies in the folder is named in ``notes``."""
    found = [folder / name for name in names if (folder / name).is_file()]
    if notes is not None and folder.is_dir():
        others = sorted(entry.name for entry in folder.iterdir() if entry.name not in names)
        if others:
            notes.append(f"{folder.name}: left out {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}")
    return found


def _check_small(name: str, folder: Path, notes: list[str]) -> None:
    """Raises what sampling would of a folder without weights: some of a tokenizer's files do not make one."""
    if name == "tokenizer":
        try:
            PromptTokenizer.from_directory(folder, say=notes.append)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise CheckpointError(f"{folder} can't be read ({error.strerror}); download it again") from error
    elif not (folder / SCHEDULER_CONFIG).is_file():  # what stands in it is read for the contract
        raise FileNotFoundError(f"{folder / SCHEDULER_CONFIG} is missing; download it again")


def _contract(path: Path, index: Mapping[str, Any], components: list[Component]) -> Contract | None:
    if "contract" in index:
        return Contract.from_dict(index["contract"], f"contract of {path / INDEX}")
    parts = {component.folder: component for component in components}
    if "transformer" not in parts or has_own_components(index):
        return None
    scheduler = path / "scheduler" / SCHEDULER_CONFIG
    named = [part.get("_name_or_path") for part in (index, parts["transformer"].config)]
    return contract_of(
        parts["transformer"].network.config,
        names=[*names_of(path), *(name for name in named if isinstance(name, str))],
        stored={name: _dtypes(component) for name, component in parts.items()},
        scheduler=read_json(scheduler) if scheduler.is_file() else None,
        license=license_of(path),
    )


def lone_contract(path: Path, component: Component) -> Contract | None:
    """What a transformer needs that stands alone; None where its class says nothing."""
    if component.network.class_name != "SanaTransformer2DModel":
        return None
    named = component.config.get("_name_or_path")
    names = [*names_of(path), *([named] if isinstance(named, str) else [])]
    return contract_of(component.network.config, names=names, stored={"transformer": _dtypes(component)})


def _dtypes(component: Component) -> set[str]:
    return {info.dtype.name for info in component.source.tensors.values()} if component.source is not None else set()
