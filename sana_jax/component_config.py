"""Reads one component's ``config.json``: its fields, and what its ``_class_name`` (or ``model_type``) names."""

from __future__ import annotations

import dataclasses
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


def known_fields(cls: type, values: Mapping[str, Any], what: str, whose: str = "allowed") -> dict[str, Any]:
    """What a published ``config.json`` gives a configuration class, without what the library that wrote it notes.

    Args:
        cls: a dataclass whose fields are the file's.
        values: the parsed file.
        what: "transformer", "autoencoder", for the message.
        whose: whose fields they are, for the message.

    Raises:
        UserError: a field that the class does not have.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    given = {key: value for key, value in values.items() if not key.startswith("_")}
    if unknown := sorted(set(given) - known):
        raise UserError(f"{what} config has unknown fields {unknown}; {whose} are {sorted(known)}: remove the others")
    return given
