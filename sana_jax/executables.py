"""Compiled programs on disk: a second process that needs the same program reads it, without tracing or compiling.

JAX's persistent compilation cache saves compiling alone: its key is the traced program. Here the key is made of all
that a program depends on: what its caller says of the function (networks with their configurations, samplers,
switches), the arguments' shapes and dtypes, the versions of the libraries, JAX's settings, the device, and a hash of
this package's own source. Programs are stored by their traced form, and keys lead to them, so that after a change of
the source that leaves a program as it was only tracing is repeated.

A program is machine code, and reading one runs what is in the file; so files are read only where no one else could have
written them. ``SANA_JAX_EXECUTABLES`` names another directory, or turns it off with ``0``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import pickle
import platform
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen
import jax
import numpy as np
from jax.experimental import serialize_executable

from kernels.selection import preference
from sana_jax.errors import reason_of
from sana_jax.files import atomic_file

ENVIRONMENT = "SANA_JAX_EXECUTABLES"
LARGEST_TOTAL = 4_000_000_000  # bytes; beyond it the files that were not used for the longest time go
SHORTEST_COMPILING = 0.5  # seconds; what compiles in less is not kept

_MAGIC = b"sana_jax executable 1\n"
_SUFFIX, _LINK = ".executable", ".link"
# Settings of JAX that say where things are written, or how much is said of it, and change no program.
_NOT_OF_PROGRAMS = ("cache", "log", "dump", "traceback", "profil", "coordination", "distributed", "host_callback")


class Unknown(TypeError):
    """A value that has no description that would be the same in another process."""


class Key(NamedTuple):
    """Of one program.

    Attributes:
        name: a hash of everything it depends on.
        outside: a hash of what it depends on besides its traced form.
        device: where it runs.
    """

    name: str
    outside: str
    device: jax.Device


class ExecutableStore:
    """A directory of compiled programs.

    Args:
        directory: made, for its owner alone, when the first program is kept.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = pathlib.Path(directory)

    def key(self, identity: Any, arguments: Any) -> Key | None:
        """The key of a function described by ``identity`` for these arguments.

        None for programs that are not kept: of several devices or processes.

        Raises:
            Unknown: no lasting description of something in ``identity``.
        """
        device = _only_device(arguments)
        if device is None:
            return None
        leaves, structure = jax.tree.flatten(arguments)
        shapes = [f"{np.shape(leaf)} {jax.dtypes.result_type(leaf)} {_is_weak(leaf)}" for leaf in leaves]
        outside = _digest(_outside(device))
        parts = [outside, source_hash(), describe(identity), shapes, str(structure)]
        return Key(_digest(parts), outside, device)

    def load(self, key: Key) -> tuple[jax.stages.Compiled, int] | str | None:
        """The program and its size in bytes; None where there is none; a text that says why it is not used."""
        link = self.directory / f"{key.name}{_LINK}"
        try:
            if (problem := self._not_ours(link)) is not None:
                return problem
            content = link.read_text().strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            return f"{link} can't be read ({error})"
        return self._load_content(content, key) if _is_digest(content) else f"{link} is damaged"

    def load_traced(self, key: Key, traced: str) -> tuple[jax.stages.Compiled, int] | str | None:
        """As ``load``, of a program that was traced: kept by an earlier version of the source, perhaps."""
        content = self._content(key, traced)
        found = self._load_content(content, key)
        if isinstance(found, tuple):
            with contextlib.suppress(OSError):
                self._write_link(key, content)
        return found

    def save(self, key: Key, traced: str, compiled: jax.stages.Compiled) -> int:
        """Keeps a program that was compiled in this process; returns its bytes.

        Raises:
            OSError: the directory cannot be written.
            ValueError: the program cannot be written down.
        """
        try:
            payload, in_tree, out_tree = serialize_executable.serialize(compiled)
            body = pickle.dumps((payload, in_tree, out_tree))
        except (ValueError, TypeError, NotImplementedError, pickle.PicklingError, jax.errors.JaxRuntimeError) as error:
            raise ValueError(reason_of(error)) from error
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        content = self._content(key, traced)
        header = json.dumps({"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}).encode()
        path = self.directory / f"{content}{_SUFFIX}"
        with atomic_file(path) as file:
            file.write(_MAGIC + header + b"\n" + body)
        path.chmod(0o600)
        self._write_link(key, content)
        self._make_room(path)
        return path.stat().st_size

    def total(self) -> tuple[int, int]:
        """How many programs are kept, and their bytes."""
        sizes = [size for _, size, _ in self._files()]
        return len(sizes), sum(sizes)

    def _content(self, key: Key, traced: str) -> str:
        return _digest([key.outside, traced])

    def _write_link(self, key: Key, content: str) -> None:
        link = self.directory / f"{key.name}{_LINK}"
        with atomic_file(link) as file:
            file.write(f"{content}\n".encode())
        link.chmod(0o600)

    def _load_content(self, content: str, key: Key) -> tuple[jax.stages.Compiled, int] | str | None:
        path = self.directory / f"{content}{_SUFFIX}"
        try:
            if (problem := self._not_ours(path)) is not None:
                return problem
            whole = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"{path} can't be read ({error.strerror})"
        head, _, body = whole.removeprefix(_MAGIC).partition(b"\n")
        try:
            header = json.loads(head) if whole.startswith(_MAGIC) else {}
        except ValueError:
            header = {}
        if header != {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}:
            return f"{path} is damaged"
        try:
            payload, in_tree, out_tree = pickle.loads(body)
            compiled = serialize_executable.deserialize_and_load(
                payload, in_tree, out_tree, backend=key.device.client, execution_devices=[key.device]
            )
        except Exception as error:  # whatever another build of the libraries makes of it, compiling goes on
            return f"{path} can't be loaded ({reason_of(error)})"
        with contextlib.suppress(OSError):
            os.utime(path)
        return compiled, len(whole)

    def _not_ours(self, path: pathlib.Path) -> str | None:
        """Why a file is not read, though it is there: someone else could have written it."""
        if not hasattr(os, "getuid"):
            return None
        for part in (self.directory, path):
            status = part.stat()
            if status.st_uid != os.getuid() or status.st_mode & 0o022:
                return f"{part} can be written by others"
        return None

    def _files(self) -> list[tuple[float, int, pathlib.Path]]:
        found = []
        for path in self.directory.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return sorted(found)

    def _make_room(self, newest: pathlib.Path) -> None:
        files = self._files()
        total = sum(size for _, size, _ in files)
        if total <= LARGEST_TOTAL:
            return
        for _, size, path in files:
            if total <= LARGEST_TOTAL or path == newest:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                total -= size
        for link in self.directory.glob(f"*{_LINK}"):
            with contextlib.suppress(OSError):
                if not (self.directory / f"{link.read_text().strip()}{_SUFFIX}").exists():
                    link.unlink()


# -- the store of this process ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class _OfThisProcess:
    """There is one store, as there is one persistent cache of JAX: what compiles in any thread takes it."""

    store: ExecutableStore | None = None


_process = _OfThisProcess()


def enable_executables(cache_directory: str | os.PathLike[str]) -> str:
    """Keeps programs in ``executables`` below JAX's persistent cache, unless the environment says otherwise.

    Returns:
        Where they are kept, or ``"off"``.
    """
    wanted = os.environ.get(ENVIRONMENT, "")
    if wanted.lower() in ("0", "off", "false", "no"):
        _process.store = None
        return "off"
    _process.store = ExecutableStore(wanted or pathlib.Path(cache_directory) / "executables")
    return str(_process.store.directory)


def executable_store() -> ExecutableStore | None:
    """Where this process keeps programs; None where it does not."""
    return _process.store


@contextlib.contextmanager
def compiling_anew() -> Iterator[None]:
    """What is compiled inside is compiled, and neither read from JAX's persistent cache nor written there.

    On a CPU a program that came out of a file cannot be written into another one: half of it would be missing.
    """
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it has remembered that it is on
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


# -- what a program depends on ---------------------------------------------------------------------------------------


def describe(value: Any) -> Any:
    """A value as lists and texts that are the same in every process.

    Raises:
        Unknown: a value of which that cannot be said.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes | complex):
        return repr(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # where a module stands in another one says nothing of what it computes
        left_out = ("parent", "name") if isinstance(value, flax.linen.Module) else ()
        fields = [field.name for field in dataclasses.fields(value) if field.name not in left_out]
        return [kind, *([name, describe(getattr(value, name))] for name in fields)]
    if isinstance(value, tuple | list):
        return [kind, *map(describe, value)]
    if isinstance(value, Mapping):
        return [kind, *sorted([repr(name), describe(entry)] for name, entry in value.items())]
    if isinstance(value, type | types.FunctionType) and "<" not in value.__qualname__:
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, np.dtype) or hasattr(value, "dtype"):
        return [kind, str(jax.numpy.dtype(value))] if np.ndim(value) == 0 else _array(value, kind)
    raise Unknown(f"{kind} has no description that would be the same in another process")


def _array(value: Any, kind: str) -> Any:
    value = np.asarray(value)
    return [kind, str(value.dtype), str(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _is_digest(text: str) -> bool:
    return len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)


def _is_weak(leaf: Any) -> bool:
    return bool(getattr(leaf, "weak_type", isinstance(leaf, bool | int | float | complex)))


def _only_device(arguments: Any) -> jax.Device | None:
    """The device of a program for these arguments; None if it has several."""
    if jax.process_count() > 1 or jax.sharding.get_abstract_mesh().size > 1:
        return None
    devices = set()
    for leaf in jax.tree.leaves(arguments):
        if getattr(leaf, "sharding", None) is not None:
            devices |= set(leaf.sharding.device_set)
    if not devices:
        chosen = jax.config.jax_default_device
        devices = {chosen if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)[0]}
    return devices.pop() if len(devices) == 1 else None


def _outside(device: jax.Device) -> dict[str, Any]:
    """What a program depends on besides its traced form."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    settings = {
        name: repr(getattr(jax.config, name, value))  # what is in force here, context managers included
        for name, value in jax.config.values.items()
        if not any(word in name for word in _NOT_OF_PROGRAMS)
    }
    return {
        "versions": {**versions, "python": platform.python_version()},
        "settings": settings,
        "flags": os.environ.get("XLA_FLAGS", ""),
        "kernels": preference(),
        "mesh": repr(jax.sharding.get_abstract_mesh()),  # of ``jax.set_mesh``, here of one device at most
        "device": [device.platform, device.device_kind, str(getattr(device, "compute_capability", "")), device.id],
        "platform": device.client.platform_version,
        "host": [platform.system(), platform.machine(), cpu_kind()],
    }


@functools.cache
def source_hash() -> str:
    """A hash of this package's and the kernels' files: every module, and the data beside them."""
    import kernels
    import sana_jax

    digest = hashlib.sha256()
    for package in (kernels, sana_jax):
        root = pathlib.Path(package.__file__).parent
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def cpu_kind() -> str:
    """A short name for the processor's instructions: compiled code uses them."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kind = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    except OSError:
        kind = platform.processor()
    return hashlib.sha256(kind.encode()).hexdigest()[:8]
