"""Triton kernels through jax-triton itself, for an H100 that need not be here; prints the calls of each program.

A program of its own, since pytest's checks of shapes hide the source of Triton functions from Triton.
"""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp

from configs.published import PUBLISHED_TRANSFORMERS, PUBLISHED_VIDEO_TRANSFORMERS
from kernels.gated_delta_rule import triton
from kernels.linear_attention.api import relu_linear_attention, rope_linear_attention
from kernels.softmax_attention.cudnn import on_capability
from sana_jax.gpu_compiler import Target
from tests.benchmarks.gpu_compiler import H100, compile_for
from tests.kernels.cuda_lowering import an_h100, lower_for_cuda
from tests.kernels.delta_cases import CASES, draw, with_gradients
from tests.kernels.shapes import attention_shapes

VIDEO_TOKENS = 21 * 15 * 26  # 81 frames of 480x832


def calls(program: str) -> int:
    """Of Triton kernels; jax-triton compiles each to PTX while it lowers."""
    return program.count("triton_kernel_call")


def main() -> None:
    found = {}
    for dtype, batch, tokens, heads, size in attention_shapes(PUBLISHED_TRANSFORMERS):
        x = jax.ShapeDtypeStruct((batch, tokens, heads, size), dtype)
        run = functools.partial(relu_linear_attention, implementation="triton")
        found[f"linear attention {dtype} {x.shape}"] = calls(lower_for_cuda(run, x, x, x))
    for name, entry in PUBLISHED_VIDEO_TRANSFORMERS.items():
        heads, size = entry.config.num_attention_heads, entry.config.attention_head_dim
        x = jax.ShapeDtypeStruct((1, VIDEO_TOKENS, heads, size), entry.dtype)
        table = jax.ShapeDtypeStruct((VIDEO_TOKENS, size // 2), jnp.float32)
        run = functools.partial(rope_linear_attention, implementation="triton")
        found[f"with rotation, {name}"] = calls(lower_for_cuda(run, x, x, x, table, table))
    for name, case in CASES.items():

        def run(inputs, rotation, state, case=case):
            return triton.gated_delta_rule(*inputs, rotation, case.starts, state, case.scale)

        found[f"gated delta rule, {name}"] = calls(lower_for_cuda(with_gradients(run), *draw(case)))
    (device,) = Target(H100, 1).devices()
    x = jax.ShapeDtypeStruct((2, 1024, 70, 32), jnp.bfloat16)
    with an_h100(), on_capability(H100.capability):
        compiled = compile_for(device, functools.partial(relu_linear_attention, implementation="triton"), x, x, x)
    found["compiled for the device"] = calls(compiled.as_text())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
