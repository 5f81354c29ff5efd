"""Compiling ahead of time, with what it takes spoken of, and the persistent compilation cache."""

from __future__ import annotations

import os
import pathlib
import platform
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.selection import preference
from sana_jax.errors import UserError
from sana_jax.executables import (
    SHORTEST_COMPILING,
    ExecutableStore,
    Key,
    Unknown,
    compiling_anew,
    cpu_kind,
    enable_executables,
    executable_store,
)


def enable_compilation_cache() -> str:
    """Turns JAX's persistent cache on, unless the environment has said where (or that there is none); returns where.

    ``JAX_COMPILATION_CACHE_DIR`` names another directory; ``JAX_ENABLE_COMPILATION_CACHE=0`` turns it off. With it come
    the executables of ``sana_jax.executables``, in a directory of it.
    """
    if not jax.config.jax_enable_compilation_cache:
        return "off"
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        # Compiled CPU code uses the machine's own instructions: a home directory shared by unlike machines needs one
        # cache for each kind.
        directory = pathlib.Path(home) / "sana_jax" / f"xla-{platform.machine()}-{cpu_kind()}"
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    enable_executables(jax.config.jax_compilation_cache_dir)
    return jax.config.jax_compilation_cache_dir


def compile_ahead(
    name: str, function: Callable, *arguments: Any, say: Callable[[str], None] = print, identity: Any = None
) -> jax.stages.Compiled:
    """Lowers and compiles a jitted function for abstract arguments, and prints for what, how long and how much memory.

    The result refuses arguments of other shapes, so nothing recompiles in silence.

    Args:
        name: what it is, for the printed lines.
        function: a jitted function.
        arguments: trees of ShapeDtypeStructs (or arrays), the non-static positional arguments.
        say: prints a line.
        identity: everything that the function closes over, and how it was jitted, as ``executables.describe`` takes it:
            where programs are kept on disk, it is then read from there, or kept. None keeps it off the disk.
    """
    _check_jit_enabled(name)
    store, started = executable_store(), time.perf_counter()
    key = None if store is None or identity is None else _key(store, name, identity, arguments, say)
    if key is not None and (found := _loaded(store.load(key), name, started, say)) is not None:
        return found
    say(f"compiling {name} ...")
    lowered = function.lower(*arguments)
    traced, text = time.perf_counter(), ""
    if key is not None:
        text = lowered.as_text()
        if (found := _loaded(store.load_traced(key, text), name, started, say)) is not None:
            return found
        with compiling_anew():
            compiled = lowered.compile()
    else:
        compiled = lowered.compile()
    ended = time.perf_counter()
    line = f"compiled {name} in {ended - started:.1f} s (tracing {traced - started:.1f} s)"
    say(f"{line}; memory per device: {memory_summary(compiled)}")
    if key is not None and ended - traced >= SHORTEST_COMPILING:
        _keep(store, key, text, compiled, name, say)
    return compiled


def _check_jit_enabled(name: str) -> None:
    if jax.config.jax_disable_jit:  # what is compiled ahead refuses to run then, from deep within JAX
        raise UserError(
            f"{name} is compiled before it runs, which jax_disable_jit (JAX_DISABLE_JIT) forbids: unset it for this "
            "call, or debug the network alone, with its apply"
        )


def _key(store: ExecutableStore, name: str, identity: Any, arguments: Any, say: Callable[[str], None]) -> Key | None:
    try:
        return store.key(identity, arguments)
    except Unknown as error:
        say(f"{name} is not kept on disk: {error}")
        return None


def _loaded(
    found: tuple[jax.stages.Compiled, int] | str | None, name: str, started: float, say: Callable[[str], None]
) -> jax.stages.Compiled | None:
    if isinstance(found, str):
        say(f"{found}; it is ignored, and {name} is compiled anew")
        return None
    if found is None:
        return None
    compiled, size = found
    say(
        f"read the compiled program of {name} from disk, {readable_bytes(size)}, in "
        f"{time.perf_counter() - started:.2f} s; memory per device: {memory_summary(compiled)}"
    )
    return compiled


