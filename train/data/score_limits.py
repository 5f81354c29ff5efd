"""Which samples take part by their scores: ``--data.filters``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.data.decoding import BadPicture
from train.data.sources.rows import as_number


def passes(key: str, columns: Mapping[str, Any], limits: Mapping[str, tuple[float, float]]) -> bool:
    """Whether all scores of a sample lie within their limits. A score may be a column ``name``, or ``_name``.

    Raises:
        BadPicture: it has no such score.
    """
    for name, (low, high) in limits.items():
        score = as_number(columns.get(name, columns.get(f"_{name}")))
        if score is None:
            raise BadPicture(key, f"has no score {name}, which --data.filters asks for")
        if not low <= score <= high:
            return False
    return True
