"""From a model's directory to components that a pipeline can use, and back."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels.typing import PyTree
from sana_jax.autoencoders import Autoencoder
from sana_jax.contract import Contract
from sana_jax.diffusion.samplers import Sampler
from sana_jax.dtypes import parse_dtype
from sana_jax.errors import CheckpointError, UserError
from sana_jax.files import write_json
from sana_jax.models.controlnet import SanaControlNet, SanaControlNetConfig, init_controlnet_params
from sana_jax.pipelines.base_model_file import BaseModelFile
from sana_jax.pipelines.families import Transformer, abstract_params, family_of, make_transformer, rules_of
from sana_jax.pipelines.model_directory import (
    ModelDirectory,
    SamplingDefaults,
    read_controlnet_config,
    read_model_directory,
    write_model_directory,
)
from sana_jax.quantization.choice import Quantization, QuantizationChoice, parse_quantization
from sana_jax.quantization.weights import quantized_weights
from sana_jax.text_encoders import TextEncoder
from sana_jax.weights import checkpoint_structure, choose_checkpoint, load_checkpoint_params, save_params
from sana_jax.weights.components import CONVERTED, DIFFUSERS_STEM, Resident, open_component
from sana_jax.weights.identity import weights_id
from sana_jax.weights.safetensors_files import (
    SafetensorsSource,
    find_pickle,
    find_weights_file,
    has_variant,
    no_variant_line,
)
from sana_jax.weights.tables.sana import controlnet_rules

__all__ = [
    "OpenModel",
    "abstract_params",
    "files_to_fetch",
    "find_model",
    "model_weights_id",
    "open_model",
    "open_transformer_weights",
    "save_model",
]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """The components of a model; weights are read when they are needed."""

    path: pathlib.Path
    transformer: Transformer
    transformer_weights: Resident
    sampler: Sampler
    text_encoder: TextEncoder
    autoencoder: Autoencoder
    defaults: SamplingDefaults
    checkpoint_step: int | None = None
    weights: str | None = None
    contract: Contract | None = None
    checkpoint_id: str | None = None
    controlnet: SanaControlNet | None = None
    controlnet_weights: Resident | None = None
    trained_from: BaseModelFile | None = None
    trained: PyTree | None = None
    """What a run has trained beside its base model, as its checkpoint holds it."""


def open_model(
    path: str | os.PathLike[str],
    pipeline: str,
    *,
    dtype: Any = None,
    variant: str | None = None,
    weights: str = "auto",
    checkpoint_step: int | None = None,
    emulate_fp16_saturation: bool = False,
    controlnet: str | os.PathLike[str] | None = None,
    quantization: QuantizationChoice = None,
) -> OpenModel:
    """Opens a model for a pipeline; arguments and errors as in ``ImagePipeline.from_pretrained``.

    ``controlnet`` names a ControlNet's own directory, for a model that comes without one.
    """
    chosen = parse_quantization(quantization)
    directory = find_model(path, variant)
    if controlnet is not None and (directory / "controlnet").is_dir():
        raise UserError(
            f"{directory} has a ControlNet of its own, so controlnet {os.fspath(controlnet)} would not be used; leave "
            "it out, or name a model without one"
        )
    if controlnet is not None:
        check_controlnet_directory(find_model(controlnet, variant))
    base = "SanaPipeline" if controlnet is not None else pipeline
    model = read_model_directory(directory, base, variant=variant)
    if model.trained_from is not None:
        variant = variant or model.trained_from.variant
    compute_dtype = _compute_dtype(dtype, model.contract, emulate_fp16_saturation)
    transformer = make_transformer(model.transformer_config, compute_dtype, emulate_fp16_saturation)
    kind = "whole" if model.trained_from is None else model.trained_from.kind
    if kind == "world_chunk_causal":
        print(f"{model.path} has been trained in causal blocks, and is sampled in them")
        kind = "whole"
    trained = None
    if kind == "chunk_causal":
        raise UserError(
            f"{model.path} has been trained in causal blocks, for ODE initialisation to begin with, and no pipeline "
            "samples it by itself: python -m train.main longsana_ode --model RUN"
        )
    if kind != "whole":
        trained, step, which = _trained_part(model, weights, checkpoint_step)
    if kind in ("sprint", "self_forcing"):
        params = jax.tree.map(lambda leaf: leaf.astype(compute_dtype), trained["transformer"])
        resident = Resident.of("transformer", params)
    else:
        choice = (weights, checkpoint_step) if kind == "whole" else ("auto", None)
        abstract = abstract_params(transformer, compute_dtype)
        resident, base_step, base_which = open_transformer_weights(
            model.transformer_source, abstract, variant=variant, weights=choice[0], checkpoint_step=choice[1]
        )
        if kind == "whole":
            step, which = base_step, base_which
    network = network_weights = None
    if kind == "controlnet":
        shape = SanaControlNetConfig(**model.trained_from.settings["controlnet"])
        network = SanaControlNet(shape, dtype=compute_dtype, fp16_saturation=emulate_fp16_saturation)
        network_weights = Resident.of("controlnet", jax.tree.map(lambda leaf: leaf.astype(compute_dtype), trained))
    elif pipeline == "SanaControlNetPipeline":
        folder = find_model(controlnet, variant) if controlnet is not None else model.path / "controlnet"
        if (folder / "controlnet").is_dir():
            folder = folder / "controlnet"
        if controlnet is not None:
            variant = _variant_beside(folder, variant)
        network, network_weights = _open_controlnet(folder, compute_dtype, variant, emulate_fp16_saturation)
    opened = OpenModel(
        model.path,
        transformer,
        resident,
        model.sampler,
        model.text_encoder,
        model.autoencoder,
        model.defaults,
        step,
        which,
        model.contract,
        weights_id(model.path / "transformer" if step is None else model.path / "checkpoints" / str(step)),
        network,
        network_weights,
        model.trained_from,
        trained,
    )
    return quantized_model(opened, chosen)


def quantized_model(model: OpenModel, chosen: Mapping[str, Quantization]) -> OpenModel:
    """The model with its networks' weights quantised as chosen; a line is printed for each.

    Raises:
        UserError: a network that the model does not have, or what ``quantized_weights`` refuses.
    """
    changes: dict[str, Any] = {}
    for network, choice in chosen.items():
        if network == "transformer":
            changes["transformer_weights"] = quantized_weights(model.transformer_weights, choice, network)
            continue
        component = getattr(model, network, None)
        weights = getattr(component, "weights", None)
        if not isinstance(weights, Resident) or weights.abstract is None:
            raise UserError(
                f"quantization {network}={choice.format}: {model.path} has no such network whose weights could be "
                "quantised; leave it out"
            )
        weights = quantized_weights(weights, choice, network)
        if dataclasses.is_dataclass(component):
            changes[network] = dataclasses.replace(component, weights=weights)
        else:
            component.weights = weights
    return dataclasses.replace(model, **changes)


def _trained_part(model: ModelDirectory, weights: str, checkpoint_step: int | None) -> tuple[PyTree, int, str]:
    """What a run has trained beside its base model, the step and which of the two sets of weights it is."""
    if model.transformer_source is not model:
        model.trained_from.check(model_weights_id(model.transformer_source), model.path)
    abstract = checkpoint_structure(model.path / "checkpoints", which=weights, step=checkpoint_step)
    return load_checkpoint_params(model.path / "checkpoints", abstract, which=weights, step=checkpoint_step)


def model_weights_id(model: ModelDirectory, checkpoint_step: int | None = None) -> str:
    """A short name for the bytes of the transformer's weights; of a training run, of a checkpoint (the newest)."""
    checkpoints = model.path / "checkpoints"
    if not checkpoints.is_dir():
        return weights_id(model.path / "transformer")
    return weights_id(checkpoints / str(choose_checkpoint(checkpoints, checkpoint_step)))


