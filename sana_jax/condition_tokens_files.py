"""Trained encoders of condition tokens as files, beside a LoRA or in a model directory.

::

    condition_tokens.safetensors   parameters, ``<name>.linear_1.kernel`` and so on, in our layout (in, out)
    condition_tokens.json          what the encoders are; written last

diffusers has no such tokens and cannot load these files; a LoRA beside them loads there, and acts without them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kernels.typing import PyTree
from sana_jax.errors import CheckpointError, UserError
from sana_jax.files import read_json, write_json
from sana_jax.models.condition_tokens import ConditionEncoders, TokenEncoderConfig, init_tokens
from sana_jax.weights.messages import describe_array, first_few
from sana_jax.weights.rules import flatten
from sana_jax.weights.safetensors_files import SafetensorsSource, TensorInfo, write_safetensors

TOKENS = "tokens"  # the tree of their parameters in a run's checkpoints, and its entry in ``base_model.json``
WEIGHTS_NAME, CONFIG_NAME = "condition_tokens.safetensors", "condition_tokens.json"
_CLASS_NAME = "ConditionTokens"
_NOTE = "condition tokens of sana_jax for a SANA transformer; diffusers has no such tokens and cannot load this file"
_FIELDS = ("_class_name", "caption_channels", "inner_dim", "encoders", "image_encoders")


class SavedTokens(NamedTuple):
    """What the files hold.

    Attributes:
        encoders: the encoders.
        params: their parameters.
        image_encoders: by the names of conditions that are embeddings of pictures: ``directory``, ``id`` and the
            options of ``SiglipImageEncoder.from_directory`` that made them.
    """

    encoders: ConditionEncoders
    params: PyTree
    image_encoders: Mapping[str, Mapping[str, Any]] = {}


def save_condition_tokens(directory: str | os.PathLike[str], saved: SavedTokens) -> None:
    """Writes both files; each appears whole or not at all.

    Raises:
        OSError: the directory cannot be written to.
    """
    directory, config = Path(directory), tokens_to_dict(saved.encoders, saved.image_encoders)
    arrays = {".".join(path): np.asarray(leaf) for path, leaf in flatten(saved.params).items()}
    infos = {name: TensorInfo(array.dtype, array.shape) for name, array in arrays.items()}
    metadata = {"format": "sana_jax", "note": _NOTE, "config": json.dumps(config)}
    write_safetensors(directory / WEIGHTS_NAME, infos, arrays.items(), metadata)
    write_json(directory / CONFIG_NAME, config)


def has_condition_tokens(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory has the files."""
    return (Path(directory) / CONFIG_NAME).is_file()


def load_condition_tokens(directory: str | os.PathLike[str]) -> SavedTokens:
    """Reads both files.

    Raises:
        FileNotFoundError: one of them is missing.
        UserError: a configuration that is damaged.
        CheckpointError: weights that are damaged, do not fit, or belong to another configuration.
    """
    directory = Path(directory)
    if not has_condition_tokens(directory):
        raise FileNotFoundError(
            f"{directory / CONFIG_NAME} is missing; name the directory that training has written condition tokens to"
        )
    path = directory / CONFIG_NAME
    values = read_json(path)
    encoders, image_encoders = tokens_from_dict(values, str(path))
    source = SafetensorsSource(directory / WEIGHTS_NAME)
    try:
        same = json.loads(source.metadata.get("config", "null")) == values
    except ValueError:
        same = False
    if not same:
        raise CheckpointError(
            f"{source.location} was not written together with {path.name}: its own configuration is another; copy both "
            "files from one directory"
        )
    abstract = jax.eval_shape(lambda: init_tokens(encoders, jax.random.key(0)))
    wanted = {".".join(leaf_path): leaf for leaf_path, leaf in flatten(abstract).items()}
    wrong = [f"{name} is missing" for name in wanted if name not in source.tensors]
    wrong += [f"{name} is not wanted" for name in source.tensors if name not in wanted]
    wrong += [
        f"{name} {describe_array(source.tensors[name])}, not {list(leaf.shape)}"
        for name, leaf in wanted.items()
        if name in source.tensors
        and (source.tensors[name].shape != leaf.shape or source.tensors[name].dtype != leaf.dtype)
    ]
    if wrong:
        raise CheckpointError(
            f"{source.location} does not fit {path.name}: {first_few(wrong, 'tensors')}; copy it again"
        )
    params = jax.tree_util.tree_map_with_path(
        lambda leaf_path, _: source.read(".".join(key.key for key in leaf_path)), abstract
    )
    return SavedTokens(encoders, params, image_encoders)


def tokens_to_dict(encoders: ConditionEncoders, image_encoders: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What encoders are, without their parameters: JSON-able; arguments as in ``SavedTokens``."""
    config = {
        "_class_name": _CLASS_NAME,
        "caption_channels": encoders.caption_channels,
        "inner_dim": encoders.inner_dim,
        "encoders": {name: dataclasses.asdict(encoder) for name, encoder in encoders.encoders.items()},
        "image_encoders": {name: dict(values) for name, values in image_encoders.items()},
    }
    return json.loads(json.dumps(config))  # as it will be read: tuples are lists there


def tokens_from_dict(values: Mapping[str, Any], source: str) -> tuple[ConditionEncoders, dict[str, Mapping[str, Any]]]:
    """The inverse of ``tokens_to_dict``; ``source`` names it in errors.

    Raises:
        UserError: values that are damaged.
    """
    sizes = [values.get(name) for name in ("caption_channels", "inner_dim")]
    good = (
        set(values) == set(_FIELDS)
        and values["_class_name"] == _CLASS_NAME
        and all(type(size) is int and 1 <= size <= 1 << 16 for size in sizes)
        and isinstance(values["encoders"], dict)
        and isinstance(values["image_encoders"], dict)
        and all(name in values["encoders"] and isinstance(v, dict) for name, v in values["image_encoders"].items())
    )
    if not good:
        raise UserError(
            f"{source} has {', '.join(sorted(values)) or 'nothing'}; it must have {', '.join(_FIELDS)} as training "
            "writes them: copy it again"
        )
    encoders = {
        name: TokenEncoderConfig.from_dict(encoder, f"{source}: encoders.{name}")
        for name, encoder in values["encoders"].items()
    }
    return ConditionEncoders(encoders, *sizes), values["image_encoders"]
