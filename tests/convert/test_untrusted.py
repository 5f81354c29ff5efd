"""Three hundred random mutations of good sources: each is refused in words, or converted to equal weights."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert.main import main
from convert.sources import open_model
from sana_jax.errors import UserError
from tests.convert.cases import as_original, files_of, transformer

SECONDS = 30
CHUNKS, PER_CHUNK = 10, 30
QUICK_CHUNKS = 5  # in make test; the others are in make prove
WEIGHTS = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
JSON_FILES = ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json", INDEX)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
ODD_VALUES: tuple[Any, ...] = (
    None,
    -1,
    0,
    1.5,
    "x",
    "../../../etc/passwd",
    "/etc/passwd",
    [],
    {},
    [[]],
    True,
    10**30,
    10**9,
    2**62,
    float("inf"),
    float("nan"),
    "A" * 100_000,
    {"a": {"b": [1]}},
    ["diffusers", "SanaVideoTransformer3DModel"],
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A tiny model directory whose weights are two shards, and an original file."""
    root = tmp_path_factory.mktemp("good")
    model = transformer(num_layers=2)
    model.save_pretrained(root / "model" / "transformer", max_shard_size="150KB")
    assert (root / "model" / WEIGHTS).is_file()
    files: dict[str, Any] = {
        "model_index.json": {
            "_class_name": "SanaPipeline",
            "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
            "tokenizer": ["transformers", "GemmaTokenizerFast"],
            "transformer": ["diffusers", "SanaTransformer2DModel"],
        },
        "scheduler/scheduler_config.json": {"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 3.0},
        "tokenizer/tokenizer.json": {
            "version": "1.0",
            "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"},
            "added_tokens": [],
        },
    }
    for name, content in files.items():
        (root / "model" / name).parent.mkdir(exist_ok=True)
        (root / "model" / name).write_text(json.dumps(content))
    torch.save({"state_dict": as_original(model.state_dict())}, root / "original.pth")
    return root


# -- mutations: each takes the source's copy, a random generator, and where a pickle that runs leaves its mark -------


class Executes:
    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self):
        return os.mkdir, (str(self.trap),)


def any_weights(source: Path, rng: np.random.Generator) -> Path:
    return rng.choice(sorted((source / "transformer").glob("*.safetensors")))


def header_of(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put_header(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def truncate(source, rng, trap):
    path = any_weights(source, rng)
    path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])


def append(source, rng, trap):
    path = any_weights(source, rng)
    path.write_bytes(path.read_bytes() + bytes(int(rng.integers(1, 100))))


def header_length(source, rng, trap):
    path = any_weights(source, rng)
    header, data = header_of(path)
    put_header(path, header, data, int(rng.choice([0, 1, 7, 10**6, 99_999_999, 2**31, 2**40, 2**63 - 1])))


def header_text(source, rng, trap):
    path = any_weights(source, rng)
    _, data = header_of(path)
    texts = [b"", b"[]", b"null", b"3", b'{"a": 1}', b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 50_000, b"{" + b" " * 9]
    put_header(path, texts[rng.integers(len(texts))], data)


