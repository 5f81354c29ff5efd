"""A file that grows until the disk is full, and what can be kept of an mp4 that was cut off."""

from __future__ import annotations

import os
import pathlib
import struct
from typing import BinaryIO


class GrowingFile:
    """A file that is only appended to. After a failed write it takes nothing more, so that closing cannot fail."""

    def __init__(self, path: pathlib.Path) -> None:
        self._file: BinaryIO = open(path, "wb", buffering=0)  # noqa: SIM115
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Appends; after a failure does nothing. Returns the number of bytes given, as files do."""
        left = memoryview(data)
        while left and self.error is None:
            try:
                left = left[self._file.write(left) :]
            except OSError as error:
                self.error = error
        return len(data)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def cut_to_whole_fragments(path: pathlib.Path) -> None:
    """Takes off what is behind the last fragment that was written as a whole."""
    with open(path, "r+b") as file:
        length, position, whole = os.fstat(file.fileno()).st_size, 0, 0
        while position + 8 <= length:
            file.seek(position)
            size, kind = struct.unpack(">I4s", file.read(8))
            if size == 1:
                size = struct.unpack(">Q", file.read(8).ljust(8, b"\0"))[0]
            if size < 8 or position + size > length:
                break
            position += size
            if kind in (b"moov", b"mdat"):
                whole = position
        file.truncate(whole)
