"""A manifest: a row per picture, as JSON lines, a JSON list, CSV or TSV; names are relative to the manifest."""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from sana_jax.errors import UserError
from train.data.records import shown
from train.data.sources.frame_folders import is_folder, list_frames
from train.data.sources.listing import (
    PICTURES,
    TABLE_SUFFIXES,
    Entry,
    FileBlob,
    Listing,
    Media,
    clean_key,
    read_text,
    unique_keys,
)
from train.data.sources.rows import picture_column, sort_out

SUFFIXES = (*TABLE_SUFFIXES, ".json")
USUAL_STEMS = ("metadata", "manifest", "captions", "dataset")


def list_manifest(path: pathlib.Path, kinds: Collection[str] = (), media: Media = PICTURES) -> Listing:
    """The pictures, or videos, of a manifest.

    Raises:
        UserError: the file can't be read, or has no row or no column of pictures.
    """
    listing = Listing(f"manifest {path.name}", path.parent, has_rows=True)
    rows = read_rows(path, listing)
    if not rows:
        _refuse_no_rows(path, listing, media)
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    picture = picture_column(names, media.columns)
    if picture is None:
        raise UserError(
            f"{path} has the columns {', '.join(map(str, names[:12])) or '(none)'}; one of them must name the "
            f"{media.many} and be called {', '.join(media.columns[:6])} or the like: rename it"
        )
    for where, row in rows:
        _add_row(listing, where, sort_out(row, picture, kinds), media)
    unique_keys(listing)
    return listing


def read_rows(path: pathlib.Path, listing: Listing) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a manifest, each with where it stands; what can't be read is noted in the listing.

    Raises:
        UserError: the file can't be read, or has two columns of one name.
    """
    try:
        text, encoding = read_text(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); allow reading it, or name another") from error
    if encoding != "UTF-8":
        listing.notes.append(f"{path.name} is not UTF-8 and read as {encoding}")
    return list((_csv_rows if path.suffix.lower() in (".csv", ".tsv") else _json_rows)(listing, path, text))


def _refuse_no_rows(path: pathlib.Path, listing: Listing, media: Media) -> None:
    """Raises ``UserError`` with the names in a table's first line and the first row's problem."""
    first, table = read_text(path.read_bytes())[0].split("\n", 1)[0].strip(), path.suffix.lower() in (".csv", ".tsv")
    header = f" below its first line {shown(first)!r}" if table and first else ""
    problem = f" ({listing.problems[0].name} {listing.problems[0].reason})" if listing.problems else ""
    raise UserError(f"{path} has no rows that can be used{header}{problem}; write one for each {media.one}")


def _add_row(listing: Listing, where: str, row, media: Media) -> None:
    name = row.picture.get("path") if isinstance(row.picture, dict) else row.picture
    name = str(name) if isinstance(name, int | float) and not isinstance(name, bool) else name
    if not isinstance(name, str) or not name.strip():
        listing.problem(where, f"names no {media.one}")
        return
    if name.startswith("file://"):
        listing.problem(name, "is an address: write the path alone, without file://")
        return
    if "://" in name:
        listing.problem(name, f"is a web address, and {media.many} are read from disk: download it")
        return
    full = os.path.join(listing.root, name)
    frames = media.folders and is_folder(full)
    key = row.key or (os.path.normpath(name) if frames else os.path.splitext(os.path.normpath(name))[0])
    listing.entries.append(
        Entry(
            clean_key(key),
            list_frames(full, shown(name)) if frames else FileBlob(full, shown(name)),
            row.captions,
            row.columns,
            folder=os.path.dirname(clean_key(name)),
            stated=row.size,
        )
    )


def _json_rows(listing: Listing, path: pathlib.Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of JSON lines, or of one list, with where they stand."""
    if path.suffix.lower() == ".json":
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON ({error}); write it again") from error
        if not isinstance(content, list):
            raise UserError(f"{path} holds a {type(content).__name__}; allowed is a list of objects, one per picture")
        for number, row in enumerate(content, 1):
            if isinstance(row, dict):
                yield f"{path.name} row {number}", row
            else:
                listing.problem(f"{path.name} row {number}", "is not a JSON object")
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            listing.problem(where, f"is not JSON ({str(error)[:60]})")
            continue
        if isinstance(row, dict):
            yield where, row
        else:
            listing.problem(where, f"holds a {type(row).__name__} instead of a JSON object")


def _csv_rows(listing: Listing, path: pathlib.Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows by the names in the first line; a column whose every value is a number becomes numbers."""
    csv.field_size_limit(1 << 24)
    first, delimiter = text.split("\n", 1)[0], "\t" if path.suffix.lower() == ".tsv" else ","
    if delimiter == "," and "," not in first and (others := [each for each in ";\t" if each in first]):
        delimiter = max(others, key=first.count)
        named = "tabs" if delimiter == "\t" else delimiter
        listing.notes.append(f"{path.name} has {named} between its columns")
    lines = io.StringIO(text.replace("\0", ""), newline="")
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        if repeated := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
            raise UserError(
                f"{path} has the column {repeated[0]!r} {names.count(repeated[0])} times, and a row has one value of "
                "each: give every column a name of its own"
            )
        rows = []
        for row in reader:
            where, cells = f"{path.name} line {reader.line_num}", [cell.strip() for cell in row]
            if not any(cells):
                continue
            if len(cells) != len(names):
                listing.problem(where, f"has {len(cells)} cells, the first line has {len(names)}")
                continue
            rows.append((where, dict(zip(names, cells))))
    except csv.Error as error:
        raise UserError(f"{path} is not CSV ({error} in line {reader.line_num}); write it again") from error
    for name in names:
        values = [row[name] for _, row in rows if row[name] != ""]
        convert = _number_type(values)
        if convert is not None:
            for _, row in rows:
                row[name] = convert(row[name]) if row[name] != "" else None
    yield from rows


class _WrittenNumber(float):
    """A number that captions and names show as it is written: 0.50 and not 0.5."""

    def __new__(cls, text: str) -> _WrittenNumber:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text

    def __format__(self, spec: str) -> str:
        return format(float(self), spec) if spec else self.text


_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)


def _number_type(values: list[str]) -> Callable[[str], float] | None:
    """int or float where every value is plainly one; 007 and 1_1 are names and not numbers."""
    if not values or any(re.match(r"[+-]?0[0-9]", value) or not _NUMBER.fullmatch(value) for value in values):
        return None
    if all(re.fullmatch(r"0|-?[1-9][0-9]{,99}", value) for value in values):
        return int
    return _WrittenNumber if all(abs(float(value)) < float("inf") for value in values) else None
