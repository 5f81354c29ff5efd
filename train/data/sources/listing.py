"""What each format finds before any picture is opened: entries, and where the bytes of each lie."""

from __future__ import annotations

import io
import os
import pathlib
import stat
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

from train.data.decoding import BadPicture
from train.data.records import Caption, Problem, shown

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
CLIP_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".mpg", ".mpeg"),
    *(".ts", ".mts", ".m2ts", ".wmv", ".flv", ".3gp", ".ogv"),
)
UNREAD_SUFFIXES = (".heic", ".heif", ".jxl", ".psd", ".svg", ".raw", ".dng", ".cr2", ".nef", ".arw", ".exr", ".hdr")
CAPTION_SUFFIXES = (".txt", ".caption")
ARRAY_SUFFIXES = (".npz", ".npy")
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")


@dataclass(frozen=True)
class Media:
    """What the samples of a data set are.

    Attributes:
        one: in messages.
        many: likewise.
        suffixes: of their files, in lower case.
        unread: suffixes of files that are such and are not read, with what to do about them.
        columns: names of a manifest's column that has their names.
        folders: whether a folder of pictures is one sample: its frames.
    """

    one: str
    many: str
    suffixes: tuple[str, ...]
    unread: tuple[tuple[str, ...], str]
    columns: tuple[str, ...]
    folders: bool = False


PICTURES = Media(
    "picture",
    "pictures",
    PICTURE_SUFFIXES,
    (UNREAD_SUFFIXES, "save them as PNG or JPEG"),
    ("image", "file_name", "path", "image_path", "filename", "file", "img", "img_path", "image_file"),
)
CLIPS = Media(
    "video",
    "videos",
    CLIP_SUFFIXES,
    ((".rm", ".rmvb", ".swf", ".vob", ".y4m", ".yuv"), "save them as MP4 or MKV"),
    ("video", "file_name", "path", "video_path", "filename", "file", "clip", "clip_path", "video_file"),
    folders=True,
)


class Blob(Protocol):
    """Bytes that lie somewhere: cheap to make, to keep and to send to another process."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def open(self) -> IO[bytes]:
        """A file to read and to seek in.

        Raises:
            BadPicture: it can't be read.
        """
        ...


@dataclass(frozen=True, slots=True)
class FileBlob:
    """A whole file."""

    path: str
    name: str

    def open(self) -> IO[bytes]:
        """The file.

        Raises:
            BadPicture: it can't be read, or is no regular file.
        """
        try:
            # a pipe or a device would wait for ever
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise BadPicture(self.name, "is not a file")
            return open(self.path, "rb")
        except FileNotFoundError as error:
            reason = "is a link to nothing" if os.path.islink(self.path) else "is missing"
            if reason == "is missing" and os.sep == "/" and "\\" in self.path:
                reason += ": write / between folders, since \\ is a part of a name here"
            raise BadPicture(self.name, reason) from error
        except BadPicture:
            raise
        except ValueError as error:  # a name with a zero byte, out of a manifest
            raise BadPicture(self.name, "is no file's name") from error
        except OSError as error:
            raise BadPicture(self.name, f"can't be read ({error.strerror})") from error


@dataclass(frozen=True, slots=True)
class SliceBlob:
    """A part of a file: a member of a tar."""

    path: str
    offset: int
    size: int
    name: str

    def open(self) -> IO[bytes]:
        """The part, as a file.

        Raises:
            BadPicture: it can't be read.
        """
        try:
            return io.BufferedReader(_Slice(self.path, self.offset, self.size))
        except OSError as error:
            raise BadPicture(self.name, f"can't be read ({error.strerror})") from error


class _Slice(io.RawIOBase):
    def __init__(self, path: str, offset: int, size: int):
        super().__init__()
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 closed with this
        self._offset, self._size, self._at = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._at)]
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(view) or 0
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def read_blob(blob: Blob) -> bytes:
    """All bytes.

    Raises:
        BadPicture: they can't be read.
    """
    try:
        with blob.open() as file:
            return file.read()
    except OSError as error:
        raise BadPicture(blob.name, f"can't be read ({error.strerror})") from error


@dataclass(slots=True)
class Entry:
    """A sample that was found, its picture not opened yet.

    Attributes:
        key: see ``Record``; made unique later.
        picture: None where there are features alone.
        captions: of any kind.
        columns: everything else that is known.
        pictures: further pictures by the name of their column.
        arrays: files of features by name.
        folder: of the picture, for grouping.
        stated: (height, width) that the data claims, compared with what the file says.
    """

    key: str
    picture: Blob | None
    captions: tuple[Caption, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, Blob] = field(default_factory=dict)
    arrays: Mapping[str, Blob] = field(default_factory=dict)
    folder: str = ""
    stated: tuple[int, int] | None = None


@dataclass
class Listing:
    """What a format found.

    Attributes:
        kind: the format in words.
        root: the folder that names in columns are relative to.
        entries: in a fixed order.
        problems: files that can't be used.
        notes: lines about what was left out or done.
        duplicates: pictures that share a name.
        has_rows: whether a sample is a row, whose captions are in its columns.
        tables: files that were left out, and would be manifests if they were named.
    """

    kind: str
    root: pathlib.Path
    entries: list[Entry] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    duplicates: list[tuple[str, ...]] = field(default_factory=list)
    has_rows: bool = False
    tables: list[pathlib.Path] = field(default_factory=list)

    def note(self, names: Sequence[str], text: str, *, first: int = 3) -> None:
        """Adds a line with a count and the first names, if there are names at all."""
        if names:
            some = ", ".join(shown(name) for name in names[:first]) + (", ..." if len(names) > first else "")
            self.notes.append(f"{len(names)} {text}: {some}")

    def problem(self, name: str, reason: str) -> None:
        """Adds a file that can't be used."""
        self.problems.append(Problem(shown(name), reason))


def clean_key(name: str) -> str:
    """A name as a key: composed Unicode, '/' between folders, nothing that can't be printed on a line."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return shown(unicodedata.normalize("NFC", text).replace(os.sep, "/"))


def clean_text(text: str) -> str:
    """A caption on one line, without control characters."""
    if not text.isprintable():
        text = "".join(each if each.isprintable() else " " for each in text)
    return " ".join(text.split())


def read_text(data: bytes) -> tuple[str, str]:
    """A text and the encoding that it is in: UTF-8, UTF-16 where its mark says so, else Windows-1252."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace"), "UTF-16"
    try:
        return data.decode("utf-8-sig"), "UTF-8"
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace"), "Windows-1252"


def unique_keys(listing: Listing) -> None:
    """Gives entries whose key was there before a number: ``name#2``."""
    seen: dict[str, int] = {}
    taken = {entry.key for entry in listing.entries}
    repeated = []
    for entry in listing.entries:
        seen[entry.key] = count = seen.get(entry.key, 0) + 1
        if count > 1:
            repeated.append(entry.key)
            key = f"{entry.key}#{count}"
            while key in taken:
                count += 1
                key = f"{entry.key}#{count}"
            taken.add(key)
            entry.key = key
    listing.note(repeated, "samples have the name of an earlier one and are numbered")
