"""A Hugging Face dataset on disk: what ``save_to_disk`` writes (Arrow files), or a folder of Parquet files."""

from __future__ import annotations

import functools
import io
import json
import os
import pathlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from sana_jax.errors import UserError, reason_of
from sana_jax.files import read_json
from train.data.decoding import BadPicture
from train.data.records import shown
from train.data.sources.listing import Blob, Entry, FileBlob, Listing, clean_key, unique_keys
from train.data.sources.rows import picture_column, sort_out

if TYPE_CHECKING:
    import pyarrow

_PARTS_IN_MEMORY = 3  # row groups of pictures
_SPLITS = ("train", "test", "validation", "valid", "val", "dev")


@dataclass(frozen=True, slots=True)
class CellBlob:
    """A picture's bytes in a cell of an Arrow or Parquet file."""

    path: str
    part: int
    row: int
    column: str
    name: str

    def open(self) -> IO[bytes]:
        """The bytes, as a file.

        Raises:
            BadPicture: the file can't be read, or the cell is empty.
        """
        import pyarrow

        try:
            value = _part(self.path, self.part, self.column)[self.row].as_py()
        except (OSError, pyarrow.ArrowException) as error:
            raise BadPicture(self.name, f"can't be read ({reason_of(error, 100)})") from error
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise BadPicture(self.name, "holds no bytes")
        return io.BytesIO(data)


def list_dataset(path: pathlib.Path, kinds: Collection[str] = ()) -> Listing:
    """The rows of a data set.

    Raises:
        UserError: pyarrow is missing, there are no data files, or no column of pictures.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(
            f"{path} is a Hugging Face dataset, and reading one takes pyarrow, which is not installed: "
            "pip install pyarrow"
        ) from error
    listing = Listing("Hugging Face dataset", path if path.is_dir() else path.parent, has_rows=True)
    files = _data_files(listing, path)
    number = 0
    for file in files:
        try:
            schema, parts = _open(str(file))
            picture = _picture_column(path, schema)
            first = len(listing.entries)
            for part in range(parts):
                _add_part(listing, file, part, schema, picture, kinds, number + len(listing.entries) - first)
            number += len(listing.entries) - first
        except (OSError, pyarrow.ArrowException) as error:
            listing.problem(file.name, f"can't be read ({reason_of(error, 100)})")
    unique_keys(listing)
    return listing


def _add_part(
    listing: Listing,
    file: pathlib.Path,
    part: int,
    schema: pyarrow.Schema,
    picture: str,
    kinds: Collection[str],
    number: int,
) -> None:
    """Adds the rows of one part of a file, whose first row is the ``number``-th of all."""
    pictures = {field.name for field in schema if field.name == picture or _holds_pictures(field)}
    others = [field.name for field in schema if field.name not in pictures]
    texts = {name for name in pictures if _is_text(schema.field(name).type)}
    rows = {name: _part(str(file), part, name).to_pylist() for name in (*others, *texts)}
    paths = {name: _paths(_part(str(file), part, name)) for name in pictures - texts}
    for row in range(_rows(str(file), part)):
        sorted_row = sort_out({name: rows[name][row] for name in others}, None, kinds)
        name = f"{file.name} row {number + row}"
        blobs: dict[str, Blob] = {}
        for column in pictures:
            value = rows[column][row] if column in texts else paths[column][row]
            if isinstance(value, str):
                blobs[column] = FileBlob(os.path.join(listing.root, value), shown(value))
            elif value is not None:
                blobs[column] = CellBlob(str(file), part, row, column, name)
        if picture not in blobs:
            listing.problem(name, "has no picture")
            continue
        columns = sorted_row.columns | {column: column for column in blobs if column != picture}
        key = sorted_row.key or f"{number + row:08d}"
        blob = blobs.pop(picture)
        listing.entries.append(Entry(clean_key(key), blob, sorted_row.captions, columns, blobs, stated=sorted_row.size))


def _paths(cells: Any) -> list[str | bool | None]:
    """For each cell: True where it holds bytes, a file's name where it holds that alone, None where it is empty."""
    import pyarrow
    import pyarrow.compute as compute

    if pyarrow.types.is_struct(cells.type):
        names = [cells.type.field(index).name for index in range(cells.type.num_fields)]
        has_bytes = compute.is_valid(compute.struct_field(cells, "bytes")).to_pylist() if "bytes" in names else []
        paths = compute.struct_field(cells, "path").to_pylist() if "path" in names else [None] * len(cells)
        return [True if has else path for has, path in zip(has_bytes or [False] * len(cells), paths)]
    return [True if valid else None for valid in cells.is_valid().to_pylist()]