def _keep(
    store: ExecutableStore,
    key: Key,
    traced: str,
    compiled: jax.stages.Compiled,
    name: str,
    say: Callable[[str], None],
) -> None:
    try:
        size = store.save(key, traced, compiled)
    except (OSError, ValueError) as error:
        say(f"{name} is not kept on disk: {error}")
        return
    count, total = store.total()
    say(
        f"kept the compiled program on disk for the next process, {readable_bytes(size)}; {store.directory} holds "
        f"{count} of them, {readable_bytes(total)}"
    )


class Program(NamedTuple):
    """A compiled function.

    Attributes:
        run: the function.
        seconds: what compiling took now; 0 where it was there.
        device_bytes: what it holds on each device while it runs; None where the compiler does not say.
        working_bytes: the same without its arguments.
    """

    run: jax.stages.Compiled
    seconds: float
    device_bytes: int | None
    working_bytes: int | None = None


class Programs:
    """Compiled functions by what they are, their networks and the shapes they are for; each is compiled once."""

    def __init__(self) -> None:
        self._compiled: dict[Any, tuple[jax.stages.Compiled, int | None, int | None]] = {}

    def __len__(self) -> int:
        return len(self._compiled)

    def clear(self) -> None:
        """Forgets all of them."""
        self._compiled.clear()

    def get(
        self,
        name: str,
        what: Hashable,
        function: Callable,
        *arguments: Any,
        donate: tuple[int, ...] = (),
        identity: Any = None,
    ) -> Program:
        """The program of ``function`` for arguments of these shapes; compiling prints what ``compile_ahead`` prints.

        ``name`` is for the printed lines. ``what`` tells functions with the same shapes apart: everything that the
        function closes over. ``donate`` are the places of arguments whose memory the results take over. ``identity``
        is the rest of what the function depends on, such as its network, which may be replaced between two calls; also
        for ``compile_ahead``.
        """
        _check_jit_enabled(name)
        leaves, structure = jax.tree.flatten(arguments)
        shapes = tuple((jnp.shape(leaf), str(jnp.result_type(leaf)), _placement(leaf)) for leaf in leaves)
        # what a program is traced under, and the rest of the key of what is kept on disk
        under = preference(), jax.config.jax_default_matmul_precision
        key = (what, identity, donate, under, shapes, structure)
        seconds = 0.0
        if key not in self._compiled:
            begin = time.perf_counter()
            jitted = jax.jit(function, donate_argnums=donate)
            known = {} if identity is None else {"identity": (what, identity, donate)}
            compiled = compile_ahead(name, jitted, *arguments, **known)
            self._compiled[key] = compiled, *_device_bytes(compiled)
            seconds = time.perf_counter() - begin
        compiled, *sizes = self._compiled[key]
        return Program(compiled, seconds, *sizes)


def _device_bytes(compiled: jax.stages.Compiled) -> tuple[int | None, int | None]:
    """What a program holds on each device while it runs, with and without its arguments, by the compiler's analysis."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None, None
    working = analysis.output_size_in_bytes + analysis.temp_size_in_bytes - analysis.alias_size_in_bytes
    return working + analysis.argument_size_in_bytes, working


def _placement(leaf: Any) -> Any:
    return getattr(leaf, "sharding", None)


def memory_summary(compiled: jax.stages.Compiled) -> str:
    """What a compiled function needs on each device, by the compiler's own analysis."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return "not reported by this backend"
    arguments = analysis.argument_size_in_bytes
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    temporary = analysis.temp_size_in_bytes
    return (
        f"{readable_bytes(arguments + outputs + temporary)} (arguments {readable_bytes(arguments)}, "
        f"results beside them {readable_bytes(outputs)}, temporary {readable_bytes(temporary)})"
    )


def readable_bytes(count: float) -> str:
    """A number of bytes with a unit."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
