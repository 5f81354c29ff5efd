"""Triton kernels through jax-triton itself, to PTX and programs for an H100 that need not be here.

With the ``gpu`` extra on Python 3.12 or later, whose jax-triton needs CUDA's libraries and no device; skipped without.
"""

from __future__ import annotations

import json

import pytest

from kernels.triton_programs import lower_without_a_gpu
from tests.kernels.triton_interpreter import run_module


@pytest.mark.prove
@pytest.mark.skipif(
    not lower_without_a_gpu(), reason="needs jax-triton with jax 0.12 or later: pip install 'sana-jax[gpu]'"
)
def test_every_kernel_goes_through_jax_triton(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    found = json.loads(run_module("tests.kernels.lowered_by_jax_triton", interpret=False).splitlines()[-1])
    assert min(found.values()) >= 2
    assert sum(name.startswith("linear attention") for name in found) == 8
    assert sum(name.startswith("gated delta rule") for name in found) == 3
