"""What folders that a run goes on from have in common: telling runs apart, and files that cannot be read."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from sana_jax.errors import UserError


def told_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """All settings in which the run of the folder and this one differ, in words; empty where there are none."""
    names = [*now, *(name for name in before if name not in now)]
    return "; ".join(
        f"{name} {before.get(name)!r} there and {now.get(name)!r} here"
        for name in names
        if before.get(name) != now.get(name)
    )


def damaged_file(path: pathlib.Path, folder: pathlib.Path, reason: Any) -> UserError:
    """The error about a file of the folder that cannot be gone on from."""
    said = " ".join(str(reason).split())[:200] or type(reason).__name__
    return UserError(f"{path} is damaged ({said}); remove {folder} and begin anew")
