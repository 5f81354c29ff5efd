"""Likeness of single pictures: cosine similarity, distances to the nearest one, spread, copies."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kernels.typing import Float, Int
from sana_jax.errors import UserError

_ROWS = 1024  # of the larger set at a time: 1024 x 50,000 distances in float64 are 0.4 GB


class Nearest(NamedTuple):
    """For each sample the nearest reference: how far or how similar, and which it is."""

    value: Float[np.ndarray, " N"]
    index: Int[np.ndarray, " N"]


def cosine_similarity(one: Float[np.ndarray, "N D"], other: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " N"]:
    """Of every pair of rows, in [-1, 1]; 0 for a row that is zero."""
    return (_unit(one) * _unit(other)).sum(axis=1)


def most_similar(samples: Float[np.ndarray, "N D"], reference: Float[np.ndarray, "M D"]) -> Nearest:
    """The greatest cosine similarity of each sample to a reference."""
    _check_sizes(samples, reference)
    reference = _unit(reference)
    similar = [_unit(rows) @ reference.T for rows in _parts(samples)]
    return Nearest(
        np.concatenate([block.max(axis=1) for block in similar]),
        np.concatenate([block.argmax(axis=1) for block in similar]),
    )


def nearest(samples: Float[np.ndarray, "N D"], reference: Float[np.ndarray, "M D"]) -> Nearest:
    """The smallest Euclidean distance of each sample to a reference."""
    _check_sizes(samples, reference)
    blocks = [distances(rows, reference) for rows in _parts(samples)]
    return Nearest(
        np.concatenate([block.min(axis=1) for block in blocks]),
        np.concatenate([block.argmin(axis=1) for block in blocks]),
    )


def nearest_other(rows: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " N"]:
    """The distance of each row to the nearest of the others."""
    found = []
    for start, part in zip(range(0, len(rows), _ROWS), _parts(rows)):
        block = distances(part, rows)
        block[np.arange(len(part)), start + np.arange(len(part))] = np.inf
        found.append(block.min(axis=1))
    return np.concatenate(found)


def mean_distance(rows: Float[np.ndarray, "N D"]) -> float:
    """The mean distance of two different rows."""
    if len(rows) < 2:
        raise UserError(f"the spread of {len(rows)} samples; it needs 2 or more: draw more")
    return float(sum(distances(part, rows).sum() for part in _parts(rows)) / (len(rows) * (len(rows) - 1)))


def distances(one: Float[np.ndarray, "N D"], other: Float[np.ndarray, "M D"]) -> Float[np.ndarray, "N M"]:
    """Euclidean distances of all pairs."""
    squared = (one**2).sum(1)[:, None] + (other**2).sum(1)[None] - 2 * one @ other.T
    return np.sqrt(np.maximum(squared, 0))


def count_copies(samples: Float[np.ndarray, "N D"], reference: Float[np.ndarray, "M D"]) -> int:
    """Samples that equal a reference once both are rounded to whole numbers."""
    known = {row.tobytes() for row in np.round(reference).astype(np.int16)}
    return sum(row.tobytes() in known for row in np.round(samples).astype(np.int16))


def _parts(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS)]


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)


def _check_sizes(samples: np.ndarray, reference: np.ndarray) -> None:
    if samples.ndim != 2 or reference.ndim != 2 or samples.shape[1] != reference.shape[1] or not len(reference):
        raise UserError(
            f"features of shapes {samples.shape} and {reference.shape}; allowed are (N, D) and (M, D) of one function"
        )
