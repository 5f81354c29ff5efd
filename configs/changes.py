"""What may differ between two starts of one run, and what may not."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from configs.schema import RunConfig

# What a resumed run may change: how it is run and watched, not what it computes.
CHANGEABLE_ON_RESUME = (
    *("steps", "run_dir", "device", "nonfinite", "max_nonfinite"),
    *("mesh", "checkpoint", "preview", "validation", "logging", "distributed"),
)
# And in which order and parts, which changes the last digits: to save memory.
COMPUTED_OTHERWISE = ("accumulation", "compute.remat", "compute.scan_blocks", "compute.kernels")
# Where something lies. What lies there must stay the same; it may move.
PLACES = (
    *("model", "encoders", "self_forcing.generator", "self_forcing.fake_score", "prior.path"),
    *("data.path", "data.cache", "data.joint_pictures", "data.joint_cache"),
)
CONDITIONS = "data.conditions"  # of which each may name a directory behind a colon


def differing_fields(one: RunConfig, other: RunConfig) -> dict[str, tuple]:
    """Options in which two runs differ and a resumed run may not, with both values; ``PLACES`` are among them where
    they are different ones, however they are written."""
    free = (*CHANGEABLE_ON_RESUME, *COMPUTED_OTHERWISE)
    return {
        name: values
        for name, values in all_differences(one, other).items()
        if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in free)
        and not (name in PLACES and None not in values and len({*map(os.path.abspath, values)}) == 1)
        and not (name == CONDITIONS and None not in values and len({*map(_absolute_conditions, values)}) == 1)
    }


def all_differences(one: RunConfig, other: RunConfig) -> dict[str, tuple]:
    """All options in which two runs differ, with both values."""
    first, second = (flatten(dataclasses.asdict(config)) for config in (one, other))
    return {
        name: (first.get(name), second.get(name)) for name in {**first, **second} if first.get(name) != second.get(name)
    }


def with_absolute_places(config: RunConfig) -> RunConfig:
    """The same run with paths that mean the same from every directory; what is no path here stays as it is."""

    def absolute(group, prefix: str):
        changes = {}
        for entry in dataclasses.fields(group):
            value, name = getattr(group, entry.name), f"{prefix}{entry.name}"
            if name in PLACES and value is not None and os.path.exists(value):
                changes[entry.name] = os.path.abspath(value)
            elif name == CONDITIONS:
                changes[entry.name] = _absolute_conditions(value)
            elif dataclasses.is_dataclass(value) and any(
                place.startswith(f"{name}.") for place in (*PLACES, CONDITIONS)
            ):
                changes[entry.name] = absolute(value, f"{name}.")
        return dataclasses.replace(group, **changes)

    return absolute(config, "")


def _absolute_conditions(conditions: Sequence[str]) -> tuple[str, ...]:
    parts = (text.partition(":") for text in conditions)
    return tuple(
        f"{kind}:{os.path.abspath(place)}" if os.path.exists(place) else kind + colon + place
        for kind, colon, place in parts
    )


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one dictionary with dotted names."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
