"""Runs the Triton programs of the gated delta rule under Triton's interpreter, on a CPU, beside the same by XLA.

``python -m tests.kernels.delta_triton``, with TRITON_INTERPRET=1 in the environment, prints one line of JSON: the
relative error of every result of every program, per case.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when programs are defined
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import torch

from kernels.gated_delta_rule import gpu_form, triton, triton_kernels
from tests.kernels.delta_cases import CASES, Case, draw


def errors_of(case: Case) -> dict[str, float]:
    """The whole rule from interpreted programs, each beside XLA on the same inputs."""
    found = {}

    def beside(name, run, constants, by_xla, arrays, outputs, grid, settings, inputs):
        """Runs a program, keeps its errors, and returns what XLA has."""
        expected = by_xla(*settings, *inputs)
        buffers = [torch.full(shape, float("nan")) for shape in outputs]
        # a copy: torch must not write what JAX owns
        given = [torch.from_numpy(np.array(x)) for x in arrays]
        run[grid](*given, *buffers, **constants)
        for number, (mine, wanted) in enumerate(zip(buffers, jax.tree.leaves(expected))):
            wanted = np.asarray(wanted, np.float64)
            mine = mine.numpy()
            mine = mine.sum(0) if mine.ndim > wanted.ndim else mine  # both directions' states
            error = np.linalg.norm(mine.reshape(wanted.shape) - wanted) / np.linalg.norm(wanted)
            found[f"{name} {number}"] = max(found.get(f"{name} {number}", 0.0), float(error))
        return expected

    def update(sizes, normalised, key_scale, key, value, beta, decay, angles):
        matrix = *decay.shape, 2, sizes.pairs, 2, sizes.pairs
        outputs = [matrix, (*decay.shape, 2, sizes.pairs, sizes.value)]
        outputs += [matrix, (*decay.shape, 2, sizes.pairs, 1)] if normalised else [(1,), (1,)]
        constants = triton.update_constants(sizes, normalised, key_scale)
        arrays = key, value, beta, decay, *(angles or (decay, decay))
        grid, inputs = (sizes.batch * sizes.frames, sizes.heads, 2), (key, value, beta, decay, angles)
        settings = sizes, normalised, key_scale
        by_xla = triton.update_by_xla
        return beside("update", triton_kernels.update, constants, by_xla, arrays, outputs, grid, settings, inputs)

    def scan(sizes, *inputs):
        _, addition, _, memory = inputs
        constants = triton.scan_constants(sizes, addition.shape[-1])
        outputs = (2, *addition.shape), memory.shape
        grid = 2, sizes.batch * sizes.heads, -(-constants["WIDTH"] // constants["COLUMNS"])
        return beside(
            "scan", triton_kernels.scan, constants, triton.scan_by_xla, inputs, outputs, grid, (sizes,), inputs
        )

    def read(sizes, dtype, epsilon, *inputs):
        query, memory, normaliser, angles = inputs
        constants = triton.read_constants(sizes, normaliser is not None, epsilon)
        arrays = query, memory, memory if normaliser is None else normaliser, *(angles or (memory, memory))
        outputs = [(*query.shape[:4], sizes.value)]
        grid = sizes.batch * sizes.frames, sizes.heads, -(-sizes.tokens // constants["BLOCK"])
        settings, by_xla = (sizes, dtype, epsilon), triton.read_by_xla
        return beside("read", triton_kernels.read, constants, by_xla, arrays, outputs, grid, settings, inputs)

    inputs, rotation, state = draw(case)
    parts = gpu_form.Parts(update, scan, read)
    gpu_form.run("triton", parts, *inputs, rotation, case.starts, state, case.scale)
    return found


if __name__ == "__main__":
    print(json.dumps({name: errors_of(case) for name, case in CASES.items()}))