def _data_files(listing: Listing, path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_file():
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = [str(split) for split in read_json(path / "dataset_dict.json").get("splits", [])]
        if not splits:
            raise UserError(f"{path / 'dataset_dict.json'} names no splits; name a split's folder")
        chosen = "train" if "train" in splits else splits[0]
        if len(splits) > 1:
            others = ", ".join(split for split in splits if split != chosen)
            listing.notes.append(f"the split {chosen} is read; name a split's own folder for another ({others})")
        path = listing.root = path / chosen
    if (path / "state.json").is_file():
        state = read_json(path / "state.json")
        if state.get("_indices_files"):
            raise UserError(f"{path} is a selection of a larger dataset; write it anew after flatten_indices()")
        files = [path / str(each["filename"]) for each in state.get("_data_files", [])]
    else:
        files = _of_one_split(listing, path, sorted(path.rglob("*.parquet")) or sorted(path.rglob("*.arrow")))
    if not files:
        raise UserError(f"{path} has no arrow or parquet files; name the folder that save_to_disk wrote")
    return files


def _of_one_split(listing: Listing, path: pathlib.Path, files: list[pathlib.Path]) -> list[pathlib.Path]:
    """The files of the split train, where there are several splits and it is one of them; else all, which is said."""
    split_of = {file: _split_of(file.relative_to(path)) for file in files}
    splits = sorted({split for split in split_of.values() if split is not None})
    if len(splits) < 2:
        return files
    if "train" not in splits:
        listing.notes.append(f"all files are read ({', '.join(splits)} are there, and no train); name one for it alone")
        return files
    listing.notes.append(f"the split train is read; name files for another ({', '.join(splits)} are there)")
    others = [str(file.relative_to(path)) for file, split in split_of.items() if split is None]
    listing.note(others, "files are of no split and left out")
    return [file for file, split in split_of.items() if split == "train"]


def _split_of(file: pathlib.PurePath) -> str | None:
    """The split that a file's name begins with, or that a folder which it lies in is called; None where none is."""
    if named := re.match(rf"({'|'.join(_SPLITS)})(?![a-z])", file.stem.lower()):
        return named[1]
    folders = [folder.lower() for folder in reversed(file.parts[:-1])]
    found = next((folder for folder in folders if folder in _SPLITS), None)
    return found or (file.name.split("-")[0] if "-of-" in file.name else None)


def _holds_pictures(field: pyarrow.Field) -> bool:
    """Whether a column is a struct of bytes and path, as the datasets library stores pictures."""
    import pyarrow

    if not pyarrow.types.is_struct(field.type):
        return False
    return "bytes" in {field.type.field(index).name for index in range(field.type.num_fields)}


def _is_text(kind: pyarrow.DataType) -> bool:
    """Whether a column is of texts: the kind that datasets writes, those of pandas 3 and polars, or a category's."""
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())


def _picture_column(path: pathlib.Path, schema: pyarrow.Schema) -> str:
    """The column named as the picture, or else the first that holds pictures by the file's own account."""
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = stored.get("info", {}).get("features", {}) if isinstance(stored, dict) else {}
    declared = [name for name, each in features.items() if isinstance(each, dict) and each.get("_type") == "Image"]
    holding = [field.name for field in schema if field.name in declared or _holds_pictures(field)]
    chosen = picture_column(holding) or (holding[0] if holding else picture_column(schema.names))
    if chosen is None:
        raise UserError(
            f"{path} has the columns {', '.join(schema.names[:12])}; one of them must hold pictures (as the datasets "
            "library's Image): store them so, or name the column image"
        )
    return chosen


@functools.lru_cache(maxsize=64)
def _open(path: str) -> tuple[pyarrow.Schema, int]:
    """Schema and number of parts (row groups or record batches) of a file."""
    if path.endswith(".parquet"):
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path)
        return file.schema_arrow, file.num_row_groups
    table = _table(path)
    return table.schema, len(table.to_batches())


def _rows(path: str, part: int) -> int:
    if path.endswith(".parquet"):
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(path).metadata.row_group(part).num_rows
    return _table(path).to_batches()[part].num_rows


@functools.lru_cache(maxsize=64)
def _table(path: str) -> pyarrow.Table:
    """An Arrow file, mapped into memory: nothing is read until it is used."""
    import pyarrow

    mapped = pyarrow.memory_map(path)
    try:
        return pyarrow.ipc.open_stream(mapped).read_all()
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(mapped).read_all()


@functools.lru_cache(maxsize=_PARTS_IN_MEMORY)
def _part(path: str, part: int, column: str) -> Any:
    """A column of a part."""
    if path.endswith(".parquet"):
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(path).read_row_group(part, columns=[column]).column(column)
    return _table(path).to_batches()[part].column(column)
