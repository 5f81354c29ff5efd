"""Compiling ahead of time, with what it takes spoken of, and the persistent compilation cache."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def enable_compilation_cache() -> str:
    """Turns JAX's persistent cache on, unless the environment has said where (or that there is none); returns where.

    ``JAX_COMPILATION_CACHE_DIR`` names another directory; ``JAX_ENABLE_COMPILATION_CACHE=0`` turns it off.
    """
    if not jax.config.jax_enable_compilation_cache:
        return "off"
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        # Compiled CPU code uses the machine's own instructions: a home directory shared by unlike machines needs one
        # cache for each kind.
        directory = pathlib.Path(home) / "sana_jax" / f"xla-{platform.machine()}-{_cpu_fingerprint()}"
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return jax.config.jax_compilation_cache_dir


def compile_ahead(
    name: str, function: Callable, *arguments: Any, say: Callable[[str], None] = print
) -> jax.stages.Compiled:
    """Lowers and compiles a jitted function for abstract arguments, and prints for what, how long and how much memory.

    The result refuses arguments of other shapes, so nothing recompiles in silence.

    Args:
        name: what it is, for the printed lines.
        function: a jitted function.
        arguments: trees of ShapeDtypeStructs (or arrays), the non-static positional arguments.
        say: prints a line.
    """
    say(f"compiling {name} ...")
    started = time.perf_counter()
    lowered = function.lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()
    line = f"compiled {name} in {ended - started:.1f} s (tracing {traced - started:.1f} s)"
    say(f"{line}; memory per device: {memory_summary(compiled)}")
    return compiled


class Program(NamedTuple):
    """A compiled function, the seconds that compiling took now (0: it was there), and the bytes that it holds."""

    run: jax.stages.Compiled
    seconds: float
    device_bytes: int | None


class Programs:
    """Compiled functions by what they are and the shapes they are for; each is compiled once."""

    def __init__(self) -> None:
        self._compiled: dict[Any, tuple[jax.stages.Compiled, int | None]] = {}

    def __len__(self) -> int:
        return len(self._compiled)

    def clear(self) -> None:
        """Forgets all of them."""
        self._compiled.clear()

    def get(
        self, name: str, what: Hashable, function: Callable, *arguments: Any, donate: tuple[int, ...] = ()
    ) -> Program:
        """The program of ``function`` for arguments of these shapes; compiling prints what ``compile_ahead`` prints.

        ``name`` is for the printed lines. ``what`` tells functions with the same shapes apart: everything that the
        function closes over. ``donate`` are the places of arguments whose memory the results take over.
        """
        leaves, structure = jax.tree.flatten(arguments)
        shapes = tuple((jnp.shape(leaf), str(jnp.result_type(leaf)), _placement(leaf)) for leaf in leaves)
        key = (what, shapes, structure)
        seconds = 0.0
        if key not in self._compiled:
            begin = time.perf_counter()
            compiled = compile_ahead(name, jax.jit(function, donate_argnums=donate), *arguments)
            self._compiled[key] = compiled, _device_bytes(compiled)
            seconds = time.perf_counter() - begin
        compiled, device_bytes = self._compiled[key]
        return Program(compiled, seconds, device_bytes)


def _device_bytes(compiled: jax.stages.Compiled) -> int | None:
    """What a program holds on each device while it runs, by the compiler's own analysis."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    parts = (analysis.argument_size_in_bytes, analysis.output_size_in_bytes, analysis.temp_size_in_bytes)
    return sum(parts) - analysis.alias_size_in_bytes


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


def _cpu_fingerprint() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kind = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    except OSError:
        kind = platform.processor()
    return hashlib.sha256(kind.encode()).hexdigest()[:8]
