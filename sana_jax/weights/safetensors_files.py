"""Safetensors files: one tensor at a time, and nothing of the header believed.

The safetensors library maps a whole file into memory or builds a whole file in it. Reading and writing a tensor at a
time keeps a conversion's memory near the size of the weights. A file is untrusted input: sizes, offsets and types are
checked before anything is allocated. Format: 8 bytes length (little endian), a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from sana_jax.errors import CheckpointError
from sana_jax.files import atomic_file, read_json
from sana_jax.weights.messages import first_few

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
STEMS = ("diffusion_pytorch_model", "model")  # how diffusers and transformers call a component's weights
_MODEL_INDEX = "model_index.json"
_LONGEST_HEADER = 100_000_000  # bytes; what the format allows
LFS_POINTER = b"version https://git-lfs"
_AGAIN = "download or copy it again"


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read."""

    dtype: np.dtype
    shape: tuple[int, ...]


class TensorSource(Protocol):
    """Named tensors that are read one at a time.

    ``location`` names the source in messages; ``tensors`` says what there is.
    """

    location: str
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own."""
        ...


class _Place(NamedTuple):
    file: Path
    offset: int


class SafetensorsSource:
    """The tensors of one file, or of all shards of an index.

    Attributes:
        location: the file or the index.
        tensors: name -> dtype and shape.
        metadata: the headers' ``__metadata__``, strings to strings.
        files: the files that hold tensors, with their sizes in bytes.

    Raises:
        FileNotFoundError: the file, or a shard that the index names, is missing.
        CheckpointError: a file is not whole, or not what its header says.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        self.location = str(path)
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.files: tuple[tuple[Path, int], ...] = ()
        self._places: dict[str, _Place] = {}
        if path.suffix != ".json":
            self._add_file(path)
            return
        shards: dict[Path, set[str]] = {}
        for name, shard in _read_index(path).items():
            shards.setdefault(path.parent / shard, set()).add(name)
        for shard in sorted(shards):
            self._add_file(shard)
        promised = set().union(*shards.values())
        if promised != set(self.tensors):
            odd = sorted(promised ^ set(self.tensors))
            raise CheckpointError(
                f"{path} and its shards name different tensors: {first_few(odd, 'tensors')}; {_AGAIN}"
            )

    def read(self, name: str) -> np.ndarray:
        """One tensor.

        Raises:
            KeyError: there is none of this name.
            CheckpointError: the file has become shorter, or the tensor holds values that are not finite.
        """
        dtype, shape = self.tensors[name]
        file, offset = self._places[name]
        count = int(np.prod(shape, dtype=np.int64))
        try:
            array = np.fromfile(file, dtype, count, offset=offset)
        except OSError as error:
            raise CheckpointError(f"{file} can't be read ({error.strerror}); {_AGAIN}") from error
        if array.size != count:
            raise CheckpointError(f"{file} ends within the tensor {name}; {_AGAIN}")
        if not all_finite(array):
            raise CheckpointError(
                f"the tensor {name} of {file} has values that are not finite, which no good checkpoint has; {_AGAIN}"
            )
        return array.reshape(shape)

    def _add_file(self, path: Path) -> None:
        header, start = read_header(path)
        self.files += ((path, path.stat().st_size),)
        self.metadata.update(header.pop("__metadata__", {}))
        for name, entry in header.items():
            if name in self.tensors:
                raise CheckpointError(f"the tensor {name} is in {self._places[name].file} and in {path}; {_AGAIN}")
            self.tensors[name] = TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]))
            self._places[name] = _Place(path, start + entry["data_offsets"][0])


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A file's checked header, ``__metadata__`` included, and where its tensors' bytes begin.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the header does not describe the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the weights file {path} is missing; {_AGAIN}")
    try:
        return _read_header(path)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror}); {_AGAIN}") from error


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(len(LFS_POINTER))
        if prefix == LFS_POINTER:
            raise CheckpointError(f"{path} is a pointer to the weights, not the weights: fetch them with git lfs pull")
        length = int.from_bytes(prefix[:8], "little")
        if size < 8 or length > min(_LONGEST_HEADER, size - 8):
            raise CheckpointError(
                f"{path} ({size} bytes) is not a whole safetensors file: its header would be {length} bytes; {_AGAIN}"
            )
        file.seek(8)
        text = file.read(length)
    try:
        header = json.loads(text)
        _check_header(header, size - 8 - length)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}; {_AGAIN}") from error
    return header, 8 + length


