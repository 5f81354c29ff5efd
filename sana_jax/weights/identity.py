"""A short name for what is in a directory of weights, so that a picture can say what drew it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from sana_jax.weights.manifest import MANIFEST_NAME

_SAMPLE = 1 << 16  # bytes read at both ends of a file


def weights_id(directory: str | os.PathLike[str]) -> str:
    """Twelve hexadecimal digits that differ for directories with different weights.

    A directory that was written here has a manifest with a checksum of every file. Of published files the size, the
    first and the last 64 kB count: two trainings of one network differ there, and reading gigabytes takes minutes.

    Args:
        directory: a checkpoint's step, or a component with ``params`` or safetensors files.
    """
    directory = Path(directory)
    digest = hashlib.sha256()
    manifests = sorted(directory.glob(MANIFEST_NAME)) or sorted(directory.glob(f"*/{MANIFEST_NAME}"))
    for path in manifests or sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:12]
