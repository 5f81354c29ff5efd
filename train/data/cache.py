"""The cache of latents and encoded prompts that training reads: what its files are, who writes and who reads them.

::

    cache.json                    the identity: everything that the numbers are a function of; written first
    latents-00000.arrayrecord     a record per variant of a picture, or of a clip: its arrays, one after the other
    latents-00000.json            what each record is: names, dtypes, shapes, checksums; with it the shard is there
    prompts-00000.arrayrecord     likewise a record per distinct text: its tokens, without padding
    samples.jsonl                 the data: a line per picture, or clip, with captions, group and size; written last
    check.png                     pictures, or frames of clips, and what becomes of them

Every file appears whole or not at all, so that an end at any moment loses the shard that was being written and nothing
else. Shards are never changed; what is added goes into new ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes  # noqa: F401 - NumPy then knows bfloat16 by name
import numpy as np

from sana_jax.errors import CheckpointError, UserError, reason_of
from sana_jax.files import atomic_file, read_json

FORMAT = 1  # of the files; part of the identity
LATENTS, PROMPTS = "latents", "prompts"
IDENTITY_FILE, SAMPLES_FILE, CHECK_FILE = "cache.json", "samples.jsonl", "check.png"
_SUFFIX = ".arrayrecord"
# One record per chunk, so that each is read by itself; latents are noise to a compressor.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER = 32768  # bytes
_MOST_OPEN = 128  # files that a reader keeps open
_SHOWN = 6  # differences that an error lists

Say = Callable[[str], None]
Name = tuple[str, str]


@dataclass(frozen=True)
class CacheIdentity:
    """Everything that the numbers in a cache are a function of, apart from the pictures and texts themselves.

    Attributes:
        fields: flat; names are dotted, values are what JSON holds.
    """

    fields: Mapping[str, Any]

    def __post_init__(self):
        object.__setattr__(self, "fields", json.loads(json.dumps(dict(self.fields))))

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that differ for different identities."""
        return hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode()).hexdigest()[:12]

    def differences(self, other: CacheIdentity) -> dict[str, tuple[Any, Any]]:
        """Fields in which the two differ, with both values; None where one has no such field."""
        names = {**self.fields, **other.fields}
        pairs = {name: (self.fields.get(name), other.fields.get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def require(self, wanted: CacheIdentity, directory: Path) -> None:
        """Raises ``CheckpointError`` with what differs, unless this identity is the wanted one."""
        if differing := self.differences(wanted):
            lines = [f"{name} is {_short(have)} there, {_short(want)} here" for name, (have, want) in differing.items()]
            more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
            raise CheckpointError(
                f"{directory} holds latents and prompts that were made in another way: {'; '.join(lines[:_SHOWN])}"
                f"{more}. Use the model and settings that it was made with, or name another folder with --data.cache "
                "(without that option the run finds one of its own)"
            )


class Layout(NamedTuple):
    """The arrays of a record, in their order: (name, dtype, shape) of each."""

    arrays: tuple[tuple[str, str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Layout:
        """The layout of these arrays."""
        return cls(tuple((name, array.dtype.name, array.shape) for name, array in arrays.items()))

    @property
    def num_bytes(self) -> int:
        """Bytes of a record."""
        return sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for _, dtype, shape in self.arrays)

    def unpack(self, data: bytes) -> dict[str, np.ndarray]:
        """A record's arrays, which share its memory and can't be written to."""
        arrays, offset = {}, 0
        for name, dtype, shape in self.arrays:
            kind, count = np.dtype(dtype), int(np.prod(shape))
            arrays[name] = np.frombuffer(data, kind, count, offset).reshape(shape)
            offset += count * kind.itemsize
        return arrays


@dataclass(frozen=True)
class Shard:
    """A file of records and what each of them is.

    Attributes:
        path: the records' file.
        kind: ``latents`` or ``prompts``.
        num_bytes: of the file.
        names: of a latent (picture's key, variant), of a prompt ("text", the text), ("negative", the text) or
            ("null", "").
        signatures: of each record: what else it depends on, such as the picture's size.
        layouts: the distinct ones.
        layout_of: each record's, as an index of ``layouts``.
        checksums: CRC-32 of each record.
        left_out: pictures that were tried for this shard and could not be used: name -> why.
    """

    path: Path
    kind: str
    num_bytes: int
    names: Sequence[Name]
    signatures: Sequence[str]
    layouts: Sequence[Layout]
    layout_of: Sequence[int]
    checksums: Sequence[int]
    left_out: Mapping[Name, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What the file beside the records holds."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "bytes": self.num_bytes,
            "layouts": [layout.arrays for layout in self.layouts],
            "names": self.names,
            "signatures": self.signatures,
            "layout_of": self.layout_of,
            "checksums": self.checksums,
            "left_out": [[*name, reason] for name, reason in self.left_out.items()],
        }

    @classmethod
    def from_json(cls, path: Path, values: Mapping[str, Any]) -> Shard:
        """The inverse. Raises ``KeyError``, ``TypeError`` or ``ValueError`` for anything else."""
        layouts = [
            Layout(tuple((name, str(np.dtype(dtype)), tuple(map(int, shape))) for name, dtype, shape in layout))
            for layout in values["layouts"]
        ]
        names = [(str(first), str(second)) for first, second in values["names"]]
        columns = [list(values[name]) for name in ("signatures", "layout_of", "checksums")]
        if values["format"] != FORMAT or any(len(column) != len(names) for column in columns):
            raise ValueError("of another format")
        if any(not 0 <= number < len(layouts) for number in columns[1]):
            raise ValueError("a layout is missing")
        left_out = {(first, second): reason for first, second, reason in values["left_out"]}
        return cls(path, values["kind"], int(values["bytes"]), names, columns[0], layouts, *columns[1:], left_out)

    def damage(self, *, thorough: bool) -> str | None:
        """What is wrong with the records' file, or None; ``thorough`` reads every record."""
        try:
            size = self.path.stat().st_size
        except OSError as error:
            return f"can't be read ({error.strerror})"
        if size != self.num_bytes:
            return f"has {size} bytes instead of {self.num_bytes}"
        if not thorough:
            return None
        try:
            reader = _open_records(self.path)
            for number, checksum in enumerate(self.checksums):
                if zlib.crc32(reader.read([number])[0]) != checksum:
                    return f"record {number} has another checksum"
        except (RuntimeError, IndexError, OSError) as error:
            return f"is damaged ({reason_of(error, 120)})"
        return None


class ShardWriter:
    """Collects records in a file with a temporary name; ``close`` makes it a shard.

    Args:
        path: of the records' file.
        kind: ``latents`` or ``prompts``.
        option: that names the folder, for messages.
    """

    def __init__(self, path: Path, kind: str, option: str = "--data.cache"):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._path, self._kind, self._option = path, kind, option
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._writer = ArrayRecordWriter(str(self._temporary), _WRITER_OPTIONS)
        if not self._writer.ok():
            raise UserError(f"{path.parent} can't be written to; name another folder with {option}")
        self._names: list[Name] = []
        self._signatures: list[str] = []
        self._layouts: dict[Layout, int] = {}
        self._layout_of: list[int] = []
        self._checksums: list[int] = []
        self._left_out: dict[Name, str] = {}
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: Name, arrays: Mapping[str, np.ndarray], signature: str = "") -> None:
        """One record."""
        layout = Layout.of(arrays)
        data = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
        self._guarded(lambda: self._writer.write(data))
        self._names.append(name)
        self._signatures.append(signature)
        self._layout_of.append(self._layouts.setdefault(layout, len(self._layouts)))
        self._checksums.append(zlib.crc32(data))
        self.num_bytes += len(data)

    def leave_out(self, name: Name, reason: str) -> None:
        """Notes that something was tried and can't be used."""
        self._left_out[name] = reason

    def close(self) -> Shard:
        """Makes the file a shard: on the disk, under its name, and described."""
        self._guarded(self._writer.close)
        _sync(self._temporary)
        shard = Shard(
            self._path,
            self._kind,
            self._temporary.stat().st_size,
            self._names,
            self._signatures,
            list(self._layouts),
            self._layout_of,
            self._checksums,
            self._left_out,
        )
        os.replace(self._temporary, self._path)
        write_durably(self._path.with_suffix(".json"), [json.dumps(shard.to_json())])
        return shard

    def abandon(self) -> None:
        """Removes what there is of it."""
        with suppress(RuntimeError):
            self._writer.close()
        self._temporary.unlink(missing_ok=True)

    def _guarded(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except RuntimeError as error:
            self.abandon()
            raise UserError(
                f"{self._path.parent} can't be written to ({reason_of(error, 160)}); the shards before "
                f"this one are kept: make room, or name another folder with {self._option}, and start again"
            ) from error


class CacheWriter:
    """A cache that this process, and no other, adds to.

    Opening it waits for a process that is writing, and removes what an interrupted one left half-written, and damaged
    shards, with a line about each.

    Args:
        directory: of the cache; made where there is none.
        identity: of the numbers that will be added.
        thorough: read all that is there to find damage inside of files, not only their sizes.
        say: prints a line.
        option: that names the folder, for messages.

    Raises:
        CheckpointError: the cache there has another identity.
        UserError: the directory can't be written to, or holds something else.
    """

    def __init__(
        self,
        directory: Path,
        identity: CacheIdentity,
        *,
        thorough: bool = False,
        say: Say = print,
        option: str = "--data.cache",
    ):
        self.directory, self.identity, self.option, self._say = directory, identity, option, say
        _check_place(directory, option)
        self._lock: IO | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(directory / ".lock", say)
            if (directory / IDENTITY_FILE).exists():
                read_identity(directory).require(identity, directory)
            else:
                content = json.dumps({"format": FORMAT, "identity": identity.fields}, indent=2)
                write_durably(directory / IDENTITY_FILE, [content])
            self.shards = self._sound_shards(thorough)
        except OSError as error:
            self.close()
            raise UserError(
                f"the cache {directory} can't be written to ({error.strerror}); name another folder with {option}"
            ) from error
        except BaseException:
            self.close()
            raise

    def present(self, kind: str) -> dict[Name, str]:
        """The records of a kind that are there, with their signatures; later shards win."""
        return {
            name: signature
            for shard in self.shards
            if shard.kind == kind
            for name, signature in zip(shard.names, shard.signatures)
        }

    def layouts(self, kind: str) -> dict[Name, Layout]:
        """The arrays of each record of a kind; later shards win."""
        return {
            name: shard.layouts[number]
            for shard in self.shards
            if shard.kind == kind
            for name, number in zip(shard.names, shard.layout_of)
        }

    def left_out(self) -> dict[Name, str]:
        """Pictures that could not be used when they were tried, with the reason."""
        return {name: reason for shard in self.shards for name, reason in shard.left_out.items()}

    def new_shard(self, kind: str) -> ShardWriter:
        """A shard to be filled; hand what its ``close`` returns to ``keep``."""
        numbers = [int(match[1]) for match in (re.search(r"-(\d+)\.", s.path.name) for s in self.shards) if match]
        return self.numbered_shard(kind, max(numbers, default=-1) + 1)

    def numbered_shard(self, kind: str, number: int) -> ShardWriter:
        """As ``new_shard``, of a given number; its ``close`` replaces the shard of that number."""
        return ShardWriter(self.directory / shard_name(kind, number), kind, self.option)

    def keep(self, shard: Shard) -> None:
        """Counts a closed shard as part of the cache."""
        self.shards = [other for other in self.shards if other.path != shard.path] + [shard]

    def write_samples(self, lines: Iterator[Mapping[str, Any]]) -> None:
        """Writes the list of the data's pictures, which makes the cache readable."""
        write_durably(
            self.directory / SAMPLES_FILE,
            (json.dumps(line, separators=(",", ":")) for line in lines),
        )

    def close(self) -> None:
        """Lets other processes write."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _sound_shards(self, thorough: bool) -> list[Shard]:
        for path in self.directory.glob(".*.tmp"):
            self._say(f"cache: removed {path.name}, which was not finished")
            path.unlink(missing_ok=True)
        shards, described = [], set()
        for listing in sorted(self.directory.glob("*-?????*.json")):
            path = listing.with_suffix(_SUFFIX)
            shard, problem = None, None
            try:
                shard = read_shard(listing)
                problem = shard.damage(thorough=thorough)
            except CheckpointError as error:
                problem = str(error)
            if problem is None:
                shards.append(shard)
                described.add(path.name)
                continue
            count = f"its {len(shard.names)} records are" if shard else "what it held is"
            self._say(f"cache: {path.name} {problem}; {count} made again")
            listing.unlink()
            path.unlink(missing_ok=True)
        for path in self.directory.glob(f"*{_SUFFIX}"):
            if path.name not in described and path.exists():
                self._say(f"cache: removed {path.name}, which was not finished")
                path.unlink()
        return shards


def shard_name(kind: str, number: int) -> str:
    """The name of a shard's file of records."""
    return f"{kind}-{number:05d}{_SUFFIX}"


class Place(NamedTuple):
    """Where a record is: shard and number in it."""

    shard: int
    number: int


class CacheReader:
    """A finished cache, read record by record; any number of threads may read at once.

    Args:
        directory: of the cache.
        unfinished: read what there is of one that is not finished; it has no ``samples``.

    Attributes:
        directory: of the cache.
        identity: what the numbers are a function of.
        shards: its shards.

    Raises:
        FileNotFoundError: there is no cache, or it is not finished.
        CheckpointError: a file is damaged; the message names it.
    """

    def __init__(self, directory: str | os.PathLike[str], *, unfinished: bool = False):
        self.directory = Path(directory)
        self.identity = read_identity(self.directory)
        if not unfinished and not (self.directory / SAMPLES_FILE).is_file():
            raise FileNotFoundError(
                f"the cache {self.directory} is not finished; continue with python -m train.precompute and the same "
                "options"
            )
        self.shards = [read_shard(path) for path in sorted(self.directory.glob("*-?????*.json"))]
        for shard in self.shards:
            if problem := shard.damage(thorough=False):
                raise _damaged(shard.path, problem)
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def samples(self) -> Iterator[dict[str, Any]]:
        """The data's pictures, as ``CacheWriter.write_samples`` was given them."""
        path = self.directory / SAMPLES_FILE
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise _damaged(path, f"has no JSON in line {number}") from error

    def places(self, kind: str) -> dict[Name, Place]:
        """Where each record of a kind is; later shards win."""
        return {
            name: Place(index, number)
            for index, shard in enumerate(self.shards)
            if shard.kind == kind
            for number, name in enumerate(shard.names)
        }

    def layout(self, place: Place) -> Layout:
        """The arrays of a record, without reading it."""
        shard = self.shards[place.shard]
        return shard.layouts[shard.layout_of[place.number]]

    def signature(self, place: Place) -> str:
        """What else a record depends on."""
        return self.shards[place.shard].signatures[place.number]

    def read(self, place: Place) -> dict[str, np.ndarray]:
        """The arrays of a record; not to be written to.

        Raises:
            CheckpointError: the shard is damaged.
        """
        layout = self.layout(place)
        try:
            data = self._reader(place.shard).read([place.number])[0]
        except (RuntimeError, IndexError) as error:
            reason = reason_of(error, 120)
            raise _damaged(self.shards[place.shard].path, f"is damaged ({reason})") from error
        if len(data) != layout.num_bytes:
            raise _damaged(self.shards[place.shard].path, "holds other records than its description says")
        return layout.unpack(data)

    def _reader(self, index: int) -> Any:
        with self._lock:
            reader = self._open.pop(index, None) or _open_records(self.shards[index].path)
            self._open[index] = reader
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)  # closed when the last thread lets go of it
        return reader


def read_identity(directory: Path) -> CacheIdentity:
    """The identity of a cache.

    Raises:
        FileNotFoundError: there is no cache.
        CheckpointError: it is damaged or of a later format.
    """
    path = directory / IDENTITY_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} holds no cache ({IDENTITY_FILE} is missing); python -m train.precompute makes one"
        )
    try:
        content = read_json(path)
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"the cache {directory} has format {content['format']!r}, this version reads {FORMAT}; make it again "
                "in another folder"
            )
        return CacheIdentity(content["identity"])
    except CheckpointError:
        raise
    except (UserError, KeyError, TypeError) as error:
        raise _damaged(path, f"is damaged ({error})") from error


