"""Stamps: what changes when a file does, and is the same on every machine."""

from __future__ import annotations

import hashlib
import os
from typing import IO

import numpy as np

from train.data.decoding import BadPicture
from train.data.sources.listing import Blob

# All of a small file is read, else blocks of so many bytes, evenly spread from its beginning to its end.
_WHOLE, _BLOCKS, _BYTES = 1 << 16, 8, 4096


def stamp(file: IO[bytes], more: str = "") -> str:
    """The stamp of a file's length and bytes (of a large one some), and of a text."""
    digest, size = hashlib.blake2b(digest_size=8), file.seek(0, os.SEEK_END)
    if size <= _WHOLE:
        file.seek(0)
        digest.update(file.read())
    else:
        for place in np.linspace(0, size - _BYTES, _BLOCKS).astype(np.int64).tolist():
            file.seek(place)
            digest.update(file.read(_BYTES))
    digest.update(f"{size}{more}".encode(errors="surrogatepass"))
    return digest.hexdigest()


def stamp_of(blob: Blob) -> str:
    """A file's stamp; empty where it can't be read, which is said where it is needed."""
    try:
        with blob.open() as file:
            return stamp(file)
    except (BadPicture, OSError):
        return ""
