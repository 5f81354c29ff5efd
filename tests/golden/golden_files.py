"""Recorded vectors: where they lie, how they are read, how closely they are compared.

The folder is the environment variable GOLDEN_DIR where it is set, else shared/golden beside the repository where it is
there, else tests/golden/data. A file that is missing is a failure. Sizes and hyperparameters come from the file itself.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import numpy as np
from safetensors import safe_open

_REPOSITORY = Path(__file__).resolve().parents[2]


def golden_folder() -> Path:
    named = os.environ.get("GOLDEN_DIR")
    if named:
        return Path(named)
    shared = _REPOSITORY.parent / "shared" / "golden"
    return shared if shared.is_dir() else _REPOSITORY / "tests" / "golden" / "data"


class GoldenFile:
    """Tensors by name, read once, and the hyperparameters of one file."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; set GOLDEN_DIR to the folder that holds it")
        with safe_open(path, framework="np") as file:
            self.hparams: dict = json.loads(file.metadata()["hparams"])
            self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self, prefix: str) -> list[str]:
        """Full names below a prefix, sorted, which for draws is the order in which they were drawn."""
        return sorted(name for name in self._tensors if name.startswith(prefix))

    def children(self, prefix: str) -> list[str]:
        """The distinct next path components below a prefix."""
        return sorted({name[len(prefix) :].split("/")[0] for name in self.names(prefix)})


@functools.cache
def load_golden(name: str) -> GoldenFile:
    return GoldenFile(golden_folder() / f"{name}.safetensors")


def assert_golden(port, reference, tolerance: float, name: str = "", floor: float = 0.0) -> None:
    """max|port − reference| <= tolerance·max|reference| + floor, per tensor."""
    port, reference = np.asarray(port, np.float64), np.asarray(reference, np.float64)
    assert port.shape == reference.shape, f"{name}: shape {port.shape}, recorded {reference.shape}"
    assert np.isfinite(port).all(), f"{name}: not finite"
    difference = np.abs(port - reference).max(initial=0.0)
    allowed = tolerance * np.abs(reference).max(initial=0.0) + floor
    assert difference <= allowed, f"{name}: differs by {difference:.3g}, allowed {allowed:.3g}"


def assert_golden_exact(port, reference, name: str = "") -> None:
    port, reference = np.asarray(port), np.asarray(reference)
    assert port.shape == reference.shape, f"{name}: shape {port.shape}, recorded {reference.shape}"
    wrong = np.argwhere(port != reference)
    assert not len(wrong), f"{name}: {len(wrong)} of {reference.size} differ, first at {wrong[0].tolist()}"