def _compute_dtype(dtype: Any, contract: Contract | None, emulate_fp16_saturation: bool) -> Any:
    """The transformer's dtype, once the contract allows it."""
    if dtype is None and contract is not None:
        dtype = contract.compute_dtype
    parsed = jnp.float32 if dtype is None else parse_dtype(dtype)
    if contract is not None and (notice := contract.check(jnp.dtype(parsed).name, emulate_fp16_saturation)):
        print(notice)
    return parsed


def open_transformer_weights(
    model: ModelDirectory,
    abstract: PyTree,
    *,
    variant: str | None = None,
    weights: str = "auto",
    checkpoint_step: int | None = None,
) -> tuple[Resident, int | None, str | None]:
    """The weights, and of a training run their step and which of the two sets they are.

    ``abstract`` is the transformer's parameters as shapes: weights are cast to its dtypes and go to its shardings. The
    other arguments are those of ``ImagePipeline.from_pretrained``.

    Raises:
        UserError: an option of training runs for another model, or the other way round.
        FileNotFoundError, CheckpointError: the weights are missing, damaged, or do not fit.
    """
    checkpoints, component = model.path / "checkpoints", model.path / "transformer"
    if checkpoints.is_dir():
        if variant is not None and model.trained_from is None:  # else it is of the base model's files
            raise UserError(f"{model.path} is a training run and has no variants; leave variant={variant!r} out")
        if model.trained_from is not None and model.trained_from.kind == "self_forcing":
            return _open_generator(checkpoints, abstract, weights, checkpoint_step)
        params, step, which = load_checkpoint_params(checkpoints, abstract, which=weights, step=checkpoint_step)
        return Resident.of("transformer", params), step, which
    # weights that are there and not read are named where they are looked for
    there = any(component.glob("*.safetensors*")) or find_pickle(component)
    if not (component / CONVERTED).is_dir() and not there:
        raise CheckpointError(
            f"{model.path} has no weights; allowed are {checkpoints.name}/<step> (a training run), transformer/"
            f"{CONVERTED} (converted) or transformer/*.safetensors (published): train until the first checkpoint, or "
            "copy the weights there"
        )
    if weights == "ema" or checkpoint_step is not None:
        raise UserError(
            f"{model.path} is not a training run and has one set of weights; weights={weights!r}, "
            f"checkpoint_step={checkpoint_step} cannot be chosen: leave both out"
        )
    config, names = model.transformer_config, ()
    if not (component / CONVERTED).is_dir():
        names = SafetensorsSource(find_weights_file(component, DIFFUSERS_STEM, variant)).tensors
    rules, ignored = rules_of(config, names), family_of(config).ignored
    return open_component(component, rules, abstract, variant=variant, ignored=ignored), None, None