def header_entry(source, rng, trap):
    path = any_weights(source, rng)
    header, data = header_of(path)
    name = rng.choice([name for name in header if name != "__metadata__"])
    field = rng.choice(["dtype", "shape", "data_offsets"])
    odd = {
        "dtype": ["F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "f32", 3, None, ["F32"]],
        "shape": [[-1, 4], [2**62, 2**62], [2**40], [1.5], "3", None, [], [[3]], [True], [10**30], [0]],
        "data_offsets": [[0, 0], [0], [-4, 0], [4, 0], [0, 2**62], "0", None, [0.0, 4.0], [0, 10**30]],
    }[field]
    header[name][field] = odd[rng.integers(len(odd))]
    put_header(path, header, data)


def rename_tensor(source, rng, trap):
    path = any_weights(source, rng)
    header, data = header_of(path)
    name = rng.choice([name for name in header if name != "__metadata__"])
    odd = ["renamed", "", "../x", "patch_embedding.weight", name + ".", name.upper(), "\ud800x", "x" * 10_000]
    header[odd[rng.integers(len(odd))]] = header.pop(name)
    put_header(path, header, data)


def reorder_header(source, rng, trap):
    path = any_weights(source, rng)
    header, data = header_of(path)
    put_header(path, {name: header[name] for name in rng.permutation(list(header))}, data)


def header_metadata(source, rng, trap):
    path = any_weights(source, rng)
    header, data = header_of(path)
    header["__metadata__"] = ODD_VALUES[rng.integers(len(ODD_VALUES))]
    put_header(path, header, data)


def not_finite(source, rng, trap):
    path = any_weights(source, rng)
    header, data = header_of(path)
    values = np.frombuffer(data, np.float32).copy()
    values[rng.integers(values.size)] = rng.choice([np.nan, np.inf, -np.inf])
    put_header(path, header, values.tobytes())


def duplicate_key(source, rng, trap):
    path = any_weights(source, rng)
    header, data = header_of(path)
    name = rng.choice([name for name in header if name != "__metadata__"])
    text = json.dumps(header)[:-1] + ", " + json.dumps(name) + ": " + json.dumps({**header[name], "dtype": "I32"}) + "}"
    put_header(path, text.encode(), data)


def any_file(source: Path, rng: np.random.Generator) -> Path:
    names = [*JSON_FILES, WEIGHTS, WEIGHTS.replace("-00001", "-00002"), "tokenizer/tokenizer.json"]
    return source / rng.choice(names)


def replace_file(source, rng, trap):
    path = any_file(source, rng)
    path.unlink()
    kind = rng.integers(7)
    if kind == 0:
        path.write_bytes(POINTER)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        (path.parent / "other").symlink_to(path.name)
        path.symlink_to("other")
    elif kind == 4:
        path.write_bytes(b"")
    elif kind == 5:
        path.write_bytes(pickle.dumps(Executes(trap)))


def pickles_beside(source, rng, trap):
    """Pickles that nobody asked for, beside or instead of the weights."""
    names = ["diffusion_pytorch_model.bin", "model.pkl", "pytorch_model.bin", "diffusion_pytorch_model.pt", "config.py"]
    (source / "transformer" / rng.choice(names)).write_bytes(pickle.dumps(Executes(trap)))
    (source / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(Executes(trap)))
    if rng.integers(2):
        for path in (source / "transformer").glob("diffusion_pytorch_model*.safetensors*"):
            path.unlink()


def json_text(source, rng, trap):
    path = source / rng.choice(JSON_FILES)
    texts = [
        b"", b"[]", b"null", b"3", b'"x"', b"{", b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}", b"{}", b"NaN", POINTER, b'{"a": 1}' * 2, b"\x00" * 100,
    ]  # fmt: skip
    path.write_bytes(texts[rng.integers(len(texts))])


def json_field(source, rng, trap):
    path = source / rng.choice(JSON_FILES)
    content = json.loads(path.read_text())
    name = rng.choice(list(content))
    value = ODD_VALUES[rng.integers(len(ODD_VALUES))]
    kind = rng.integers(4)
    if kind == 0:
        del content[name]
    elif kind == 1:
        content[str(rng.choice(["colour", "../evil", "/etc", "..", ".", "", "a/b", "\x00"]))] = value
    else:
        content[name] = value
    path.write_text(json.dumps(content))


def shard_names(source, rng, trap):
    path = source / INDEX
    index = json.loads(path.read_text())
    name = rng.choice(list(index["weight_map"]))
    shards = [
        "../model_index.json", "../../../../../etc/passwd", "/etc/passwd", "../transformer/" + Path(WEIGHTS).name, "",
        "missing.safetensors", ".", "..", "a\x00.safetensors", 3, None, ["x"], "x" * 5000 + ".safetensors",
        Path(INDEX).name, "..\\evil.safetensors", "~/x.safetensors", "/dev/zero", "loop.safetensors",
    ]  # fmt: skip
    (source / "transformer" / "loop.safetensors").symlink_to("loop.safetensors")
    kind = rng.integers(4)
    if kind == 0:
        del index["weight_map"][name]
    elif kind == 1:
        index["weight_map"]["one.more"] = Path(WEIGHTS).name
    else:
        index["weight_map"][name] = shards[rng.integers(len(shards))]
    path.write_text(json.dumps(index))


def odd_devices(source, rng, trap):
    path = any_file(source, rng)
    path.unlink()
    path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/proc/self/mem", "/", "/dev/stdin"]))


