"""The Triton programs of the gated delta rule: interpreted beside XLA, compiled for a card, run on a GPU."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.gated_delta_rule import gpu_form, triton
from kernels.gated_delta_rule.tiles import Sizes
from tests.kernels.delta_cases import CASES, assert_close, defined_in_double, draw, preset_shapes, with_gradients

VALUE, GRADIENT = 2e-6, 1e-5
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("name", ["main", "camera"])
def test_the_parts_whose_gradient_is_taken_are_the_definition(name):
    case = CASES[name]

    def run(inputs, rotation, state):
        return gpu_form.run("triton", triton.by_xla, *inputs, rotation, case.starts, state, case.scale)

    assert_close(with_gradients(run)(*draw(case)), defined_in_double(case), VALUE, GRADIENT)


@needs_triton
def test_the_programs_under_tritons_interpreter():
    """In a process of its own, since the programs must be defined under the interpreter."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.kernels.delta_triton"]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == CASES.keys()
    for case, errors in found.items():
        # of the update two or four results, of the scan two, of reading one
        assert len(errors) == (7 if CASES[case].normalised else 5)
        for name, error in errors.items():
            assert error <= VALUE, f"{case}, {name}: {error:.1e}"


def _sizes(shape: tuple, rotated: bool) -> Sizes:
    _, frames, tokens, heads, size = shape
    return Sizes(1, frames, tokens, heads, size, size, rotated, interpret=False)


def _programs(sizes: Sizes, element: str, normalised: bool) -> dict[str, tuple[list[str], dict]]:
    """Types of the arguments and constants of every program at these sizes."""
    single = "*fp32"
    return {
        "update": ([element, element, *[single] * 8], triton.update_constants(sizes, normalised, 0.01)),
        "scan": ([single, single, "*i32", *[single] * 3], triton.scan_constants(sizes, sizes.value)),
        "read": ([element, *[single] * 4, element], triton.read_constants(sizes, normalised, 1e-8)),
    }


@needs_triton
@pytest.mark.prove
@pytest.mark.parametrize("normalised", [True, False])
def test_compiles_for_a_card(normalised):
    """To PTX and machine code of compute capability 9.0, at the largest shape of the presets; nothing is run."""
    import triton as compiler
    from triton.backends.compiler import GPUTarget

    from kernels.gated_delta_rule import triton_kernels

    shape = max(preset_shapes(), key=lambda shape: shape[1] * shape[2] * shape[4])
    element = "*bf16" if normalised else "*fp32"
    for name, (types, constants) in _programs(_sizes(shape, normalised), element, normalised).items():
        program = getattr(triton_kernels, name)
        names = [x for x in program.arg_names if x not in constants]
        signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
        source = compiler.compiler.ASTSource(program, signature, constexprs=constants)
        options = {"num_warps": 4 if name == "scan" else 8, "num_stages": 1}
        compiled = compiler.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 100 * 1024


def test_absence_is_named(monkeypatch):
    case = CASES["unrotated"]
    inputs, _, state = draw(case)
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    with pytest.raises(ValueError, match=r"'triton' needs jax-triton, .*sana-jax\[gpu\]"):
        triton.gated_delta_rule(*inputs, None, case.starts, state)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name):
    """Compiled programs beside the definition in float64, values and gradients."""
    case = CASES[name]

    def run(inputs, rotation, state):
        return triton.gated_delta_rule(*inputs, rotation, case.starts, state, case.scale)

    assert_close(with_gradients(run)(*draw(case)), defined_in_double(case), VALUE, GRADIENT)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_published_sizes_on_a_gpu(dtype):
    """Beside Pallas' kernels, which do the same arithmetic."""
    from kernels.gated_delta_rule import pallas
    from tests.kernels.delta_cases import Case
    from tests.kernels.shapes import relative_error

    case = Case(1, 5, 880, 20, 112, 112, (0, 3))
    inputs, rotation, state = draw(case)
    inputs = tuple(x.astype(dtype) for x in inputs)

    def run(form, inputs, rotation, state):
        return form(*inputs, rotation, case.starts, state, case.scale)

    found, wanted = (
        jax.jit(functools.partial(run, form))(inputs, rotation, state)
        for form in (triton.gated_delta_rule, pallas.gated_delta_rule)
    )
    limit = VALUE if dtype == np.float32 else float(jnp.finfo(jnp.bfloat16).eps)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert relative_error(mine, theirs) <= limit
