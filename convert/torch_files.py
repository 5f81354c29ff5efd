"""PyTorch's ``.pth`` and ``.pt`` files, read without PyTorch and without executing anything in them.

Such a file is a zip archive: ``<name>/data.pkl``, a pickle that says which tensors there are, and
``<name>/data/<key>``, the bytes of their storages. A pickle is a program that may call anything. Here it is not run:
its operations are read one by one, a dozen of them build plain dicts, lists and numbers, and the only calls that mean
something are those that describe a tensor. Everything else ends in an error that names it.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from sana_jax.errors import CheckpointError
from sana_jax.weights.messages import first_few, one_line
from sana_jax.weights.safetensors_files import LFS_POINTER, TensorInfo, all_finite, is_tensor_name

Which = Literal["auto", "params", "ema"]

# What training scripts call the weights and their average, in the order in which they are looked for.
_SECTIONS: dict[str, tuple[str, ...]] = {
    "params": ("state_dict", "generator", "model"),
    "ema": ("state_dict_ema", "generator_ema", "ema"),
}
STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
REBUILD_TENSOR = ("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2")
_REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
ORDERED_DICT = "collections OrderedDict"
_SIZE = "torch Size"
_LONGEST_PICKLE = 1 << 26  # bytes; 1,400 tensors take 200,000
_SAVE_AGAIN = "load it in PyTorch with weights_only=True and save its state_dict alone with torch.save"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchSource:
    """The tensors of one ``.pth`` file, read one at a time.

    Attributes:
        location: the file.
        tensors: name -> dtype and shape.
        sections: names of all sets of weights that the file holds, with their numbers of tensors.
        section: the one that was chosen; "" where the file is nothing but a set of weights.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a PyTorch zip file, is not whole, holds anything but tensors and plain values, or
            holds averaged and raw weights and none is chosen.
    """

    def __init__(self, path: str | os.PathLike[str], which: Which = "auto") -> None:
        path = Path(path)
        self.location = str(path)
        self._path = path
        _check_kind(path)
        try:
            root, self._starts = _read_archive(path)
        except (zipfile.BadZipFile, struct.error, ValueError, KeyError, IndexError, TypeError, EOFError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{path} is not a whole PyTorch file: {one_line(error)}; download or copy it again"
            ) from error
        except (NotImplementedError, OverflowError, AssertionError, RuntimeError, OSError) as error:
            raise CheckpointError(f"{path} can't be read: {one_line(error)}; download or copy it again") from error
        self.section, weights, self.sections = _choose_section(root, which, path)
        self._tensors = _tensors_of(weights, path)
        for name, tensor in self._tensors.items():
            self._check(name, tensor)
        self.tensors = {name: TensorInfo(t.storage.dtype, t.shape) for name, t in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, contiguous.

        Raises:
            KeyError: there is none of this name.
            CheckpointError: the file has become shorter, or the tensor holds values that are not finite.
        """
        (dtype, key, _), offset, shape, strides = self._tensors[name]
        span = 0 if 0 in shape else 1 + sum((length - 1) * stride for length, stride in zip(shape, strides))
        try:
            flat = np.fromfile(self._path, dtype, span, offset=self._starts[key][0] + offset * dtype.itemsize)
        except OSError as error:
            raise CheckpointError(f"{self._path} can't be read ({error.strerror})") from error
        if flat.size != span:
            raise CheckpointError(f"{self._path} ends within the tensor {name}; download or copy it again")
        if not all_finite(flat):
            raise CheckpointError(
                f"the tensor {name} of {self._path} has values that are not finite, which no good checkpoint has; "
                "download or copy it again"
            )
        view = np.lib.stride_tricks.as_strided(flat, shape, [stride * dtype.itemsize for stride in strides])
        return np.array(view, order="C")

    def _check(self, name: str, tensor: _Tensor) -> None:
        """Nothing that the pickle says of a tensor is believed before it fits the bytes that are there."""
        storage, offset, shape, strides = tensor
        count = math.prod(shape)
        last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides)) if count else offset
        problem = None
        if storage.key not in self._starts:
            problem = f"its storage {storage.key} is missing"
        elif self._starts[storage.key][1] != storage.size * storage.dtype.itemsize:
            problem = f"its storage has {self._starts[storage.key][1]} bytes, not {storage.size} {storage.dtype}"
        elif count > storage.size or (count and last >= storage.size):
            problem = f"shape {list(shape)} with strides {list(strides)} does not fit a storage of {storage.size}"
        if problem:
            raise CheckpointError(f"the tensor {name} of {self._path}: {problem}; download or copy it again")