def read_shard(listing: Path) -> Shard:
    """The description of a shard.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return Shard.from_json(listing.with_suffix(_SUFFIX), json.loads(listing.read_bytes()))
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise _damaged(listing, f"is damaged ({type(error).__name__}: {str(error)[:80]})") from error


def write_durably(path: Path, lines: Sequence[str] | Iterator[str]) -> None:
    """Writes lines of text so that the file is whole or absent even after the machine loses power."""
    with atomic_file(path) as file:
        for line in lines:
            file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_records(path: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(path), _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER)


def _check_place(directory: Path, option: str) -> None:
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{option} {directory} is a file; name a folder that is new or holds a cache")
    if not directory.is_dir() or (directory / IDENTITY_FILE).exists():
        return
    if found := sorted(path.name for path in directory.iterdir() if not path.name.startswith(".")):
        raise UserError(
            f"{option} {directory} holds {', '.join(found[:3])} but no {IDENTITY_FILE}, so it is no cache; name a "
            "folder that is new, empty or holds a cache"
        )


def _lock(path: Path, say: Say) -> IO:
    """Waits until no other process writes to the cache; the system lets go of a dead one's lock."""
    file = open(path, "a")  # noqa: SIM115 - held as long as the cache is written to
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"cache: another process is writing to {path.parent}; waiting until it has ended")
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {problem}; python -m train.precompute (of trajectories, train.make_trajectories) with the same "
        "options finds what is damaged and makes it again"
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
