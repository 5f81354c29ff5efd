"""Every format of data set holds the same samples here, and the same is asked of each."""

from __future__ import annotations

import io
import json
import pickle
import tarfile

import numpy as np
import pytest

from configs.data import ImageDataConfig
from sana_jax.errors import UserError
from tests.train.data.damage import encoded, pixels
from tests.train.data.written_formats import (
    FORMATS,
    add_member,
    samples,
    write_folder,
    write_jsonl,
    write_parquet,
    write_pictures,
    write_tar,
    write_tars,
    write_wids,
)
from train.data.decoding import BadPicture, decode_picture
from train.data.formats import find_format
from train.data.source import IndexedSource, index_source, open_source


@pytest.fixture(scope="module", params=FORMATS)
def opened(request, tmp_path_factory) -> tuple[IndexedSource, list[str], ImageDataConfig]:
    path = FORMATS[request.param](tmp_path_factory.mktemp("data") / "set", samples())
    before = sorted(path.parent.rglob("*"))
    config = ImageDataConfig(path=str(path), max_bad_share=0.5)
    lines: list[str] = []
    source = open_source(config, lines.append)
    assert sorted(path.parent.rglob("*")) == before  # nothing was written
    return source, lines, config


def test_sizes_captions_and_columns(opened):
    source, lines, _ = opened
    good = samples()[:6]
    assert len(source) == len(source.records) == 6
    for record, sample in zip(source.records, good):
        assert record.size == sample.picture.shape[:2]
        assert tuple(caption.text for caption in record.captions) == sample.captions
        assert record.group == sample.object
        assert record.columns["zoom"] == sample.zoom
        assert isinstance(record.columns["zoom"], float)
    assert len({record.key for record in source.records}) == 6
    assert source.describe() in lines[-1]


def test_pixels(opened):
    source = opened[0]
    for record, sample in reversed(list(zip(source.records, samples()))):
        assert np.array_equal(decode_picture(source.read(record), name=record.key, channels=3), sample.picture)


def test_further_pictures(opened):
    source = opened[0]
    if source.kind in ("folder of pictures", "pictures named by meta_data.json"):
        return  # these have none
    for record, sample in zip(source.records, samples()):
        assert isinstance(record.columns["control"], str)
        control = decode_picture(source.read(record, "control"), name=record.key, channels=1)
        assert np.array_equal(control, sample.control)


def test_columns_that_name_no_picture(opened):
    source = opened[0]
    with pytest.raises(UserError, match=r"'zoom' .* holds 0.0; it must name a picture"):
        source.read(source.records[0], "zoom")
    with pytest.raises(UserError, match=r"'depth' .* is not there"):
        source.read(source.records[0], "depth")


def test_bad_files_are_named_once(opened):
    source, lines, _ = opened
    assert len(source.problems) == 2
    assert source.looked_at == 8
    assert {problem.reason.split(" (")[0] for problem in source.problems} <= {
        "is empty",
        "is not a picture of a known format",
    }
    for problem in source.problems:
        assert sum(f"left out: {problem.name} " in line for line in lines) == 1


def test_too_many_bad_files(opened):
    with pytest.raises(UserError, match="2 of 8 files are unusable"):
        open_source(ImageDataConfig(path=opened[2].path), lambda line: None)


def test_the_same_again_and_in_another_process(opened):
    source, _, config = opened
    again = index_source(config)
    assert again.records == source.records
    moved = pickle.loads(pickle.dumps(source))
    assert moved.records == source.records
    assert moved.read(moved.records[3]) == source.read(source.records[3])


@pytest.mark.parametrize("name", FORMATS)
def test_keys_and_stamps_do_not_depend_on_where_the_data_lies(name, tmp_path):
    changed = [samples()[0], samples()[1]._replace(picture=255 - samples()[1].picture), samples()[2]]
    sets = [samples()[:3], samples()[:3], changed]
    paths = [FORMATS[name](tmp_path / str(number) / "set", made) for number, made in enumerate(sets)]
    here, there, other = (index_source(ImageDataConfig(path=str(path))).records for path in paths)
    assert [(record.key, record.stamp) for record in here] == [(record.key, record.stamp) for record in there]
    assert [record.key for record in here] == [record.key for record in other]
    assert [a.stamp == b.stamp for a, b in zip(here, other)] == [True, False, True]


# -- captions ----------------------------------------------------------------------------------------------------------


