"""How tests compile: tests/conftest.py leaves LLVM's optimiser out everywhere, and some show what users then get."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

# Compiler options for a program that is to be as users compile it.
AS_USERS_COMPILE = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


@contextlib.contextmanager
def as_users_compile() -> Iterator[None]:
    """What is compiled inside is as users compile it."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