DIRECTORY: tuple[Callable[[Path, np.random.Generator, Path], None], ...] = (
    truncate,
    append,
    header_length,
    header_text,
    header_entry,
    header_entry,
    rename_tensor,
    reorder_header,
    header_metadata,
    not_finite,
    duplicate_key,
    replace_file,
    replace_file,
    pickles_beside,
    json_text,
    json_field,
    json_field,
    json_field,
    shard_names,
    shard_names,
    odd_devices,
)


def mutate_archive(path: Path, rng: np.random.Generator, trap: Path) -> None:
    """A mutation of the original file."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    program = next(name for name in entries if name.endswith("data.pkl"))
    kind = rng.integers(8)
    if kind == 0:
        path.write_bytes(content[: rng.integers(len(content))])
        return
    if kind == 1:  # in the pickle, where every byte means something
        begin = content.find(entries[program])
        content[begin + rng.integers(len(entries[program]))] = rng.integers(256)
        path.write_bytes(content)
        return
    if kind == 2:  # in the directory at the archive's end
        content[-int(rng.integers(1, 2000))] = rng.integers(256)
        path.write_bytes(content)
        return
    if kind == 3:
        entries[program] = pickle.dumps({"state_dict": Executes(trap)}, int(rng.integers(6)))
    elif kind == 4:
        entries[program] = b"\x80\x02" + b"(" * 50_000 + b"t" * 50_000 + b"."
    elif kind == 5:
        del entries[rng.choice(list(entries))]
    elif kind == 6:
        name = rng.choice([name for name in entries if "/data/" in name])
        entries[name] = entries[name][: rng.integers(len(entries[name]))]
    elif kind == 7:
        path.write_bytes(pickle.dumps(Executes(trap), int(rng.integers(6))))
        return
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


class TooSlow(BaseException):
    pass


def time_out(*_):
    raise TooSlow


def weights_of(path: Path) -> dict[str, tuple[str, tuple, bytes]]:
    (component,) = open_model(path).components
    source = component.source
    return {name: (str(i.dtype), i.shape, source.read(name).tobytes()) for name, i in source.tensors.items()}


def run(words: list[str], where: str) -> str | None:
    """The error that a command ends with, in words; None where it ends well. Anything else fails the test."""
    signal.signal(signal.SIGALRM, time_out)
    signal.alarm(SECONDS)
    try:
        main(words)
    except (UserError, FileNotFoundError) as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
    return None


@pytest.mark.parametrize(
    "chunk", [pytest.param(chunk, marks=pytest.mark.prove if chunk >= QUICK_CHUNKS else ()) for chunk in range(CHUNKS)]
)
def test_mutations(chunk, good, tmp_path, tiny_widths, capsys):
    wanted = weights_of(good / "model")
    outcomes = {"refused": 0, "equal": 0}
    for number in range(PER_CHUNK):
        rng = np.random.default_rng([chunk, number])
        place = tmp_path / str(number)
        place.mkdir()
        trap, destination = tmp_path / f"executed {number}", place / "ours"
        if number % 6 == 5:
            source = Path(shutil.copy(good / "original.pth", place / "source.pth"))
            mutation = "archive"
            mutate_archive(source, rng, trap)
        else:
            source = Path(shutil.copytree(good / "model", place / "source"))
            mutate = DIRECTORY[(chunk * PER_CHUNK + number) % len(DIRECTORY)]
            mutation = mutate.__name__
            mutate(source, rng, trap)
        where = f"mutation {mutation} {chunk}/{number}"
        problem = run(["import", str(source), str(destination)], where)
        if problem is None:
            assert weights_of(destination) == wanted, f"{where} changed weights without an error"
            assert sorted(path.name for path in place.iterdir()) == ["ours", source.name]
            outcomes["equal"] += 1
        else:
            assert problem, where
            assert sorted(path.name for path in place.iterdir()) == [source.name], f"{where}: {problem}"
            outcomes["refused"] += 1
        run(["inspect", str(source)], f"inspect after {where}")
        assert not trap.exists(), f"{where} was executed"
        shutil.rmtree(place)
    assert outcomes["refused"] > PER_CHUNK / 2, outcomes
    capsys.readouterr()


def test_the_good_ones_convert(good, tmp_path, tiny_widths, capsys):
    wanted = weights_of(good / "model")
    for source in ("model", "original.pth"):
        assert main(["import", str(good / source), str(tmp_path / source)]) == 0
        assert weights_of(tmp_path / source) == wanted
    assert files_of(tmp_path / "model")
    capsys.readouterr()