def test_one_caption_for_all(opened):
    lines: list[str] = []
    source = open_source(
        ImageDataConfig(path=opened[2].path, max_bad_share=0.5, caption="a photo of sks, {group}"), lines.append
    )
    assert [record.captions[0].text for record in source.records[:3]] == ["a photo of sks, object 0"] * 2 + [
        "a photo of sks, object 1"
    ]
    assert any("6 pictures have captions of their own, which --data.caption replaces" in line for line in lines)


def test_a_trigger_word_before_each_caption(opened):
    config = ImageDataConfig(path=opened[2].path, max_bad_share=0.5, caption="sks style, {caption}")
    source = open_source(config, lambda line: None)
    assert [caption.text for caption in source.records[0].captions] == [
        "sks style, picture 0",
        "sks style, a picture of 0 things",
    ]


@pytest.mark.parametrize(
    ("caption", "says"),
    [("a {colour} photo", "names {colour}, which a picture does not have"), ("a {", "can't be filled in")],
)
def test_a_caption_that_cant_be_filled_in(tmp_path, caption, says):
    path = write_jsonl(tmp_path / "set", samples()[:2])
    with pytest.raises(UserError, match=says.replace("{", r"\{")):
        open_source(ImageDataConfig(path=str(path), caption=caption), lambda line: None)


@pytest.mark.parametrize("name", ["folder", "jsonl", "tars", "parquet"])
def test_missing_captions(name, tmp_path):
    made = [sample._replace(captions=()) if index < 2 else sample for index, sample in enumerate(samples()[:6])]
    path = str(FORMATS[name](tmp_path / "set", made))
    with pytest.raises(UserError, match=r"2 of 6 pictures have no caption: \S+, \S+;.* --data.missing-captions"):
        open_source(ImageDataConfig(path=path), lambda line: None)
    lines: list[str] = []
    source = open_source(ImageDataConfig(path=path, missing_captions="skip"), lines.append)
    assert len(source) == 4
    assert any("2 pictures without a caption are left out: " in line for line in lines)
    source = open_source(ImageDataConfig(path=path, missing_captions="empty"), lines.append)
    assert [caption.text for caption in source.records[0].captions] == [""]
    assert any("2 pictures without a caption get an empty one: " in line for line in lines)
    source = open_source(ImageDataConfig(path=path, caption="a photo"), lines.append)
    assert [caption.text for caption in source.records[0].captions] == ["a photo"]


def test_loose_pictures_beside_tars_or_a_manifest(tmp_path):
    both = write_tars(tmp_path / "both", samples()[:6])
    write_folder(both / "loose", samples()[6:8])
    for path in (both, tmp_path):  # with tars in the folder itself, and below it
        with pytest.raises(UserError, match=r"tar files and \d+ pictures .*--data.format webdataset for"):
            open_source(ImageDataConfig(path=str(path)), lambda line: None)
    assert len(open_source(ImageDataConfig(path=str(both), format="webdataset"), lambda line: None)) == 6
    listed = write_jsonl(tmp_path / "listed", samples()[:2])  # whose column of control pictures names these
    write_pictures(listed / "more", samples()[6:8])
    lines: list[str] = []
    assert len(open_source(ImageDataConfig(path=str(listed)), lines.append)) == 2
    (line,) = (line for line in lines if "not named by" in line)
    unnamed = {str(path.relative_to(listed)) for path in (listed / "more").rglob("*.png")}
    assert line.startswith(f"data: {len(unnamed)} pictures are not named by metadata.jsonl and left out: ")
    assert min(unnamed) in line
    with pytest.raises(UserError, match=r"webdataset: no .tar below"):
        open_source(ImageDataConfig(path=str(listed), format="webdataset"), lambda line: None)


def test_captions_are_looked_for_in_columns(tmp_path):
    path = write_jsonl(tmp_path / "set", samples()[:2])
    rows = [json.loads(line) for line in (path / "metadata.jsonl").read_text().splitlines()]
    rows = [{"image": row["image"], "licence": "CC0", "description": "a dog that runs"} for row in rows]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"columns called text, caption.*further columns are licence, desc") as caught:
        open_source(ImageDataConfig(path=str(path)), lambda line: None)
    assert "--data.caption '{description}'" in str(caught.value)
    assert "a.txt" not in str(caught.value)


