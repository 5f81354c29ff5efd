"""The cache's files: whole or absent, damage found and named, other identities refused."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from sana_jax.errors import CheckpointError, UserError
from train.data import cache as cache_module
from train.data.cache import LATENTS, PROMPTS, CacheIdentity, CacheReader, CacheWriter, Layout

IDENTITY = CacheIdentity({"autoencoder.class": "X", "pictures.sizes": "8x8", "latents.dtype": "bfloat16"})


def arrays(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {
        "latents": rng.standard_normal((3, 2 + number % 2, 4)).astype(ml_dtypes.bfloat16),
        "zoom": np.float32(number),
        "object": rng.standard_normal(5).astype(np.float32),
    }


def write(directory: Path, shards: int = 3, records: int = 4, **options) -> list[str]:
    """A finished cache; what was said."""
    lines: list[str] = []
    with CacheWriter(directory, IDENTITY, say=lines.append, **options) as cache:
        present = cache.present(LATENTS)
        for shard in range(shards):
            names = [(f"picture {shard * records + i}", "center") for i in range(records)]
            if all(name in present for name in names):
                continue
            writer = cache.new_shard(LATENTS)
            for i, name in enumerate(names):
                writer.add(name, arrays(shard * records + i), signature="s")
            cache.keep(writer.close())
        cache.write_samples(iter([{"key": "picture 0"}]))
    return lines


def records(directory: Path) -> dict:
    reader = CacheReader(directory)
    return {name: reader.read(place) for name, place in reader.places(LATENTS).items()}


def assert_all_there(directory: Path, count: int = 12) -> None:
    found = records(directory)
    assert found.keys() == {(f"picture {i}", "center") for i in range(count)}
    for (key, _), own in found.items():
        want = arrays(int(key.split()[1]))
        assert own.keys() == want.keys()
        for name, array in want.items():
            assert own[name].dtype == np.asarray(array).dtype
            np.testing.assert_array_equal(own[name], array)


def names_of(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_what_is_written_is_read(tmp_path):
    assert write(tmp_path / "cache") == []
    assert_all_there(tmp_path / "cache")
    reader = CacheReader(tmp_path / "cache")
    assert reader.identity == IDENTITY
    assert list(reader.samples()) == [{"key": "picture 0"}]
    assert reader.places(PROMPTS) == {}
    place = reader.places(LATENTS)["picture 3", "center"]
    assert reader.layout(place) == Layout.of(arrays(3))
    with pytest.raises(ValueError, match="read-only"):
        reader.read(place)["latents"][:] = 0


def test_a_later_record_takes_the_place_of_an_earlier_one(tmp_path):
    write(tmp_path)
    with CacheWriter(tmp_path, IDENTITY) as cache:
        writer = cache.new_shard(LATENTS)
        writer.add(("picture 1", "center"), arrays(99), signature="changed")
        cache.keep(writer.close())
        assert cache.present(LATENTS)["picture 1", "center"] == "changed"
    np.testing.assert_array_equal(records(tmp_path)["picture 1", "center"]["zoom"], 99)


def test_many_threads_read_at_once_with_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_MOST_OPEN", 2)
    write(tmp_path, shards=6)
    reader = CacheReader(tmp_path)
    places = reader.places(LATENTS)

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 24, 60):
            np.testing.assert_array_equal(
                reader.read(places[f"picture {number}", "center"])["object"], arrays(number)["object"]
            )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert len(reader._open) <= 2


@pytest.mark.parametrize("leftover", [".latents-00001.arrayrecord.123.tmp", "latents-00001.arrayrecord"])
def test_a_shard_that_was_not_finished_goes(tmp_path, leftover):
    write(tmp_path, shards=1)
    (tmp_path / leftover).write_bytes(b"half")
    lines = write(tmp_path)
    assert [line for line in lines if leftover in line and "not finished" in line]
    assert_all_there(tmp_path)
    assert not (tmp_path / ".latents-00001.arrayrecord.123.tmp").exists()


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    # the middle of the last record
    position = content.rfind(np.ascontiguousarray(arrays(7)["object"]).tobytes()) + 9
    assert position > 9
    content[position] ^= 16
    path.write_bytes(content)


def swap(path: Path) -> None:
    other = path.with_name(path.name.replace("00001", "00002"))
    assert other.stat().st_size == path.stat().st_size
    path.write_bytes(other.read_bytes())


DAMAGE = [shorten, empty, Path.unlink, flip_a_bit, swap]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_named_and_made_again(tmp_path, damage):
    write(tmp_path)
    damage(tmp_path / "latents-00001.arrayrecord")
    lines = write(tmp_path, thorough=True)
    assert len(lines) == 1
    assert "latents-00001.arrayrecord" in lines[0]
    assert "its 4 records are made again" in lines[0]
    assert_all_there(tmp_path)


@pytest.mark.parametrize("damage", [shorten, empty, Path.unlink])
def test_damage_that_a_look_at_sizes_finds_is_found_when_a_cache_is_opened(tmp_path, damage):
    write(tmp_path)
    damage(tmp_path / "latents-00001.arrayrecord")
    with pytest.raises(CheckpointError, match=r"latents-00001\.arrayrecord .*precompute"):
        CacheReader(tmp_path)
    assert len(write(tmp_path)) == 1
    assert_all_there(tmp_path)


def test_a_flipped_bit_is_found_when_its_record_is_read(tmp_path):
    write(tmp_path)
    flip_a_bit(tmp_path / "latents-00001.arrayrecord")
    reader = CacheReader(tmp_path)
    places = reader.places(LATENTS)
    reader.read(places["picture 4", "center"])
    with pytest.raises(CheckpointError, match=r"latents-00001\.arrayrecord is damaged"):
        reader.read(places["picture 7", "center"])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 2}', '{"format": 1, "layouts": [["x"]]}'])
def test_a_damaged_description_of_a_shard(tmp_path, content):
    write(tmp_path)
    (tmp_path / "latents-00001.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"latents-00001\.json"):
        CacheReader(tmp_path)
    assert "latents-00001" in write(tmp_path)[0]
    assert_all_there(tmp_path)


def test_another_identity_is_refused_with_both_values(tmp_path):
    write(tmp_path)
    other = CacheIdentity({**IDENTITY.fields, "pictures.sizes": "16x16", "conditions.zoom.kind": "scalar"})
    with pytest.raises(CheckpointError) as error:
        CacheWriter(tmp_path, other)
    assert write(tmp_path) == [], "the one that was refused still holds the lock"
    message = str(error.value)
    assert 'pictures.sizes is "8x8" there, "16x16" here' in message
    assert 'conditions.zoom.kind is null there, "scalar" here' in message
    assert "--data.cache" in message
    assert "autoencoder" not in message
    assert other.id != IDENTITY.id
    assert_all_there(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("cache.json", "{", "is damaged"),
        ("cache.json", "{}", "is damaged"),
        ("cache.json", '{"format": 99, "identity": {}}', "format 99"),
        ("samples.jsonl", '{"key": "x"}\n{"ke', "line 2"),
    ],
)
def test_damaged_lists(tmp_path, file, content, words):
    write(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=words):
        list(CacheReader(tmp_path).samples())


def test_no_cache_and_an_unfinished_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no cache"):
        CacheReader(tmp_path / "none")
    write(tmp_path)
    (tmp_path / "samples.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="is not finished"):
        CacheReader(tmp_path)


def test_places_that_are_no_cache_are_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"1")
    with pytest.raises(UserError, match=r"holds a\.jpg but no cache\.json"):
        CacheWriter(tmp_path / "photos", IDENTITY)
    with pytest.raises(UserError, match="is a file"):
        CacheWriter(tmp_path / "photos" / "a.jpg", IDENTITY)
    assert names_of(tmp_path / "photos") == {"a.jpg"}


def fill(writer) -> None:
    for number in range(10):
        writer.add((f"big {number}", "center"), {"latents": np.zeros(1 << 18, np.float32)})
    writer.close()


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CacheWriter(tmp_path, IDENTITY) as cache:
        writer = cache.new_shard(LATENTS)
        writer.add(("big", "center"), {"latents": np.zeros(1 << 18, np.float32)})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(UserError, match="can't be written to") as error:
                fill(writer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "--data.cache" in str(error.value)
    assert names_of(tmp_path) == {"cache.json", ".lock"}


def test_a_second_process_waits_for_the_first(tmp_path):
    first = CacheWriter(tmp_path, IDENTITY)
    lines: list[str] = []
    done = threading.Event()

    def second() -> None:
        CacheWriter(tmp_path, IDENTITY, say=lines.append).close()
        done.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert not done.wait(0.3)
    assert "another process is writing" in lines[0]
    first.close()
    thread.join(10)
    assert done.is_set()


def test_names_that_are_no_unicode_survive(tmp_path):
    key = "caf\udce9 日本"
    with CacheWriter(tmp_path, IDENTITY) as cache:
        writer = cache.new_shard(LATENTS)
        writer.add((key, "center"), arrays(0))
        cache.keep(writer.close())
        cache.write_samples(iter([{"key": key}]))
    assert list(records(tmp_path)) == [(key, "center")]
    assert next(CacheReader(tmp_path).samples()) == {"key": key}


def test_what_was_left_out_is_remembered(tmp_path):
    with CacheWriter(tmp_path, IDENTITY) as cache:
        writer = cache.new_shard(LATENTS)
        writer.add(("a", "center"), arrays(0))
        writer.leave_out(("b", "center"), "b is damaged")
        cache.keep(writer.close())
    with CacheWriter(tmp_path, IDENTITY) as cache:
        assert cache.left_out() == {("b", "center"): "b is damaged"}
    assert json.loads((tmp_path / "latents-00000.json").read_text())["left_out"] == [["b", "center", "b is damaged"]]


def test_opening_reads_no_records(tmp_path):
    write(tmp_path)
    reader = CacheReader(tmp_path)
    reader.places(LATENTS)
    assert not reader._open
    reader.read(next(iter(reader.places(LATENTS).values())))
    assert len(reader._open) == 1
