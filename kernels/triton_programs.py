"""Calls of Triton programs through jax-triton, which is imported when the first one is made."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import jax

from kernels.typing import Array


def lower_without_a_gpu() -> bool:
    """Whether jax-triton is here in a release that asks Pallas, and no device, which GPU it lowers for."""
    return importlib.util.find_spec("jax_triton") is not None and jax.__version_info__ >= (0, 12)


def call(module: str, program: str, arrays: tuple[Array, ...], outputs: Any, **settings: Any) -> Any:
    """Runs a ``@triton.jit`` function; under ``jax.vmap``, which jax-triton lacks, one example after the other.

    Args:
        module: where it is defined.
        program: its name there.
        arrays: its first arguments.
        outputs: shapes and dtypes of the arrays that it writes, any tree of them.
        settings: the grid, warps, stages, and constants that it is compiled for, as ``jax_triton.triton_call`` takes
            them.

    Returns:
        The arrays that it wrote.

    Raises:
        ValueError: where jax-triton or triton cannot be imported, with what to do about it.
    """
    try:
        triton_call = importlib.import_module("jax_triton").triton_call
        kernel = getattr(importlib.import_module(module), program)
    except ImportError as error:  # jax-triton raises it for a jax without CUDA too
        raise ValueError(
            f"implementation='triton' needs jax-triton, triton and a jax with CUDA ({str(error).splitlines()[0]}): "
            "pip install 'sana-jax[gpu]' on a machine with a GPU, or use 'pallas' or 'xla'"
        ) from error

    @jax.custom_batching.sequential_vmap
    def run(*arrays: Array) -> Any:
        return triton_call(*arrays, kernel=kernel, out_shape=outputs, **settings)

    return run(*arrays)
