"""Data as people have it: a picture on several lines, splits in one folder, numbers and blanks in tables."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from configs.data import ImageDataConfig
from sana_jax.errors import UserError
from tests.train.data.damage import encoded, pixels
from train.data.source import IndexedSource, open_source
from train.data.splits import split


def write_pictures(folder: Path, count: int, *, suffix: str = ".png") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        (folder / f"{index}{suffix}").write_bytes(encoded(pixels(16, 20 + index), "PNG"))
    return [f"{index}{suffix}" for index in range(count)]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(path: Path, **fields) -> tuple[IndexedSource, str]:
    lines: list[str] = []
    return open_source(ImageDataConfig(path=str(path), **fields), lines.append), "\n".join(lines)


# -- one picture in several samples ------------------------------------------------------------------------------------


def held_out(source: IndexedSource, share: float) -> list[set]:
    """Pictures of both sides, by their bytes."""
    return [{source.read(source.records[index]) for index in side} for side in split(source.records, share)]


@pytest.mark.parametrize("how", ["lines", "keys", "copies", "parquet"])
def test_a_picture_of_several_samples_is_on_one_side(tmp_path, how):
    names = write_pictures(tmp_path, 12)
    rows = [{"file_name": name, "text": f"{name}, {which}"} for name in names for which in ("one", "two")]
    path = tmp_path / "all.jsonl"
    if how == "parquet":
        cells = [{"image": (tmp_path / row["file_name"]).read_bytes(), "text": row["text"]} for row in rows]
        path = write_table(tmp_path / "all.parquet", cells)
    elif how == "keys":
        rows = [row | {"key": f"line {number}"} for number, row in enumerate(rows)]
    elif how == "copies":
        for name in names:
            (tmp_path / f"copy_{name}").write_bytes((tmp_path / name).read_bytes())
        rows[1::2] = [row | {"file_name": f"copy_{row['file_name']}"} for row in rows[1::2]]
    if how != "parquet":
        write_lines(path, rows)
    source, said = opened(path, validation_share=0.4)
    assert len({record.key for record in source.records}) == 24
    for share in (0.1, 0.4, 0.8):
        training, validation = held_out(source, share)
        assert len(training) + len(validation) == 12
        assert not training & validation
    assert "24 samples share their picture with others, and a split keeps them together: " in said
    assert "24 samples share their picture with others: " in opened(path)[1]


HELD_OUT = ["0", "14", "15", "17", "26", "34", "35"]  # as it was before anything was known of repeated pictures


def test_pictures_that_come_once_stay_on_their_side(tmp_path):
    names = write_pictures(tmp_path, 40)
    rows = [{"file_name": name, "text": "x"} for name in names]
    path = write_lines(tmp_path / "all.jsonl", rows)
    before, _ = opened(path)
    assert [record.group for record in before.records] == [None] * 40
    assert [before.records[index].key for index in split(before.records, 0.2)[1]] == HELD_OUT
    write_lines(path, rows + rows[:4])
    after, _ = opened(path)
    groups = [record.group for record in after.records]
    assert groups[:4] == groups[40:] == [f"picture {record.stamp}" for record in after.records[:4]]
    assert groups[4:40] == [None] * 36
    write_lines(path, [*rows, rows[0] | {"text": ""}])  # a line that is left out repeats nothing
    assert opened(path, missing_captions="skip")[0].records == before.records


def test_a_group_that_is_given_counts(tmp_path):
    names = write_pictures(tmp_path, 3)
    rows = [{"file_name": name, "text": "x", "group": f"of {name}"} for name in names]
    rows.append({"file_name": names[1], "text": "y"})
    source, _ = opened(write_lines(tmp_path / "all.jsonl", rows))
    assert [record.group for record in source.records] == ["of 0.png", "of 1.png", "of 2.png", "of 1.png"]


# -- splits in files' names --------------------------------------------------------------------------------------------


def write_table(path: Path, rows: list[dict], picture=None) -> Path:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    if picture is not None:
        table = table.set_column(0, "image", table["image"].cast(picture))
    parquet.write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["train.parquet", "test.parquet"], ["train"]),
        (["default/train/0000.parquet", "default/test/0000.parquet"], ["default/train/0000"]),
        (["train.parquet", "validation-00000-of-00001.parquet"], ["train"]),
        (["train/part-00000-of-00001.parquet", "dev/part-00000-of-00001.parquet"], ["train/part-00000-of-00001"]),
        (["Train_1.parquet", "data/train-2.parquet", "val.parquet"], ["Train_1", "data/train-2"]),
        (["train-00000-of-00001.parquet", "sketch-00000-of-00001.parquet"], ["train-00000-of-00001"]),
        (["train.parquet", "trains.parquet"], ["train", "trains"]),
        (["test.parquet"], ["test"]),
        (["test.parquet", "valid.parquet"], ["test", "valid"]),
        (["a/0.parquet", "b/0.parquet"], ["a/0", "b/0"]),
    ],
)
def test_the_split_train_is_read(tmp_path, names, read):
    for number, name in enumerate(names):
        picture = encoded(pixels(16, 20 + number), "PNG")
        write_table(tmp_path / "set" / name, [{"image": picture, "text": name.removesuffix(".parquet")}])
    source, said = opened(tmp_path / "set")
    assert [record.captions[0].text for record in source.records] == read
    assert ("the split train is read; name files for another (" in said) == (len(read) < len(names))
    assert ("all files are read (test, valid are there, and no train)" in said) == ("valid" in read)
    for name in names:  # a split's own folder, or file, is read
        assert len(opened(tmp_path / "set" / name)[0]) == 1
        assert len(opened((tmp_path / "set" / name).parent)[0])


def test_files_of_no_split_beside_splits(tmp_path):
    for name in ("train", "test", "more"):
        write_table(tmp_path / f"{name}.parquet", [{"image": encoded(pixels(), "PNG"), "text": name}])
    source, said = opened(tmp_path)
    assert [record.captions[0].text for record in source.records] == ["train"]
    assert "1 files are of no split and left out: more.parquet" in said


# -- cells of tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_nan_is_missing(tmp_path, suffix):
    names, nan = write_pictures(tmp_path, 3), float("nan")
    rows = [{"file_name": name, "text": nan, "captions": ["x", nan], "zoom": 0.5, "group": nan} for name in names]
    rows[1] = {"file_name": names[1], "text": nan, "captions": nan, "zoom": nan, "group": nan}
    if suffix == "parquet":
        rows = [row | {"captions": row["text"]} for row in rows]
        rows[0]["captions"] = rows[2]["captions"] = 1.5
        path = write_table(tmp_path / "all.parquet", rows)
    else:
        path = tmp_path / f"all.{suffix}"
        path.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"1 of 3 pictures have no caption"):
        opened(path)
    source, _ = opened(path, missing_captions="empty")
    expected = "1.5" if suffix == "parquet" else "x"
    assert [[caption.text for caption in record.captions] for record in source.records] == [
        [expected],
        [""],
        [expected],
    ]
    assert [dict(record.columns) for record in source.records] == [{"zoom": 0.5}, {}, {"zoom": 0.5}]
    assert [record.group for record in source.records] == [None] * 3


def test_a_picture_that_is_nan_is_named_nowhere(tmp_path):
    rows = [{"file_name": name, "text": "x"} for name in write_pictures(tmp_path, 1)]
    path = write_lines(tmp_path / "all.jsonl", [*rows, {"file_name": float("nan"), "text": "y"}])
    assert "all.jsonl line 2 names no picture" in opened(path, max_bad_share=0.5)[1]


def write_csv(path: Path, columns: dict[str, list[str]], delimiter: str = ",") -> Path:
    lines = [delimiter.join(columns), *(delimiter.join(cells) for cells in zip(*columns.values()))]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", "-20"], [1, -20]),
        (["1", "2.5"], [1.0, 2.5]),
        (["0.50", "1e3"], [0.5, 1000.0]),
        ([".5", "+3"], [0.5, 3.0]),
        (["1_11", "11_1"], ["1_11", "11_1"]),
        (["2024_01_10", "2024_11_0"], ["2024_01_10", "2024_11_0"]),
        (["1.1_0", "2"], ["1.1_0", "2"]),
        (["007", "1"], ["007", "1"]),
        (["1e999", "1"], ["1e999", "1"]),
        (["٣", "1"], ["٣", "1"]),
        (["nan", "1"], ["nan", "1"]),
        (["9" * 5000, "1"], ["9" * 5000, "1"]),
    ],
)
def test_numbers_in_a_table_show_as_they_are_written(tmp_path, cells, values):
    columns = {"file_name": write_pictures(tmp_path, 2), "n": cells, "group": cells}
    source, _ = opened(write_csv(tmp_path / "all.csv", columns), caption="a {n}")
    assert [record.columns["n"] for record in source.records] == values
    assert [isinstance(record.columns["n"], str) for record in source.records] == [isinstance(values[0], str)] * 2
    assert [record.captions[0].text for record in source.records] == [f"a {cell}" for cell in cells]
    assert [record.group for record in source.records] == cells
    moved = pickle.loads(pickle.dumps(source.records))
    assert moved == source.records
    assert [str(record.columns["n"]) for record in moved] == cells


def test_numbers_in_a_table_stay_numbers(tmp_path):
    columns = {"file_name": write_pictures(tmp_path, 2), "zoom": ["0.50", "2"], "text": ["1.0", "2.10"]}
    path = write_csv(tmp_path / "all.csv", columns)
    assert [record.captions[0].text for record in opened(path)[0].records] == ["1.0", "2.10"]
    records = opened(path, caption="{zoom:.1f} of {zoom}")[0].records
    assert [record.captions[0].text for record in records] == ["0.5 of 0.50", "2.0 of 2"]
    assert np.array_equal(np.float32([record.columns["zoom"] for record in records]), np.float32([0.5, 2]))
    assert json.dumps(records[0].columns["zoom"]) == "0.5"


@pytest.mark.parametrize(("delimiter", "named"), [("\t", "tabs"), (";", ";"), (",", None), (" , ", None)])
def test_what_is_between_a_tables_columns(tmp_path, delimiter, named):
    names = write_pictures(tmp_path, 2)
    path = write_csv(tmp_path / "all.csv", {"file_name": names, "text": ['"a , b"', "c"], "n": ["1", "2"]}, delimiter)
    path.write_text(f"{path.read_text()}  \n")
    source, said = opened(path)
    assert source.problems == []
    assert [record.captions[0].text for record in source.records] == ["a , b", "c"]
    assert [record.columns["n"] for record in source.records] == [1, 2]
    assert (f"all.csv has {named} between its columns" in said) == (named is not None)


def test_names_that_are_numbers(tmp_path):
    names = write_pictures(tmp_path, 2, suffix="")
    path = write_csv(tmp_path / "all.csv", {"file_name": [*names, "7"], "text": ["a", "b", "c"]})
    source, said = opened(path, max_bad_share=0.5)
    assert [record.key for record in source.records] == ["0", "1"]
    assert "left out: 7 is missing" in said
    lines = write_lines(tmp_path / "all.jsonl", [{"file_name": 0, "text": "a"}, {"file_name": True, "text": "b"}])
    source, said = opened(lines, max_bad_share=0.5)
    assert [record.key for record in source.records] == ["0"]
    assert "left out: all.jsonl line 2 names no picture" in said


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "category", "binary", "large_binary"])
def test_kinds_of_parquet_columns(tmp_path, kind):
    import pyarrow

    names = write_pictures(tmp_path, 3)
    files = [(tmp_path / name).read_bytes() for name in names]
    cells = files if "binary" in kind else names
    picture = pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string()) if kind == "category" else None
    path = tmp_path / "all.parquet"
    rows = [{"image": cell, "text": "x"} for cell in cells]
    write_table(path, rows, picture or getattr(pyarrow, kind)())
    source, _ = opened(path)
    assert [source.read(record) for record in source.records] == files


def test_bytes_in_a_struct_may_be_large(tmp_path):
    import pyarrow

    picture = encoded(pixels(), "PNG")
    kind = pyarrow.struct([("bytes", pyarrow.large_binary()), ("path", pyarrow.large_string())])
    cells = [{"bytes": picture, "path": "a.png"}, {"bytes": None, "path": "b.png"}]
    (tmp_path / "b.png").write_bytes(encoded(pixels(20), "PNG"))
    write_table(tmp_path / "all.parquet", [{"image": cell, "text": "x"} for cell in cells], kind)
    source, _ = opened(tmp_path / "all.parquet")
    assert [source.read(record) for record in source.records] == [picture, (tmp_path / "b.png").read_bytes()]


# -- formats side by side ----------------------------------------------------------------------------------------------


def test_loose_pictures_beside_parquet_files(tmp_path):
    write_table(tmp_path / "data/train-00000-of-00001.parquet", [{"image": encoded(pixels(), "PNG"), "text": "x"}])
    (tmp_path / "logo.png").write_bytes(encoded(pixels(), "PNG"))
    with pytest.raises(
        UserError, match=r"has 1 parquet files and 1 pictures beside them.*huggingface for.*folder for the pictures$"
    ):
        opened(tmp_path)
    assert [record.key for record in opened(tmp_path, format="huggingface")[0].records] == ["00000000"]
    source, _ = opened(tmp_path, format="folder", missing_captions="empty")
    assert [record.key for record in source.records] == ["logo"]


@pytest.mark.parametrize("name", ["labels.jsonl", "deep/all.CSV"])
def test_a_manifest_of_another_name_is_spoken_of(tmp_path, name):
    write_pictures(tmp_path, 2)
    with pytest.raises(UserError, match=r"have no caption: 0, 1; write one beside each"):
        opened(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("file_name,text")
    with pytest.raises(UserError, match=rf"name \S+/{name} as --data.path, if it has them, write one beside each"):
        opened(tmp_path)


# -- names of files ----------------------------------------------------------------------------------------------------


def test_paths_as_others_write_them(tmp_path):
    write_pictures(tmp_path / "img", 1)
    names = ["img/0.png", "img\\0.png", "img/1.png", f"file://{tmp_path}/img/0.png", "https://a.org/0.png"]
    path = write_lines(tmp_path / "all.jsonl", [{"file_name": name, "text": "x"} for name in names])
    source, _ = opened(path, max_bad_share=1.0)
    assert len(source) == 1
    assert dict(source.problems) == {
        "img\\0.png": "is missing: write / between folders, since \\ is a part of a name here",
        "img/1.png": "is missing",
        f"file://{tmp_path}/img/0.png": "is an address: write the path alone, without file://",
        "https://a.org/0.png": "is a web address, and pictures are read from disk: download it",
    }


def test_captions_named_by_the_whole_name(tmp_path):
    for name in ("a.png", "b.png", "c.png", "c.jpg", "d.png", "d.png.png"):
        (tmp_path / name).write_bytes(encoded(pixels(), "PNG"))
    for name in ("a.png", "b", "b.png", "c.png", "c.jpg", "d", "d.png", "e.png"):
        (tmp_path / f"{name}.txt").write_text(f"of {name}")
    (tmp_path / "a.json").write_text(json.dumps({"llava": "also of a", "captions": "more", "zoom": 1}))
    source, said = opened(tmp_path)
    found = {record.key: [caption.text for caption in record.captions] for record in source.records}
    assert found == {
        "a": ["of a.png", "more"],
        "b": ["of b"],
        "c.png": ["of c.png"],
        "c.jpg": ["of c.jpg"],
        "d": ["of d"],
        "d.png": ["of d.png"],
    }
    assert source.records[0].columns == {"llava": "also of a", "zoom": 1}
    assert "2 captions have no picture of the same name and are left out: b.png.txt, e.png.txt" in said
    for named in ("a", "a.png"):
        (tmp_path / "meta_data.json").write_text(json.dumps({"img_names": [named]}))
        assert [each.captions[0].text for each in opened(tmp_path)[0].records] == ["of a.png"]
