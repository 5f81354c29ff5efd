"""PyTorch's ``.pth`` files, written without PyTorch: for ``torch.load(weights_only=True)``, also with ``mmap=True``.

The format is that of ``torch_files``: a zip archive with nothing compressed. All sizes are known before anything is
read, so that every entry has its place from the start and the tensors' bytes may come in any order, in parts.
"""

from __future__ import annotations

import os
import pickle
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import BinaryIO, NamedTuple

import numpy as np

from convert.torch_files import ORDERED_DICT, REBUILD_TENSOR, STORAGES
from sana_jax.files import atomic_file
from sana_jax.weights.safetensors_files import TensorInfo

# name of a tensor, the byte of it where an array begins, the array
Piece = tuple[str, int, np.ndarray]

_ROOT = "archive"
_ALIGNMENT = 64  # of every entry's bytes, as torch.save has it
_BEFORE = {".format_version": b"1", ".storage_alignment": b"64", "byteorder": b"little"}
_AFTER = {"version": b"3\n"}
_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}

# Sizes, places and numbers of entries from here on are written in zip64's records, and all ones in their own fields.
_LARGE = 0xFFFFFFFF
_MANY = 0xFFFF
_ONES_32, _ONES_16 = 0xFFFFFFFF, 0xFFFF
_ZIP64, _PADDING = 1, 0x4246  # ids of extra fields; the second is the one that PyTorch pads with
_FIRST_DAY = 0x21  # 1 January 1980, so that equal weights give equal files


class _Entry(NamedTuple):
    name: bytes
    size: int
    header: int  # where its header begins
    start: int  # where its bytes begin

    @property
    def is_large(self) -> bool:
        return self.size >= _LARGE


def write_torch(
    path: str | os.PathLike[str], section: str, infos: Mapping[str, TensorInfo], pieces: Iterable[Piece]
) -> None:
    """Writes ``{section: {name: tensor}}``, a piece at a time, under a temporary name first.

    Args:
        path: the file.
        section: what the set of weights is called: ``state_dict``.
        infos: the tensors, in the order that the file gives them.
        pieces: contiguous parts that together are all bytes of all tensors, each once; in any order, read lazily.

    Raises:
        ValueError: a dtype that PyTorch's files do not have, or pieces that are not all bytes of the tensors.
    """
    before = {"data.pkl": _pickle(section, infos), **_BEFORE}
    keys = {name: f"data/{number}" for number, name in enumerate(infos)}
    entries = _places(
        {
            **{key: len(content) for key, content in before.items()},
            **{keys[name]: _bytes_of(info) for name, info in infos.items()},
            **{key: len(content) for key, content in _AFTER.items()},
        }
    )
    sums: dict[str, list[tuple[int, int, int]]] = {key: [] for key in entries}
    with atomic_file(path) as file:
        for key, begin, content in _contents({**before, **_AFTER}, keys, pieces):
            file.seek(entries[key].start + begin)
            file.write(content)
            sums[key].append((begin, len(content), zlib.crc32(content)))
        checksums = {key: _checksum(key, sums[key], entry.size) for key, entry in entries.items()}
        for key, entry in entries.items():
            file.seek(entry.header)
            file.write(_local_header(entry, checksums[key]))
        file.seek(0, os.SEEK_END)
        _write_directory(file, [(entry, checksums[key]) for key, entry in entries.items()])


def _bytes_of(info: TensorInfo) -> int:
    return int(np.prod(info.shape, dtype=np.int64)) * info.dtype.itemsize


def _contents(
    small: Mapping[str, bytes], keys: Mapping[str, str], pieces: Iterable[Piece]
) -> Iterator[tuple[str, int, memoryview]]:
    for key, content in small.items():
        yield key, 0, memoryview(content)
    for name, begin, array in pieces:
        if array.size:
            yield keys[name], begin, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


# -- the pickle ------------------------------------------------------------------------------------------------------


def _pickle(section: str, infos: Mapping[str, TensorInfo]) -> bytes:
    """The program that builds the dict of tensors, in protocol 2, which is PyTorch's."""
    program = [pickle.PROTO + b"\x02", pickle.EMPTY_DICT, _text(section), pickle.EMPTY_DICT, pickle.MARK]
    for number, (name, info) in enumerate(infos.items()):
        program += [_text(name), _tensor(str(number), info)]
    return b"".join([*program, pickle.SETITEMS, pickle.SETITEM, pickle.STOP])