def _open_generator(
    checkpoints: pathlib.Path, abstract: PyTree, weights: str, checkpoint_step: int | None
) -> tuple[Resident, int, str]:
    """The network that self-forcing trains for sampling; the others of its checkpoint are read and let go of."""
    structure = checkpoint_structure(checkpoints, which=weights, step=checkpoint_step)
    params, step, which = load_checkpoint_params(
        checkpoints, {**structure, "transformer": abstract}, which=weights, step=checkpoint_step
    )
    return Resident.of("transformer", params["transformer"]), step, which


def check_controlnet_directory(directory: pathlib.Path) -> None:
    """Raises ``UserError`` for a training run or a model without a ControlNet in place of a ControlNet's directory."""
    if (directory / "controlnet").is_dir():
        return
    trained = BaseModelFile.read(directory)
    if trained is not None and trained.kind == "controlnet":
        raise UserError(
            f"{directory} is a training run of a ControlNet, which comes with its base model; name it as the model, "
            "and leave controlnet out"
        )
    is_run = trained is not None or (directory / "checkpoints").is_dir()
    if is_run or (directory / "model_index.json").is_file():
        raise UserError(
            f"{directory} is {'a training run' if is_run else 'a model directory'} and no ControlNet; name the "
            "directory of a published ControlNet, or give a ControlNet's training run as the model"
        )


def _open_controlnet(
    directory: pathlib.Path, dtype: Any, variant: str | None, fp16_saturation: bool
) -> tuple[SanaControlNet, Resident]:
    controlnet = SanaControlNet(read_controlnet_config(directory), dtype=dtype, fp16_saturation=fp16_saturation)
    shapes = jax.eval_shape(lambda: init_controlnet_params(controlnet, jax.random.key(0)))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    return controlnet, open_component(directory, controlnet_rules(controlnet.config), abstract, variant=variant)


def _variant_beside(directory: pathlib.Path, variant: str | None) -> str | None:
    """The variant of a ControlNet that is named beside its model, which has it: None, said, where it has not."""
    if variant is None or (directory / CONVERTED).is_dir() or has_variant(directory, variant):
        return variant
    print(no_variant_line(directory, variant, find_weights_file(directory, DIFFUSERS_STEM)))
    return None


