"""What compiled programs for GPUs would take, reckoned from their text."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sana_jax.errors import UserError
from sana_jax.gpu_compiler import Target
from tests.benchmarks.gpu_compiler import H100, compile_for
from tests.benchmarks.reckoning import Kernel, Speeds, reckon, shape_bytes

# Written by hand in the form that XLA prints: a layer's kernel is cut out of a stack and multiplied, three times; its
# result is written into a stack; then attention, a depthwise convolution, and one of two branches.
PROGRAM = (Path(__file__).parent / "reckoned_program.txt").read_text()


def test_every_kernel_counts_as_often_as_it_runs_with_what_it_reads_writes_and_multiplies():
    speeds = Speeds(bytes=1e9, products=1e9, wide_products=1e8, narrow_products=1e10, attention=1e10, launch=1e-6)
    found = {kernel.name: kernel for kernel in reckon(PROGRAM, speeds).kernels}
    kernel = 64 * 128 * 2
    gemm = 10 * 64 * 2 + kernel + 10 * 128 * 4
    assert found["fusion.cut"][1:7] == ("elementwise", "bf16[1,64,128]", "", 3, 2 * kernel + 4, 0)  # not the stack
    assert found["gemm"][4:7] == (3, gemm, 2 * 10 * 64 * 128)  # without the memory that it works in
    assert found["gemm"].source == "jit(run)/layer/dot"
    assert found["gemm"].seconds == pytest.approx(3 * (2 * 10 * 64 * 128 / 1e9 + 1e-6))
    assert found["fusion.put"][4:7] == (3, 2 * 10 * 128 * 4 + 4, 0)
    assert found["attended"][1] == "attention"
    assert found["attended"][4:7] == (1, 2 * (2 * 6 * 4 * 8) * 2 + 2 * 5 * 4 * 8 * 2, 4 * 2 * 4 * 6 * 5 * 8)
    assert found["conv"][1] == "convolution"
    assert found["conv"].flops == 2 * 9 * 7 * 7 * 16
    assert found["fusion.small"][1] == "product"
    assert found["fusion.small"].seconds == pytest.approx(2 * 10 * 64 * 128 / 1e10 + 1e-6)
    assert isinstance(found["copied"], Kernel)  # of the dearer branch
    whole = reckon(PROGRAM, speeds)
    assert whole.launches == 3 * 3 + 4
    assert whole.seconds == pytest.approx(sum(kernel.seconds for kernel in found.values()))
    assert shape_bytes("(bf16[2,3]{1,0}, f8e4m3fn[4], pred[], s4[2])") == 12 + 4 + 1 + 2


def test_a_kernel_that_is_waited_for_later_counts_once():
    """As XLA of jax 0.12 cuts weights out ahead: both halves counted, with all of the stack."""
    result = "bf16[1,64,128]{2,1,0}"
    started = f"((bf16[3,64,128], s32[]), {result}, u32[]) fusion-start(%kernels, %i), kind=kLoop, calls=%cut"
    apart = f"%cut-start = {started}\n  %fusion.cut = {result} fusion-done(%cut-start)"
    program = PROGRAM.replace(f"%fusion.cut = {result} fusion(%kernels, %i), kind=kLoop, calls=%cut", apart)
    assert program != PROGRAM
    whole, found = reckon(PROGRAM), reckon(program)
    assert (found.launches, found.bytes, found.seconds) == (whole.launches, whole.bytes, whole.seconds)


def test_a_loop_of_unknown_length_counts_once():
    once = reckon(PROGRAM.replace("known_trip_count", "something_else"))
    assert {kernel.times for kernel in once.kernels} == {1}


def test_a_program_is_compiled_for_a_device_that_is_not_here():
    if importlib.util.find_spec("jax_plugins") is None:
        with pytest.raises(UserError, match=r"pip install 'jax\[cuda12\]==.*needs no GPU"):
            Target(H100, 1).devices()
        return
    (device,) = Target(H100, 1).devices()
    half = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
    compiled = compile_for(device, lambda x: jax.nn.silu(x @ x.T), half)
    assert reckon(compiled.as_text()).flops == 2 * 256 * 512 * 256