def test_one_text_in_two_files_of_a_sample_is_one_caption(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add_member(tar, "a.png", encoded(pixels(), "PNG"))
        add_member(tar, "a.txt", b"a dog")
        add_member(tar, "a.json", json.dumps({"caption": "a dog", "llava": "a cat"}).encode())
    rule = {"caption_choice": "proportion"}
    for more, kinds in (
        ({}, ["caption"]),
        ({"proportions": ("prompt=1", "llava=1"), **rule}, ["prompt", "llava"]),
        ({"proportions": ("prompt=1", "caption=2"), **rule}, ["caption", "prompt"]),
    ):
        (record,) = open_source(ImageDataConfig(path=str(tmp_path), **more), lambda line: None).records
        assert sorted(caption.kind for caption in record.captions) == sorted(kinds)


def test_scores_that_are_missing(tmp_path):
    path = write_jsonl(tmp_path / "set", samples()[:2])
    names = [json.loads(line)["image"] for line in (path / "metadata.jsonl").read_text().splitlines()]
    rows = [{"image": name, "captions": ["a", "b"]} for name in names]
    config = ImageDataConfig(path=str(path), caption_choice="clipscore")

    def said() -> list[str]:
        (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        lines: list[str] = []
        open_source(config, lines.append)
        return [line for line in lines if "have a score" in line]

    with pytest.raises(UserError, match=r"clipscore: none of the 4 captions has a score"):
        said()
    rows[0]["clip_scores"] = [30.0]
    assert said()[0].startswith("data: 1 of 4 captions have a score")
    assert "taken only in the 1 samples" in said()[0]
    rows[0]["clip_scores"] = rows[1]["clip_scores"] = [30.0, 20.0]
    assert said() == []


def test_captions_and_scores_beside_a_tar(tmp_path):
    made = [sample._replace(captions=("as it came",)) for sample in samples()[:2]]
    for number in ("0", "00"):
        write_tar(tmp_path / f"{number}.tar", made)
    texts = {"photo_0": {"llava": "a long text", "intern": "another text"}, "photo_1": {"llava": "a third text"}}
    scores = {"photo_0": {"captions": "21.5", "llava": 33.25, "intern": 29, "unknown": 40}}
    (tmp_path / "00_vlm.json").write_text(json.dumps(texts))
    (tmp_path / "00_vlm_clip.json").write_text(json.dumps(scores))
    source = open_source(ImageDataConfig(path=str(tmp_path)), lambda line: None)
    by_key = {record.key: record for record in source.records}
    assert len(by_key["0/photo_0"].captions) == 1
    found = {caption.kind: (caption.text, caption.score) for caption in by_key["00/photo_0"].captions}
    assert found == {
        "caption": ("as it came", None),
        "llava": ("a long text", 33.25),
        "intern": ("another text", 29.0),
    }
    assert [caption.kind for caption in by_key["00/photo_1"].captions] == ["caption", "llava"]


def test_kinds_of_caption_in_a_json_file(tmp_path):
    picture = encoded(pixels(), "PNG")
    about = {"prompt": "short", "llava": "long", "note": "no caption", "height": 48, "width": 64}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add_member(tar, "a.jpg", picture)
        add_member(tar, "a.json", json.dumps(about).encode())
    config = ImageDataConfig(path=str(tmp_path), caption_choice="proportion", proportions=("prompt=1", "llava=3"))
    (record,) = open_source(config, lambda line: None).records
    assert [(caption.kind, caption.text) for caption in record.captions] == [("prompt", "short"), ("llava", "long")]
    assert record.columns == {"note": "no caption"}


# -- features ----------------------------------------------------------------------------------------------------------


def test_features_beside_pictures_and_alone(tmp_path):
    latents, features = np.ones((4, 2, 2), np.float32), np.full((1, 3, 5), 2, np.float16)
    for folder in ("with", "alone"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "a.npy", latents)
        np.savez(tmp_path / folder / "a.npz", caption_feature=features, attention_mask=np.ones((1, 3)))
        (tmp_path / folder / "a.txt").write_text("a caption")
    (tmp_path / "with" / "a.png").write_bytes(encoded(pixels(), "PNG"))
    np.save(tmp_path / "with" / "b.npy", latents)
    lines: list[str] = []
    for folder, size in (("with", (48, 64)), ("alone", None)):
        source = open_source(ImageDataConfig(path=str(tmp_path / folder)), lines.append)
        (record,) = source.records
        assert record.size == size
        found = source.features(record)
        assert sorted(found) == ["attention_mask", "caption_feature", "npy"]
        assert np.array_equal(found["npy"], latents)
        assert np.array_equal(found["caption_feature"], features)
    assert any("files of features have no picture of the same name and are left out: b.npy" in line for line in lines)
    with pytest.raises(UserError, match="features and no picture"):
        source.read(record)


def test_features_in_a_tar_and_damaged_ones(tmp_path):
    data = io.BytesIO()
    np.save(data, np.arange(3))
    pickled = io.BytesIO()
    np.save(pickled, np.asarray([{}], object), allow_pickle=True)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("a", data.getvalue()), ("b", b"no array"), ("c", pickled.getvalue())):
            add_member(tar, f"{name}.npy", content)
            add_member(tar, f"{name}.txt", b"a caption")
    source = open_source(ImageDataConfig(path=str(tmp_path)), lambda line: None)
    assert np.array_equal(source.features(source.records[0])["npy"], [0, 1, 2])
    for record in source.records[1:]:
        with pytest.raises(BadPicture, match="holds no arrays"):
            source.features(record)


# -- damage and mistakes -----------------------------------------------------------------------------------------------


def test_a_manifest_with_bad_rows(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(pixels(), "PNG"))
    lines = [
        json.dumps({"file_name": "a.png", "text": "good"}),
        "{not json",
        "[1, 2]",
        json.dumps({"text": "no picture"}),
        json.dumps({"file_name": "gone.png", "text": "missing"}),
        json.dumps({"file_name": "https://example.org/b.png", "text": "far away"}),
        json.dumps({"file_name": "a\0.png", "text": "a zero byte"}),
        "",
        json.dumps({"file_name": "a.png", "text": "the same again"}),
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    said: list[str] = []
    source = open_source(ImageDataConfig(path=str(tmp_path / "list.jsonl"), max_bad_share=0.9), said.append)
    assert [record.key for record in source.records] == ["a", "a#2"]
    reasons = {problem.name: problem.reason for problem in source.problems}
    assert reasons["list.jsonl line 2"].startswith("is not JSON")
    assert reasons["list.jsonl line 3"] == "holds a list instead of a JSON object"
    assert reasons["list.jsonl line 4"] == "names no picture"
    assert reasons["gone.png"] == "is missing"
    assert "web address" in reasons["https://example.org/b.png"]
    assert len(reasons) == 6


def test_numbers_in_a_csv(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(pixels(), "PNG"))
    (tmp_path / "m.csv").write_text(
        "\ufeffpath,text,zoom,count,code,mixed,gap\na.png,one,0.5,3,007,1,2\na.png,two,1e-1,-4,010,x,\n"
    )
    first, second = open_source(ImageDataConfig(path=str(tmp_path / "m.csv")), lambda line: None).records
    assert first.columns == {"zoom": 0.5, "count": 3, "code": "007", "mixed": "1", "gap": 2}
    assert second.columns == {"zoom": 0.1, "count": -4, "code": "010", "mixed": "x"}
    assert isinstance(first.columns["count"], int)


def test_a_tar_that_is_cut_off_or_none(tmp_path):
    write_tar(tmp_path / "0.tar", samples()[:6])
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.tar").write_bytes(b"this is no tar at all" * 100)
    source = open_source(
        ImageDataConfig(path=str(tmp_path), max_bad_share=0.9, missing_captions="empty"), lambda line: None
    )
    keys = [record.key for record in source.records]
    assert [key for key in keys if key.startswith("0/")] == [f"0/photo_{index}" for index in range(6)]
    assert 0 < sum(key.startswith("1/") for key in keys) < 6
    assert any(problem.name.startswith("1.tar") for problem in source.problems)
    assert any(problem.name.startswith("2.tar") for problem in source.problems)


@pytest.mark.parametrize(("more", "says"), [(b"\0" * 20480, None), (b"more", "goes on"), (None, "is cut off")])
def test_the_end_of_a_tar(tmp_path, more, says):
    data = write_tar(tmp_path / "0.tar", samples()[:6]).read_bytes()
    (tmp_path / "0.tar").write_bytes(data + (more or b""))
    with tarfile.open(tmp_path / "0.tar") as tar:
        last = tar.getmembers()[-1]
    if more is None:
        (tmp_path / "0.tar").write_bytes(data[: last.offset_data + -(-last.size // 512) * 512])
    source = open_source(ImageDataConfig(path=str(tmp_path), max_bad_share=0.5), lambda line: None)
    assert len(source) == 6
    assert [problem.reason.startswith(says) for problem in source.problems] == [True] * (says is not None)


def test_a_shard_that_is_missing(tmp_path):
    path = write_wids(tmp_path / "set", samples()[:6])
    (path / "shards/1.tar").unlink()
    source = open_source(ImageDataConfig(path=str(path), max_bad_share=0.5), lambda line: None)
    assert len(source) == 3
    assert [problem.name for problem in source.problems] == ["shards/1.tar"]


def test_a_compressed_tar(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w:gz") as tar:
        add_member(tar, "a.png", encoded(pixels(), "PNG"))
    with pytest.raises(UserError, match=r"is compressed.*unpack"):
        open_source(ImageDataConfig(path=str(tmp_path)), lambda line: None)


def test_another_size_than_stated(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add_member(tar, "a.png", encoded(pixels(), "PNG"))
        add_member(tar, "a.json", json.dumps({"prompt": "x", "height": 9, "width": 9}).encode())
    said: list[str] = []
    (record,) = open_source(ImageDataConfig(path=str(tmp_path)), said.append).records
    assert record.size == (48, 64)
    assert any("1 pictures have another size than the data states" in line for line in said)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.xyz", "", "of no known kind"),
        ("a.jsonl", '{"a": 1}', "has the columns a; one of them must name the pictures"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "{}", "holds a dict; allowed is a list"),
        ("meta_data.json", "{}", "has no list of texts img_names"),
        ("wids-meta.json", "{}", "has no shardlist"),
        ("a.csv", "", r"a.csv has no rows that can be used; write one"),
        ("a.csv", "file_name,text\na.png\n", r"below its first line 'file_name,text' \(a.csv line 2 has 1 cells, the"),
        ("a.csv", "file_name,text,text\na.png,a,b\n", "has the column 'text' 2 times"),
        ("a.csv", "file_name;n;n ;\na.png;1;2;\n", "has the column 'n' 2 times"),
        ("a.jsonl", "{\n", r"has no rows that can be used \(a.jsonl line 1 is not JSON"),
    ],
)
def test_files_that_are_no_data_set(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        open_source(ImageDataConfig(path=str(tmp_path / name)), lambda line: None)
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_source(ImageDataConfig(path=str(tmp_path / "gone")), lambda line: None)
    with pytest.raises(UserError, match=r"can't be read \(File name too long\)"):
        open_source(ImageDataConfig(path="x" * 5000), lambda line: None)
    with pytest.raises(UserError, match=r"--data\.path is missing"):
        open_source(ImageDataConfig(), lambda line: None)
    with pytest.raises(UserError, match="has no picture that can be used"):
        open_source(ImageDataConfig(path=str(tmp_path)), lambda line: None)


def test_pyarrow_is_optional(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "set", samples()[:6])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        open_source(ImageDataConfig(path=str(path)), lambda line: None)


def test_the_format_can_be_named(tmp_path):
    path = write_jsonl(tmp_path / "set", samples()[:2])
    assert find_format(path) == "manifest"
    source = open_source(
        ImageDataConfig(path=str(path), format="folder", missing_captions="empty", group_column="folder"),
        lambda line: None,
    )
    assert [(record.key, record.group) for record in source.records][:1] == [("controls/photo_0", "controls")]
    assert len(source) == 4
    with pytest.raises(UserError, match="is no folder"):
        open_source(ImageDataConfig(path=str(path / "metadata.jsonl"), format="folder"), lambda line: None)


def test_a_manifest_in_the_folder_train(tmp_path):
    write_jsonl(tmp_path / "train", samples()[:2])
    write_jsonl(tmp_path / "test", samples()[2:3])
    said: list[str] = []
    source = open_source(ImageDataConfig(path=str(tmp_path)), said.append)
    assert len(source) == 2
    assert any("train/metadata.jsonl is read, and no other folder" in line for line in said)


def test_small_pictures_and_unknown_groups(tmp_path):
    path = write_jsonl(tmp_path / "set", samples()[:6])
    lines: list[str] = []
    source = open_source(ImageDataConfig(path=str(path), minimum_size=26), lines.append)
    assert [record.size for record in source.records] == [(26, 28), (29, 27), (32, 26)]
    assert any("3 pictures have a side below --data.minimum-size 26 and are left out" in line for line in lines)
    with pytest.raises(UserError, match=r"shape: .* has none; it has the columns zoom, group, control"):
        open_source(ImageDataConfig(path=str(path), group_column="shape"), lines.append)