def _check_header(header: Any, data_bytes: int) -> None:
    """Raises ``ValueError`` unless the entries are well formed and fill the data without gap or overlap."""
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not strings")
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not is_tensor_name(name):
            raise ValueError(f"{name[:100]!r} is no tensor's name")
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"its entry of {name!r} is not dtype, shape and data_offsets")
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name!r} has dtype {entry['dtype']!r}, allowed are {', '.join(DTYPES)}")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
            raise ValueError(f"shape {shape!r} or data_offsets {offsets!r} of {name!r} are not whole numbers")
        count = 1
        for length in shape:
            count *= length
        if offsets[1] - offsets[0] != count * DTYPES[entry["dtype"]].itemsize:
            raise ValueError(f"{name!r} of shape {shape} does not fill its {offsets[1] - offsets[0]} bytes")
        spans.append((*offsets, name))
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            raise ValueError(f"{name!r} begins at byte {begin} and not at {end}")
        end = stop
    if end != data_bytes:
        raise ValueError(f"its tensors take {end} bytes, and there are {data_bytes}")


def is_tensor_name(name: Any) -> bool:
    """Whether a name can be printed: no control characters, nothing that is not text, not endless."""
    return isinstance(name, str) and name.isprintable() and 0 < len(name) <= 1000


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)


def _read_index(path: Path) -> dict[str, str]:
    """An index's ``weight_map``: tensor -> file name beside the index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path} is not an index of weights: it has no weight_map; {_AGAIN}")
    for name, shard in weight_map.items():
        # A name with a directory in it could reach any file of the machine; file systems end at 255 bytes.
        plain = isinstance(shard, str) and Path(shard).name == shard and len(shard.encode(errors="replace")) <= 255
        if not plain or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} says that {name!r} is in {str(shard)[:80]!r}; allowed is a .safetensors file's name beside "
                "it: do not use this directory"
            )
    return weight_map


def find_weights_file(
    directory: Path, stem: str, variant: str | None = None, *, say: Callable[[str], None] | None = None
) -> Path:
    """The weights file of a component's directory, or the index of its shards.

    A component of a model may lack a variant that another component of the model has, as diffusers allows: then it is
    read as if none were chosen.

    Args:
        directory: for example ``transformer``.
        stem: ``diffusion_pytorch_model`` (diffusers) or ``model`` (transformers).
        variant: ``bf16``, ``fp16``, ...; None takes the plain files, or the one variant that is there.
        say: takes a line where another file than that of the variant is read.

    Raises:
        FileNotFoundError: none is there, or several variants and none is chosen, or no component has the variant.
    """
    found, shards = _weight_files(directory, stem)
    wanted, there = variant or "", {**found, **shards}
    if variant is None and wanted not in there and len(there) == 1:
        wanted = next(iter(there))
    if wanted in found:
        return found[wanted]
    if wanted in shards:
        index = f"{stem}.safetensors.index{'.' + wanted if wanted else ''}.json"
        raise FileNotFoundError(
            f"{directory} has shards ({shards[wanted].name}, ...) without their index: {index} is missing; download it"
        )
    if variant and (directory.parent / _MODEL_INDEX).is_file():
        check_variant(directory.parent, variant)
        file = find_weights_file(directory, stem)
        if say is not None:
            say(no_variant_line(directory, variant, file))
        return file
    name = f"{stem}{'.' + variant if variant else ''}.safetensors"
    if not found and (pickle := find_pickle(directory)):
        raise FileNotFoundError(
            f"{directory} has no {name}; its weights are in {pickle.name}, a pickle, which is not read: save the model "
            "again as safetensors with diffusers, DiffusionPipeline.from_pretrained(...).save_pretrained(...), or "
            "download such files"
        )
    seen = ", ".join(name or "plain" for name in found) or "none"
    advice = "choose one of them, or download the weights" if found else "download the weights"
    raise FileNotFoundError(
        f"{directory} has no {name}, nor an index of shards; variants that are there: {seen}: {advice}"
    )


def no_variant_line(directory: Path, variant: str, file: Path) -> str:
    """What is said where a component lacks the variant that is asked for."""
    return f"{directory.name}: no variant {variant}, so {file.name} is read"


def has_variant(directory: Path, variant: str) -> bool:
    """Whether a component's directory has published weights of a variant."""
    return variant in _variants(directory)


