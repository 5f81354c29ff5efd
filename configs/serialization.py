"""Run configurations as JSON and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from sana_jax.errors import UserError


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested dictionaries of JSON-able values."""
    return dataclasses.asdict(config)


def from_dict(config_class: type, values: dict[str, Any], source: str, prefix: str = "") -> Any:
    """Builds a dataclass from nested dictionaries.

    Args:
        config_class: the dataclass.
        values: its fields; those with a default may be missing, as in files written by an older version.
        source: the file, for messages.
        prefix: where ``values`` lies inside the file.

    Raises:
        UserError: unknown or missing fields, named with their place in the file.
    """
    hints = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    if unknown := sorted(set(values) - set(fields)):
        raise UserError(
            f"{source} has the unknown field {prefix}{unknown[0]}; allowed here: {', '.join(fields)}: "
            "it was written by another version, or edited; mend it or start a new run"
        )
    arguments = {name: _value(hints[name], value, source, f"{prefix}{name}.") for name, value in values.items()}
    try:
        return config_class(**arguments)
    except TypeError as error:
        raise UserError(f"{source} lacks fields: {error}; mend it or start a new run") from error


def _value(hint: Any, value: Any, source: str, prefix: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    # of several dataclasses the one that has most of these fields, and fewest others
    options = sorted(options, key=lambda option: (-_known_fields(option, value), _count_fields(option)))
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            # a class whose fields are of the preset's choosing, as those of token encoders, is made for their names
            option = option.class_for(value) if hasattr(option, "class_for") else option
            return from_dict(option, value, source, prefix)
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            element = typing.get_args(option)[0]
            return tuple(_value(element, item, source, prefix) for item in value)
        if _fits(option, value):
            return value
    allowed = " or ".join(getattr(option, "__name__", str(option).removeprefix("typing.")) for option in options)
    raise UserError(
        f"{source}: {prefix.removesuffix('.')} is {value!r}; allowed is {allowed}: mend it or start a new run"
    )


def _known_fields(option: Any, value: Any) -> int:
    if not dataclasses.is_dataclass(option) or not isinstance(value, dict):
        return 0
    return len({field.name for field in dataclasses.fields(option)} & set(value))


def _count_fields(option: Any) -> int:
    return len(dataclasses.fields(option)) if dataclasses.is_dataclass(option) else 0


def _fits(option: Any, value: Any) -> bool:
    """Whether a JSON value is one of a field's type. A whole number also stands for a float."""
    if typing.get_origin(option) is typing.Literal:
        return value in typing.get_args(option)
    if option is float:
        return type(value) in (int, float)
    return option is Any or type(value) is option
