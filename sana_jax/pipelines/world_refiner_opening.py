"""A directory of SANA-WM's refiner to its networks, and to an autoencoder where there is one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kernels.typing import PyTree
from sana_jax.autoencoders import VideoAutoencoder, load_autoencoder
from sana_jax.contract import infer_contract, stored_dtypes
from sana_jax.diffusion.samplers import FlowEuler, from_scheduler_config
from sana_jax.dtypes import parse_dtype
from sana_jax.errors import UserError
from sana_jax.files import read_json
from sana_jax.models import ltx2, ltx2_connectors
from sana_jax.models.ltx2 import LTX2VideoTransformer
from sana_jax.models.ltx2_config import LTX2_CLASS, REFINER_CLASS, LTX2Config
from sana_jax.models.ltx2_connectors import LTX2Connectors, LTX2ConnectorsConfig
from sana_jax.pipelines.memory_plan import parse_memory, refiner_choices, refiner_frame_bytes
from sana_jax.pipelines.opening import find_model
from sana_jax.pipelines.residency import Residency
from sana_jax.pipelines.world_refiner_streamed import BLOCKS
from sana_jax.quantization.choice import Quantization, QuantizationChoice, parse_quantization
from sana_jax.quantization.trees import plain_dtypes
from sana_jax.quantization.weights import quantized_weights
from sana_jax.text_encoders.gemma3 import Gemma3TextEncoder
from sana_jax.weights.components import CONVERTED, DIFFUSERS_STEM, Resident, open_component
from sana_jax.weights.converted import lazy_saved_tree
from sana_jax.weights.identity import weights_id
from sana_jax.weights.rules import Rule
from sana_jax.weights.streamed import StreamedResident
from sana_jax.weights.tables.ltx2 import AUDIO, connectors_rules, transformer_rules
from sana_jax.weights.trees import abstract_tree

PUBLISHED_CLASSES = ("SanaWMLTX2Refiner", "SanaWMRefiner")
# (what was opened, network -> how it is quantised) -> as ``sana_jax.pipelines.memory_plan.refiner_choices``
Fit = Callable[[Mapping[str, Any], Mapping[str, Quantization]], Mapping[str, Any]]
_FRAME_SIZE = (704, 1280)  # of the published first stage, in pixels
_FLOAT16 = {"float16": "the refiner's activations overflow in it; bfloat16 is recommended"}


def refiner_plan(
    memory: str | None, residency: Residency | None, frame_size: tuple[int, int] | None, held_bytes: int
) -> tuple[Fit | None, Residency]:
    """What ``open_refiner`` is to fit, and the residency; arguments as in ``SanaWMRefiner.from_pretrained``.

    Raises:
        UserError: arguments that exclude one another, or would not be used.
    """
    if memory is None:
        if frame_size is not None or held_bytes:
            raise UserError("frame_size and held_bytes would not be used without memory; name it, or leave them out")
        return None, residency or "text_encoder_freed"
    if residency is not None:
        raise UserError(
            f"residency {residency!r} and memory {memory!r}: memory chooses one_at_a_time itself; leave one of them out"
        )
    parse_memory(memory)

    def fit(found: Mapping[str, Any], chosen: Mapping[str, Quantization]) -> Mapping[str, Any]:
        frame_bytes = refiner_frame_bytes(found["transformer"], frame_size or _FRAME_SIZE)
        return refiner_choices(found, memory, chosen, frame_bytes=frame_bytes, held_bytes=held_bytes)

    return fit, "one_at_a_time"


def open_refiner(
    path: str | os.PathLike[str],
    *,
    dtype: Any,
    variant: str | None,
    autoencoder: VideoAutoencoder | None,
    stream_blocks: bool = False,
    quantization: QuantizationChoice = None,
    fit: Fit | None = None,
) -> dict[str, Any]:
    """What ``SanaWMRefiner`` is made of; arguments as in ``SanaWMRefiner.from_pretrained``.

    All configurations are read and all weights compared with them; the weights themselves are read later. ``fit``, of
    ``refiner_plan``, says what else is quantised and whether blocks are streamed.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        UserError: a file is damaged, a value is not allowed, or the networks do not belong together.
        CheckpointError: weights are missing, damaged, or do not fit.
    """
    chosen = parse_quantization(quantization)
    if "autoencoder" in chosen:
        raise UserError(
            f"quantization autoencoder={chosen['autoencoder'].format}: the refiner's autoencoder is convolutions, "
            "which are not quantised; leave it out"
        )
    if dtype is not None:
        parse_dtype(dtype, "dtype", _FLOAT16)
    directory = find_model(path, variant)
    index = _index(directory)
    _check_scheduler(directory / "scheduler" / "scheduler_config.json")
    config = LTX2Config.from_dict(_component(directory, "transformer", (REFINER_CLASS, LTX2_CLASS)))
    contract = infer_contract(directory, variant)
    if dtype is not None:
        contract.check(jnp.dtype(parse_dtype(dtype)).name)
    transformer_dtype = _dtype(dtype, directory / "transformer", variant)
    transformer = LTX2VideoTransformer(config, dtype=transformer_dtype)
    connectors_config = LTX2ConnectorsConfig.from_dict(
        _component(directory, "connectors", (ltx2_connectors.CLASS_NAME,))
    )
    connectors_dtype = _dtype(dtype, directory / "connectors", variant)
    connectors = LTX2Connectors(connectors_config, dtype=connectors_dtype)
    text_encoder = Gemma3TextEncoder.from_directory(directory, dtype=dtype, variant=variant)
    length = index.get("text_max_sequence_length", text_encoder.max_length)
    if autoencoder is None and (directory / "vae" / "config.json").is_file():
        autoencoder = load_autoencoder(directory / "vae", variant=variant)
    shapes = jax.eval_shape(lambda: ltx2.init_params(transformer, jax.random.key(0)))
    connectors_shapes = jax.eval_shape(lambda: ltx2_connectors.init_params(connectors, jax.random.key(0)))
    found = {
        "transformer": transformer,
        "params": _open(
            directory / "transformer",
            transformer_rules(config),
            shapes,
            transformer_dtype,
            variant,
            stacked=BLOCKS if stream_blocks else None,
        ),
        "connectors": connectors,
        "connectors_params": _open(
            directory / "connectors",
            connectors_rules(connectors_config),
            connectors_shapes,
            connectors_dtype,
            variant,
        ),
        "text_encoder": dataclasses.replace(text_encoder, max_length=length),
        "autoencoder": autoencoder,
        "contract": contract,
        "weights": {part: weights_id(directory / part) for part in ("transformer", "connectors", "text_encoder")},
    }
    if fit is not None:
        fitted = fit(found, chosen)
        chosen, whole = fitted["quantization"], found["params"]
        if fitted["stream_blocks"] and not isinstance(whole, StreamedResident):
            found["params"] = StreamedResident(whole.name, whole.abstract, BLOCKS, whole.open_tree)
            found["params"].directory = whole.directory
    for network, choice in chosen.items():
        if network == "text_encoder":
            weights = quantized_weights(found[network].weights, choice, network)
            found[network] = dataclasses.replace(found[network], weights=weights)
        else:
            name = {"transformer": "params", "connectors": "connectors_params"}[network]
            found[name] = quantized_weights(found[name], choice, network)
    return found


def _index(directory: Path) -> Mapping[str, Any]:
    path = directory / "model_index.json"
    index = read_json(path)
    if index.get("_class_name") not in PUBLISHED_CLASSES:
        raise UserError(
            f"{path} has _class_name {index.get('_class_name')!r}; SanaWMRefiner allows "
            f"{' or '.join(PUBLISHED_CLASSES)}: name the refiner's directory, which is another than SANA-WM's"
        )
    return index


def _component(directory: Path, folder: str, classes: Sequence[str]) -> dict[str, Any]:
    path = directory / folder / "config.json"
    config = read_json(path)
    if config.get("_class_name", classes[0]) not in classes:
        raise UserError(
            f"{path} has _class_name {config['_class_name']!r}; allowed is {' or '.join(classes)}: choose a refiner of "
            "SANA-WM"
        )
    return config


def _check_scheduler(path: Path) -> None:
    """Raises ``UserError`` for a scheduler that would not leave the noise levels as they are given."""
    try:
        sampler = from_scheduler_config(read_json(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if sampler != FlowEuler():
        raise UserError(
            f"{path} describes {sampler}; allowed is {FlowEuler()}, for the refiner's noise levels are used as they "
            "are listed: download it again"
        )


def _dtype(dtype: Any, directory: Path, variant: str | None) -> Any:
    """A given dtype, or float32 where all weights are stored so, else bfloat16."""
    if dtype is not None:
        return parse_dtype(dtype, "dtype", _FLOAT16)
    if (directory / CONVERTED).is_dir():
        stored = plain_dtypes(lazy_saved_tree(directory / CONVERTED))
    else:
        stored = stored_dtypes(directory, DIFFUSERS_STEM, variant)
    if "float16" in stored:
        print(
            f"{directory} is stored in float16, in which the refiner overflows; it runs in bfloat16. dtype='float32' "
            "keeps every bit"
        )
    return jnp.float32 if stored == {"float32"} else jnp.bfloat16


def _open(
    directory: Path,
    rules: Sequence[Rule],
    shapes: PyTree,
    dtype: Any,
    variant: str | None,
    stacked: str | None = None,
) -> Resident:
    abstract = abstract_tree(shapes, dtype)
    return open_component(directory, rules, abstract, variant=variant, ignored=AUDIO, streamed=stacked)
