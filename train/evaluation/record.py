"""What a measurement says of itself, so that figures can be compared: one JSON object for each, one per line."""

from __future__ import annotations

import datetime
import json
import math
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import sana_jax
from sana_jax.errors import UserError
from sana_jax.files import atomic_file

_LIBRARIES = ("jax", "jaxlib", "flax", "numpy")


def make_record(metric: str, value: float, details: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """One measurement: its name and value, further figures, what was measured and how, versions, device, date."""
    return {
        "metric": metric,
        "value": value,
        "details": dict(details),
        **{name: setting for name, setting in settings.items() if setting is not None},
        "device": describe_device(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Of this library, Python and what computes."""
    return {
        "sana_jax": sana_jax.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _LIBRARIES},
    }


def describe_device() -> str:
    """The device that JAX computes on by default."""
    device = jax.config.jax_default_device or jax.local_devices()[0]
    if isinstance(device, str):
        return device
    kind = device.device_kind
    return device.platform if kind == device.platform else f"{device.platform} ({kind})"


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one line to a file of JSON lines; the file is never half-written.

    Raises:
        UserError: it can't be written.
    """
    try:
        before = path.read_bytes() if path.exists() else b""
        if before and not before.endswith(b"\n"):
            before += b"\n"
        with atomic_file(path) as file:
            file.write(before + (json.dumps(_finite(record), ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another --output") from error


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value
