"""The same samples in every format of data set."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.train.data.damage import encoded, pixels


class Sample(NamedTuple):
    name: str
    picture: np.ndarray
    captions: tuple[str, ...]
    zoom: float
    object: str
    control: np.ndarray
    damaged: bytes | None = None

    @property
    def file(self) -> bytes:
        return encoded(self.picture, "PNG") if self.damaged is None else self.damaged


def samples() -> list[Sample]:
    made = [
        Sample(
            f"photo_{index}",
            pixels(20 + 3 * index, 30 - index, seed=index),
            (f"a view, number {index}",) if index % 2 else (f"picture {index}", f"a picture of {index} things"),
            index / 4,
            f"object {index // 2}",
            pixels(20, 20, seed=50 + index, channels=1),
        )
        for index in range(6)
    ]
    return [
        *made,
        made[0]._replace(name="photo_bad", damaged=b""),
        made[1]._replace(name="photo_cut", damaged=b"\x89P"),
    ]


def write_pictures(root: Path, made: list[Sample]) -> None:
    (root / "pictures").mkdir(parents=True)
    (root / "controls").mkdir()
    for sample in made:
        (root / f"pictures/{sample.name}.png").write_bytes(sample.file)
        (root / f"controls/{sample.name}.png").write_bytes(encoded(sample.control, "PNG"))


def rows(made: list[Sample]) -> list[dict]:
    return [
        {
            "image": f"pictures/{sample.name}.png",
            "captions": list(sample.captions),
            "zoom": sample.zoom,
            "group": sample.object,
            "control": f"controls/{sample.name}.png",
        }
        for sample in made
    ]


def write_jsonl(root: Path, made: list[Sample]) -> Path:
    write_pictures(root, made)
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(made)))
    return root


def write_json(root: Path, made: list[Sample]) -> Path:
    write_pictures(root, made)
    (root / "all.json").write_text(json.dumps(rows(made)))
    return root / "all.json"


def write_csv(root: Path, made: list[Sample], delimiter: str = ",", name: str = "metadata.csv") -> Path:
    write_pictures(root, made)
    with open(root / name, "w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "captions", "zoom", "group", "control"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(row | {"captions": json.dumps(row["captions"])} for row in rows(made))
    return root / name


def write_folder(root: Path, made: list[Sample]) -> Path:
    root.mkdir(parents=True)
    for sample in made:
        (root / f"{sample.name}.png").write_bytes(sample.file)
        about = {"captions": sample.captions, "zoom": sample.zoom, "group": sample.object}
        (root / f"{sample.name}.json").write_text(json.dumps(about))
    return root


def write_meta_data(root: Path, made: list[Sample]) -> Path:
    write_folder(root, made)
    (root / "extra.png").write_bytes(encoded(pixels(), "PNG"))
    (root / "meta_data.json").write_text(json.dumps({"name": "test", "img_names": [sample.name for sample in made]}))
    return root


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tar(path: Path, made: list[Sample]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for sample in made:
            height, width = sample.picture.shape[:2]
            about = {"captions": sample.captions, "zoom": sample.zoom, "group": sample.object}
            add_member(tar, f"{sample.name}.png", sample.file)
            add_member(tar, f"{sample.name}.json", json.dumps(about | {"height": height, "width": width}).encode())
            add_member(tar, f"{sample.name}.control.png", encoded(sample.control, "PNG"))
    return path


def write_one_tar(root: Path, made: list[Sample]) -> Path:
    return write_tar(root / "0.tar", made)


def write_tars(root: Path, made: list[Sample]) -> Path:
    write_tar(root / "shards/0.tar", made[:3])
    write_tar(root / "shards/1.tar", made[3:])
    return root


def write_wids(root: Path, made: list[Sample]) -> Path:
    write_tars(root, made)
    listed = [{"url": "shards/0.tar", "nsamples": 3}, {"url": "shards/1.tar", "nsamples": len(made) - 3}]
    (root / "wids-meta.json").write_text(json.dumps({"__kind__": "test", "wids_version": 1, "shardlist": listed}))
    return root


def table(made: list[Sample]):
    import pyarrow

    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    return pyarrow.table(
        {
            "image": pyarrow.array([{"bytes": each.file, "path": f"{each.name}.png"} for each in made], picture),
            "captions": [list(each.captions) for each in made],
            "zoom": [each.zoom for each in made],
            "group": [each.object for each in made],
            "control": pyarrow.array([{"bytes": encoded(each.control, "PNG"), "path": None} for each in made], picture),
        }
    )


def write_parquet(root: Path, made: list[Sample]) -> Path:
    import pyarrow.parquet

    (root / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(table(made[:5]), root / "data/train-00000-of-00002.parquet", row_group_size=2)
    pyarrow.parquet.write_table(table(made[5:]), root / "data/train-00001-of-00002.parquet", row_group_size=2)
    pyarrow.parquet.write_table(table(made[:1]), root / "data/test-00000-of-00001.parquet")
    return root


def write_saved(root: Path, made: list[Sample]) -> Path:
    """As the datasets library's save_to_disk lays it out: splits, a state, and streams of record batches."""
    import pyarrow

    (root / "train").mkdir(parents=True)
    with (
        pyarrow.OSFile(str(root / "train/data-00000-of-00001.arrow"), "wb") as file,
        pyarrow.ipc.new_stream(file, table(made).schema) as stream,
    ):
        stream.write_table(table(made), max_chunksize=3)
    (root / "train/state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (root / "train/dataset_info.json").write_text("{}")
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    return root


FORMATS: dict[str, Callable[[Path, list[Sample]], Path]] = {
    "folder": write_folder,
    "meta_data": write_meta_data,
    "jsonl": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "csv with ;": lambda root, made: write_csv(root, made, ";"),
    "tsv": lambda root, made: write_csv(root, made, "\t", "some.tsv"),
    "tar": write_one_tar,
    "tars": write_tars,
    "wids": write_wids,
    "parquet": write_parquet,
    "save_to_disk": write_saved,
}