def _check_kind(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; name the checkpoint")
    try:
        with open(path, "rb") as file:
            head = file.read(len(LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror})") from error
    if head == LFS_POINTER:
        raise CheckpointError(f"{path} is a pointer to the weights, not the weights: fetch them with git lfs pull")
    if head.startswith(b"PK"):
        return
    if head.startswith(_LEGACY) or head[:1] == b"\x80":
        raise CheckpointError(
            f"{path} is in the format that PyTorch wrote before version 1.6, which can't be read without running it: "
            f"{_SAVE_AGAIN}"
        )
    raise CheckpointError(f"{path} is not a PyTorch file; allowed are .pth and .pt (zip) and .safetensors files")


def _read_archive(path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """What the pickle describes, and storage key -> (where its bytes begin, how many there are)."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or len(entries) != len(archive.infolist()):
            raise ValueError(f"it has {len(pickles)} entries data.pkl, or entries of one name")
        prefix = pickles[0].removesuffix("data.pkl")
        order = f"{prefix}byteorder"
        if order in entries and _bytes_of(file, entries[order], 16) != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine; {_SAVE_AGAIN} on another one")
        starts = {}
        for name, entry in entries.items():
            if match := re.fullmatch(re.escape(prefix) + r"data/(\d+)", name):
                starts[match[1]] = (_start_of(file, entry), entry.file_size)
        return _interpret(_bytes_of(file, entries[pickles[0]], _LONGEST_PICKLE), path), starts


def _start_of(file: Any, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin, by the header before them."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise ValueError(f"its entry {entry.filename} is compressed or encrypted, which PyTorch never writes")
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"its entry {entry.filename} has no header")
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + entry.file_size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"it ends within its entry {entry.filename}")
    return start


def _bytes_of(file: Any, entry: zipfile.ZipInfo, limit: int) -> bytes:
    start = _start_of(file, entry)
    if entry.file_size > limit:
        raise ValueError(f"its entry {entry.filename} has {entry.file_size} bytes, more than {limit}")
    file.seek(start)
    return file.read(entry.file_size)


# -- the pickle ------------------------------------------------------------------------------------------------------

_MARK = object()
_PUSHED = frozenset({
    "INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES",
})  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}


def _interpret(program: bytes, path: Path) -> Any:
    """The value that a pickle describes: dicts, lists, tuples, plain values, and our descriptions of tensors."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for operation, argument, _ in pickletools.genops(io.BytesIO(program)):
        name = operation.name
        if name in _PUSHED:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("PROTO", "FRAME"):
            continue
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "STOP":
            (value,) = stack
            return value
        else:
            _build(name, argument, stack, path)
    raise ValueError("its pickle has no end")


def _build(name: str, argument: Any, stack: list[Any], path: Path) -> None:
    """The operations that take values off the stack."""
    if name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        count = int(name[-1])
        items = tuple(stack.pop() for _ in range(count))[::-1]
        stack.append(items)
    elif name == "TUPLE":
        stack.append(tuple(_to_mark(stack)))
    elif name in ("APPEND", "APPENDS"):
        items = [stack.pop()] if name == "APPEND" else _to_mark(stack)
        _expect(stack[-1], list).extend(items)
    elif name in ("SETITEM", "SETITEMS"):
        items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else _to_mark(stack)
        if len(items) % 2:
            raise ValueError("a dict has a key without a value")
        _fill(_expect(stack[-1], dict), zip(items[::2], items[1::2]))
    elif name == "GLOBAL":
        stack.append(_known(argument, path))
    elif name == "STACK_GLOBAL":
        attribute, module = _expect(stack.pop(), str), _expect(stack.pop(), str)
        stack.append(_known(f"{module} {attribute}", path))
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop()))
    elif name == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        stack.append(_call(_expect(function, _Global), _expect(arguments, tuple)))
    elif name == "BUILD":
        stack.pop()  # attributes of a state dict (_metadata): they carry no weights
        _expect(stack[-1], dict)
    else:
        raise CheckpointError(
            f"{path} asks for {name}, which no file of weights needs: it was not done; do not use this file, or "
            f"{_SAVE_AGAIN}"
        )


