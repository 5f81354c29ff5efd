"""Reads one component's ``config.json`` and makes what its ``_class_name`` (or transformers' ``model_type``) names."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from sana_jax.errors import UserError
from sana_jax.files import read_json


def load_from_config(directory: str | pathlib.Path, loaders: Mapping[str, Callable[[dict[str, Any]], Any]]) -> Any:
    """Reads ``directory/config.json`` and hands it to the loader that its ``_class_name`` names.

    Configurations that transformers has written have no ``_class_name``; their ``model_type`` takes its place.

    Raises:
        FileNotFoundError: no ``config.json`` there.
        UserError: it is not JSON, or names a class that is not among ``loaders``.
    """
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; a model directory has it: name a directory that python -m train.main has written"
        )
    config = read_json(path)
    key = "_class_name" if "_class_name" in config else "model_type"
    name = config.get(key)
    if not isinstance(name, str) or name not in loaders:
        raise UserError(
            f"{path} has {key} {name!r}; allowed here: {', '.join(sorted(loaders))}; choose a model made of these"
        )
    return loaders[name](config)