def check_variant(model: Path, variant: str) -> None:
    """Raises ``FileNotFoundError`` if no component of a model directory with published weights has the variant."""
    parts = {part.name: _variants(part) for part in sorted(model.iterdir()) if part.is_dir()}
    there = {name: variants for name, variants in parts.items() if variants}
    if not there or any(variant in variants for variants in there.values()):
        return
    seen = "; ".join(f"{name}: {', '.join(kind or 'plain' for kind in kinds)}" for name, kinds in there.items())
    raise FileNotFoundError(
        f"no component of {model} has the variant {variant!r}; variants that are there: {seen}: choose one of them, or "
        "leave the variant out for the plain files"
    )


def find_pickle(directory: Path) -> Path | None:
    """A component's weights as PyTorch pickles them, which nothing here reads; None where there are none."""
    return next((path for stem in (*STEMS, "pytorch_model") for path in sorted(directory.glob(f"{stem}*.bin"))), None)


def _variants(directory: Path) -> list[str]:
    """The variants of a component's weights, "" for the plain files; of shards without an index too."""
    kinds = [files for stem in STEMS for files in _weight_files(directory, stem)]
    return sorted(set().union(*kinds))


def _weight_files(directory: Path, stem: str) -> tuple[dict[str, Path], dict[str, Path]]:
    """Variant ("" for plain) -> its file or the index of its shards; and, apart, variant -> its first shard."""
    found: dict[str, Path] = {}
    shards: dict[str, Path] = {}
    for path in sorted(directory.glob(f"{stem}*")) if directory.is_dir() else []:
        end = path.name.removeprefix(stem)
        if shard := re.fullmatch(r"(?:\.(\w+))?-\d{5}-of-\d{5}(?:\.(\w+))?\.safetensors", end):
            shards.setdefault(shard[1] or shard[2] or "", path)
            continue
        parts = end.split(".")
        if parts[0] == "" and parts[-1] == "safetensors" and len(parts) in (2, 3):
            found[parts[1] if len(parts) == 3 else ""] = path
        elif parts[:3] == ["", "safetensors", "index"] and parts[-1] == "json" and len(parts) in (4, 5):
            found[parts[3] if len(parts) == 5 else ""] = path
    return found, shards


def write_safetensors(
    path: str | os.PathLike[str],
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one file, a tensor at a time, under a temporary name first.

    Args:
        path: the file.
        infos: what is going to be written, in this order.
        tensors: the same names in the same order, with their arrays; read lazily.
        metadata: goes into the header.

    Raises:
        ValueError: the tensors are not those of ``infos``.
    """
    head, _ = header_of(infos, metadata)
    with atomic_file(path) as file:
        file.write(head)
        _write_tensors(file, iter(infos.items()), tensors)


def header_of(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """What a file of these tensors begins with, and the byte of the file where each of them begins."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    begins, end = {}, 0
    for name, (dtype, shape) in infos.items():
        begins[name], end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + begin for name, begin in begins.items()}


def _write_tensors(
    file: BinaryIO, infos: Iterator[tuple[str, TensorInfo]], tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    for name, array in tensors:
        expected, info = next(infos, (None, None))
        if name != expected or info != TensorInfo(array.dtype, array.shape):
            raise ValueError(f"{name} {array.dtype}{array.shape} was to be {expected} {info}")
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    if left := next(infos, None):
        raise ValueError(f"{left[0]} was not given")


def all_finite(array: np.ndarray) -> bool:
    """Whether no value is infinite or NaN, in a few MB of memory beside the array."""
    if array.dtype.kind in "iub":
        return True
    flat = array.reshape(-1)
    for begin in range(0, flat.size, 1 << 22):
        part = flat[begin : begin + (1 << 22)]
        if array.dtype == ml_dtypes.bfloat16:
            finite = ((part.view(np.uint16) & 0x7F80) != 0x7F80).all()
        else:
            finite = np.isfinite(part).all()
        if not finite:
            return False
    return True