def _known(name: str, path: Path) -> _Global:
    is_storage = name.startswith("torch ") and name.removeprefix("torch ") in STORAGES
    if not is_storage and name not in (*REBUILD_TENSOR, _REBUILD_PARAMETER, ORDERED_DICT, _SIZE):
        raise CheckpointError(
            f"{path} asks for {name.replace(' ', '.')!r}, which no file of weights needs: it was not called; do not "
            f"use this file, or {_SAVE_AGAIN}"
        )
    return _Global(name)


def _call(function: _Global, arguments: tuple) -> Any:
    if function.name == ORDERED_DICT:
        found: dict[Any, Any] = {}
        if arguments:
            _fill(found, (_expect(pair, list, tuple) for pair in _expect(arguments[0], list)))
        return found
    if function.name == _SIZE:
        return tuple(_expect(arguments[0], list, tuple))
    if function.name == _REBUILD_PARAMETER:
        return _expect(arguments[0], _Tensor)
    if function.name in REBUILD_TENSOR:
        storage, offset, shape, strides = arguments[:4]
        _expect(storage, _Storage)
        for numbers in ((offset,), _expect(shape, tuple), _expect(strides, tuple)):
            if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
                raise ValueError("a tensor has an offset, shape or strides that are not whole numbers")
        if len(shape) != len(strides) or len(shape) > 8:
            raise ValueError(f"a tensor has {len(shape)} axes and {len(strides)} strides")
        return _Tensor(storage, offset, shape, strides)
    raise ValueError(f"{function.name} is called")


def _storage(value: Any) -> _Storage:
    kind, storage_type, key, _, size = _expect(value, tuple)
    dtype = STORAGES[_expect(storage_type, _Global).name.removeprefix("torch ")]
    if kind != "storage" or not isinstance(key, str) or type(size) is not int or not 0 <= size < 2**62:
        raise ValueError("a storage is not described by kind, type, key, place and size")
    return _Storage(dtype, key, size)


def _fill(found: dict, pairs: Any) -> None:
    for key, value in pairs:
        # Nested tuples as keys could take for ever to hash.
        if not isinstance(key, (str, int, float, type(None))):
            raise ValueError(f"a dict has a {type(key).__name__} as key")
        found[key] = value


def _to_mark(stack: list[Any]) -> list[Any]:
    items = []
    while (value := stack.pop()) is not _MARK:
        items.append(value)
    return items[::-1]


def _expect(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise ValueError(f"a {type(value).__name__} stands where a {kinds[0].__name__} should")
    return value


# -- what is in it ---------------------------------------------------------------------------------------------------


def _choose_section(root: Any, which: Which, path: Path) -> tuple[str, Mapping[str, Any], dict[str, int]]:
    if not isinstance(root, dict):
        raise CheckpointError(f"{path} holds a {type(root).__name__}; allowed is a dict of tensors: {_SAVE_AGAIN}")
    found = {
        kind: name
        for kind, names in _SECTIONS.items()
        for name in reversed(names)
        if isinstance(root.get(name), dict) and root[name]
    }
    sections = {name: len(root[name]) for name in found.values()}
    listed = ", ".join(f"{name} ({count} tensors)" for name, count in sections.items())
    if not found:
        if which == "ema":
            raise CheckpointError(f"{path} has no averaged weights; leave the choice of ema out")
        return "", root, {}
    if which == "auto" and len(found) > 1:
        raise CheckpointError(f"{path} has {listed}; choose one: --weights params or --weights ema")
    chosen = next(iter(found)) if which == "auto" else which
    if chosen not in found:
        raise CheckpointError(f"{path} has no {' or '.join(_SECTIONS[chosen])}; it has {listed}: choose what is there")
    return found[chosen], root[found[chosen]], sections


def _tensors_of(weights: Mapping[Any, Any], path: Path) -> dict[str, _Tensor]:
    others = [
        f"{str(name)[:100]!r} ({type(value).__name__})"
        for name, value in weights.items()
        if not isinstance(value, _Tensor)
    ]
    others += [repr(name)[:100] for name in weights if not is_tensor_name(name)]
    if others or not weights:
        raise CheckpointError(
            f"{path} holds {first_few(others, 'entries') or 'nothing'} where tensors were expected; allowed are a dict "
            f"of tensors, or such a dict under {', '.join(sum(_SECTIONS.values(), ()))}: {_SAVE_AGAIN}"
        )
    # Wrappers put one prefix before all names.
    for prefix in ("module.", "_orig_mod.", "model."):
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return dict(weights)