def _tensor(key: str, info: TensorInfo) -> bytes:
    """The call that makes a contiguous tensor of all of a storage, without gradients and hooks."""
    if np.dtype(info.dtype) not in _STORAGE_OF:
        allowed = ", ".join(dtype.name for dtype in STORAGES.values())
        raise ValueError(f"PyTorch's files have no dtype {info.dtype}; allowed are {allowed}: cast the tensor")
    strides = [1]
    for length in info.shape[:0:-1]:
        strides.insert(0, strides[0] * max(length, 1))
    storage = _tuple(
        _text("storage"),
        _global(f"torch {_STORAGE_OF[np.dtype(info.dtype)]}"),
        _text(key),
        _text("cpu"),
        _number(int(np.prod(info.shape, dtype=np.int64))),
    )
    arguments = _tuple(
        storage + pickle.BINPERSID,
        _number(0),
        _tuple(*map(_number, info.shape)),
        _tuple(*map(_number, strides[: len(info.shape)])),
        pickle.NEWFALSE,
        _global(ORDERED_DICT) + pickle.EMPTY_TUPLE + pickle.REDUCE,
    )
    return _global(REBUILD_TENSOR[1]) + arguments + pickle.REDUCE


def _text(value: str) -> bytes:
    content = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(content)) + content


def _global(name: str) -> bytes:
    module, attribute = name.split(" ")
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _number(value: int) -> bytes:
    if value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", value)


# -- the archive -----------------------------------------------------------------------------------------------------


def _places(sizes: Mapping[str, int]) -> dict[str, _Entry]:
    """Where every entry is, one after the other, its bytes aligned."""
    entries: dict[str, _Entry] = {}
    cursor = 0
    for key, size in sizes.items():
        entry = _Entry(f"{_ROOT}/{key}".encode(), size, cursor, 0)
        start = cursor + len(_local_header(entry._replace(start=cursor), 0))
        start += -start % _ALIGNMENT
        entries[key] = entry._replace(start=start)
        cursor = start + size
    return entries


def _local_header(entry: _Entry, checksum: int) -> bytes:
    """The header before an entry's bytes, filled up to where they begin."""
    extra, size = b"", entry.size
    if entry.is_large:
        extra, size = struct.pack("<HHQQ", _ZIP64, 16, entry.size, entry.size), _ONES_32
    padding = max(entry.start - entry.header - 30 - len(entry.name) - len(extra) - 4, 0)
    extra += struct.pack("<HH", _PADDING, padding) + bytes(padding)
    version = 45 if entry.is_large else 20
    names = len(entry.name), len(extra)
    fixed = struct.pack("<4s5H3I2H", b"PK\x03\x04", version, 0, 0, 0, _FIRST_DAY, checksum, size, size, *names)
    return fixed + entry.name + extra


def _write_directory(file: BinaryIO, entries: list[tuple[_Entry, int]]) -> None:
    """The list of entries at the end of the file, and the record that says where it is."""
    begin = file.tell()
    for entry, checksum in entries:
        values = [entry.size, entry.size, entry.header]
        large = [value for value in values if value >= _LARGE]
        extra = struct.pack(f"<HH{len(large)}Q", _ZIP64, 8 * len(large), *large) if large else b""
        size, _, header = (value if value < _LARGE else _ONES_32 for value in values)
        version = 45 if large else 20
        numbers = version, version, 0, 0, 0, _FIRST_DAY, checksum, size, size, len(entry.name), len(extra)
        file.write(struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *numbers, 0, 0, 0, 0, header) + entry.name + extra)
    end = file.tell()
    count, size = len(entries), end - begin
    if count >= _MANY or size >= _LARGE or begin >= _LARGE:
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, begin))
        file.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1))
    count = count if count < _MANY else _ONES_16
    size, begin = (value if value < _LARGE else _ONES_32 for value in (size, begin))
    file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, size, begin, 0))


def _checksum(key: str, parts: list[tuple[int, int, int]], size: int) -> int:
    """The CRC-32 of an entry whose parts were written in any order.

    Raises:
        ValueError: the parts leave a gap or overlap.
    """
    total, end = 0, 0
    for begin, length, checksum in sorted(parts):
        if begin != end:
            raise ValueError(f"{key}: a part begins at byte {begin} and not at {end}")
        # A CRC is affine in what it starts from: crc(b, start) = crc(b) ^ crc(zeros, start) ^ crc(zeros).
        if total:
            total = _checksum_of_zeros(length, total) ^ _checksum_of_zeros(length, 0)
        total ^= checksum
        end += length
    if end != size:
        raise ValueError(f"{key}: {end} of {size} bytes were given")
    return total


def _checksum_of_zeros(length: int, start: int) -> int:
    block = bytes(min(length, 1 << 20))
    while length > 0:
        start = zlib.crc32(block[:length], start)
        length -= len(block)
    return start
