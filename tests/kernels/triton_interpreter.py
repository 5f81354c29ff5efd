"""Triton functions on a CPU, in programs that are started with ``TRITON_INTERPRET=1``.

``install`` puts a stand-in for jax-triton into place, which cannot be imported without CUDA's libraries. Its
``triton_call`` runs the function under Triton's interpreter, on PyTorch tensors; outputs start as NaN, so that what is
not written is seen.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np


def run_module(module: str, interpret: bool) -> str:
    """Runs a module of the tests in a process of its own, where Triton interprets or compiles; returns what it prints.

    Tests check shapes at every annotated call, which hides the source of Triton functions from Triton; that process
    does not. It leaves the GPU's memory to whoever has it already.
    """
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if interpret:
        environment |= {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", module]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install() -> None:
    """Does nothing where Triton does not interpret: there jax-triton itself is wanted."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    sys.modules["jax_triton"] = types.SimpleNamespace(triton_call=_triton_call)


def _triton_call(*arrays: Any, kernel: Any, out_shape: Any, **settings: Any) -> Any:
    """jax-triton's call: it can be traced, and has no ``vmap``."""
    run = functools.partial(_run, kernel=kernel, out_shape=out_shape, **settings)
    return jax.pure_callback(run, out_shape, *arrays)


def _run(*arrays: Any, kernel: Any, out_shape: Any, grid: tuple, num_warps: int, num_stages: int, **constants: Any):
    import torch

    def to_torch(x: Any) -> Any:
        # NumPy has bfloat16 from JAX alone, and PyTorch does not read it; float32 holds it exactly.
        return torch.from_numpy(np.array(x, np.float32)).to(getattr(torch, x.dtype.name))

    shapes = jax.tree.leaves(out_shape)
    outputs = [torch.full(x.shape, float("nan"), dtype=getattr(torch, x.dtype.name)) for x in shapes]
    kernel[grid](*map(to_torch, arrays), *outputs, **constants)
    found = [x.to(torch.float32).numpy().astype(shape.dtype) for x, shape in zip(outputs, shapes)]
    return jax.tree.unflatten(jax.tree.structure(out_shape), found)