def save_model(pipeline: Any, path: pathlib.Path) -> None:
    """Writes a pipeline's configurations and weights as a converted model directory, the index last."""
    networks = {
        "transformer": pipeline.transformer_weights,
        "text_encoder": getattr(pipeline.text_encoder, "weights", None),
        "vae": getattr(pipeline.autoencoder, "weights", None),
        "controlnet": getattr(pipeline, "controlnet_weights", None),
    }
    for folder, weights in networks.items():
        if weights is not None:
            was_loaded = weights.loaded
            save_params(path / folder / CONVERTED, weights.params)
            if not was_loaded:
                weights.free()
    if tokenizer := getattr(pipeline.text_encoder, "tokenizer", None):
        shutil.copytree(pathlib.Path(tokenizer.location).parent, path / "tokenizer")
    if networks["controlnet"] is not None:
        write_json(path / "controlnet" / "config.json", pipeline.controlnet.config.to_dict())
    write_model_directory(
        path,
        transformer_config=pipeline.transformer.config,
        sampler=pipeline.sampler,
        text_encoder=pipeline.text_encoder,
        autoencoder=pipeline.autoencoder,
        defaults=pipeline.defaults,
        pipeline=pipeline.class_name,
        contract=pipeline.contract,
    )


def find_model(path: str | os.PathLike[str], variant: str | None = None) -> pathlib.Path:
    """The directory of a model: the local path, or a download of ``organisation/name`` from the Hub.

    A local path never touches the network; nor does ``runs/...``, where training leaves its models. Of the weight files
    only those of the variant are downloaded.

    Raises:
        FileNotFoundError: neither a directory here nor to be had from the Hub.
        UserError: no path, or a model on the Hub without the variant.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"model {path!r} is not allowed; give a directory's path, or organisation/name on the Hub")
    directory = pathlib.Path(path)
    name = os.fspath(path)
    here = directory.exists() or (directory.parent.is_dir() and directory.parent != pathlib.Path("."))
    if here or not _HUB_NAME.fullmatch(name) or name.startswith((".", "runs/")):
        return directory
    print(f"{name}: no such directory here, looking for it on the Hub")
    try:
        from huggingface_hub import HfApi, snapshot_download

        # Not list_repo_files, which tries again and again for half a minute where there is no network.
        info = HfApi().model_info(name, timeout=10)
        files = files_to_fetch([file.rfilename for file in info.siblings], variant)
        return pathlib.Path(snapshot_download(name, allow_patterns=files, revision=info.sha))
    except UserError as error:
        raise UserError(f"{name} on the Hub: {error}") from None
    except ImportError as error:
        reason = "huggingface_hub is not installed" if error.name == "huggingface_hub" else f"ImportError: {error}"
    except Exception as error:  # the library raises a dozen kinds, from sockets to JSON
        reason = type(error).__name__
        with contextlib.suppress(Exception):
            cached = pathlib.Path(snapshot_download(name, local_files_only=True))
            print(f"{name}: not to be had from the Hub now ({reason}); using what was downloaded before, {cached}")
            return cached
    raise FileNotFoundError(
        f"model {name} is neither a directory here nor to be had from the Hub ({reason}); download it where there is a "
        "network and name its directory, or train one: python -m train.main makes runs/digits"
    )


def files_to_fetch(names: Sequence[str], variant: str | None) -> list[str]:
    """Of a repository's files, those that a model directory needs: no other variants, no pickles, no pictures.

    Where a component has only another variant than the one asked for, that one is taken.

    Raises:
        UserError: no component of a model has the variant, so that nothing is downloaded in vain.
    """
    kept = [name for name in names if name.endswith((".json", ".txt", "tokenizer.model", "README.md"))]
    weights: dict[str, dict[str, list[str]]] = {}
    whole_model = "model_index.json" in names  # whose root may hold copies of weights that nothing reads
    for name in names:
        folder, _, file = name.rpartition("/")
        if (folder or not whole_model) and file.endswith(".safetensors"):
            found = re.fullmatch(r"[\w-]+?(?:\.([a-z]+\d*))?(?:-\d+-of-\d+)?\.safetensors", file)
            weights.setdefault(folder, {}).setdefault((found and found[1]) or "", []).append(name)
    there = sorted({kind for variants in weights.values() for kind in variants})
    if variant is not None and whole_model and there and variant not in there:
        raise UserError(
            f"no component of the model has the variant {variant!r}; allowed are "
            f"{', '.join(kind or 'the plain files' for kind in there)}: choose one of them, or leave the variant out"
        )
    for variants in weights.values():
        kept += variants.get(variant or "") or variants.get("") or next(iter(variants.values()))
    return kept
