"""Runs Pallas kernels, interpreted, over a mesh of eight simulated devices, and writes down what came of it.

python -m tests.kernels.over_mesh_worker OUTPUT.json CASE...
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import sys

from tests.simulated_devices import simulated_devices

os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = simulated_devices(8)

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels import selection
from kernels.adaln import api as adaln
from kernels.gated_delta_rule import api as delta
from kernels.linear_attention import api as linear
from kernels.mix_ffn import api as mix
from kernels.qk_norm import api as qk
from kernels.softmax_attention import cudnn, softmax_attention
from tests.kernels.cuda_lowering import lower_for_cuda, triton_kernels
from tests.kernels.shapes import relative_error

BATCH = ("data", "fsdp")
RNG = np.random.default_rng(0)
ROW = selection.Measurement("", "pallas", "cpu", "", {}, "2026-01-01", "", 0.5, "")


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def angles(tokens, pairs):
    given = draw(tokens, pairs)
    return jnp.cos(given), jnp.sin(given)


HEADS = PartitionSpec(BATCH, None, "tensor")
FRAMES = PartitionSpec(BATCH, None, None, "tensor")
TOKENS = PartitionSpec(BATCH)
WHOLE = PartitionSpec()
COS, SIN = angles(6, 4)


def delta_rule(query, key, value, beta, decay, **options):
    query, key, beta, decay = jax.nn.relu(query), jax.nn.relu(key), jax.nn.sigmoid(beta), jax.nn.sigmoid(decay)
    return delta.gated_delta_rule(query, key, value, beta, decay, (COS, SIN), key_scale=0.2, **options)


# name: mesh (data, fsdp, tensor), function, inputs, how they are cut
CASES = {
    "rope_linear_attention": (
        (2, 2, 2),
        lambda *given, **options: linear.rope_linear_attention(*given, COS, SIN, **options),
        [draw(4, 6, 2, 8) for _ in range(3)],
        [HEADS] * 3,
    ),
    "gated_delta_rule": (
        (2, 2, 2),
        lambda *given, **options: delta_rule(*given, **options)[0],
        [draw(4, 3, 2, 2, 8), draw(4, 3, 2, 2, 8), draw(4, 3, 2, 2, 8), draw(4, 3, 2, 2), draw(4, 3, 2)],
        [*[FRAMES] * 4, HEADS],
    ),
    "modulated_norm": (
        (2, 2, 2),
        lambda *given, **options: adaln.modulated_norm(*given, 1e-6, **options),
        [draw(4, 3, 5, 12), draw(4, 3, 1, 12), draw(1, 3, 1, 12)],
        [TOKENS, TOKENS, WHOLE],
    ),
    "gated_residual": (
        (4, 2, 1),
        adaln.gated_residual,
        [draw(8, 5, 12), draw(8, 1, 12), draw(8, 5, 12)],
        [TOKENS] * 3,
    ),
    "mix_ffn": (
        (4, 2, 1),
        mix.mix_ffn,
        [draw(8, 3, 4, 6), draw(6), draw(3, 3, 6), draw(6)],
        [TOKENS, WHOLE, WHOLE, WHOLE],
    ),
    "qk_norm": (
        (4, 2, 1),
        lambda *given, **options: qk.qk_norm(*given, (COS, SIN), epsilon=1e-6, **options),
        [draw(8, 6, 16), draw(16)],
        [TOKENS, WHOLE],
    ),
}


def mesh_of(*sizes):
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def interpret_kernels() -> None:
    """Puts its interpreted form, which a CPU may run, in the place of every Pallas kernel, and has None pick it."""
    selection.DEVICE_PROGRAMS = {**selection.DEVICE_PROGRAMS, "pallas": ("cpu", "cuda")}
    for table in selection.operations().values():
        if "pallas" in table:
            table["pallas"] = functools.partial(table["pallas"], interpret=True)
    rows = tuple(dataclasses.replace(ROW, op=op) for op, table in selection.operations().items() if "pallas" in table)
    selection.measurements = lambda: rows


def with_gradients(function):
    def run(*inputs):
        out, pull = jax.vjp(function, *inputs)
        return out, *pull(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    return run


def one_device_and_eight(name: str) -> dict:
    """The named kernel on one device, and what None picks, the same kernel, on eight."""
    sizes, function, inputs, specs = CASES[name]
    expected = jax.jit(with_gradients(functools.partial(function, implementation="pallas")))(*inputs)
    mesh, said = mesh_of(*sizes), io.StringIO()
    with jax.set_mesh(mesh), contextlib.redirect_stderr(said):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(inputs, specs)]
        compiled = jax.jit(with_gradients(function)).lower(*placed).compile()
        found, program = compiled(*placed), compiled.as_text()
    return {
        "errors": [relative_error(*pair) for pair in zip(found, expected)],
        "gathers": program.count("all-gather"),
        "parts": [list(x.sharding.shard_shape(x.shape)) for x in found],
        "said": said.getvalue(),
    }


def frames_split_as_well() -> dict:
    """The delta rule inside a ``shard_map`` over frames, as SANA-WM has it; the seam does the rest of the mesh."""
    _, _, inputs, _ = CASES["gated_delta_rule"]
    inputs = [jnp.concatenate([x, x[:, :1]], axis=1) for x in inputs]  # four frames
    cos, sin = angles(8, 4)

    def rule(query, key, value, beta, decay, cos, sin, **options):
        query, key, beta, decay = jax.nn.relu(query), jax.nn.relu(key), jax.nn.sigmoid(beta), jax.nn.sigmoid(decay)
        given = query, key, value, beta, decay, (cos, sin)
        return delta.gated_delta_rule(*given, key_scale=0.2, implementation="pallas", **options)[0]

    expected = jax.jit(with_gradients(lambda *x: rule(*x, cos, sin)))(*inputs)
    mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "context"), axis_types=(AxisType.Auto,) * 3)
    over_frames, tables = PartitionSpec(None, "context"), PartitionSpec("context")
    with jax.set_mesh(mesh):
        split = jax.shard_map(
            lambda *x: rule(*x, axis_name="context"),
            in_specs=(*[over_frames] * 5, tables, tables),
            out_specs=over_frames,
            axis_names={"context"},
            check_vma=False,
        )
        found = jax.jit(with_gradients(lambda *x: split(*x, cos, sin)))(*inputs)
    return {"errors": [relative_error(*pair) for pair in zip(found, expected)]}


def refusals() -> dict:
    """What kernels that need all channels, or whole heads, say under a mesh that cuts them; and None in their place."""
    odd_heads = linear.relu_linear_attention, [draw(4, 5, 3, 8)] * 3
    cases = {"mix_ffn": CASES["mix_ffn"][1:3], "qk_norm": CASES["qk_norm"][1:3], "odd heads": odd_heads}
    found = {}
    for name, (function, inputs) in cases.items():
        said = io.StringIO()
        with jax.set_mesh(mesh_of(2, 2, 2)), contextlib.redirect_stderr(said):
            picked, by_xla = (jax.jit(functools.partial(function, implementation=i))(*inputs) for i in (None, "xla"))
            found[name] = reason_of(functools.partial(function, implementation="pallas"), inputs)
        found[name] |= {"said": said.getvalue(), "same": bool((picked == by_xla).all())}
    with jax.set_mesh(jax.make_mesh((8,), ("pictures",), axis_types=(AxisType.Auto,))):
        named = functools.partial(linear.relu_linear_attention, implementation="pallas")
        found["other axis"] = reason_of(named, [draw(4, 5, 2, 8)] * 3)
    return found


def reason_of(function, inputs) -> dict:
    try:
        jax.jit(function)(*inputs)
    except ValueError as error:
        return {"reason": str(error)}
    return {"reason": None}


def lowered_for_cuda() -> dict:
    """SANA 1.6B at 1024 px, guided, over eight devices: kernels and cuDNN get one example of half the heads."""
    fused_attention_stablehlo.cuda_versions = type("Versions", (), {"cudnn_get_version": staticmethod(lambda: 91300)})
    cudnn.largest_size, cudnn.fault_here = lambda: cudnn.LARGEST_SIZE, lambda: None
    shape, own = jax.ShapeDtypeStruct((4, 1024, 70, 32), jnp.bfloat16), "tensor<1x1024x35x32xbf16>"
    caption = jax.ShapeDtypeStruct((4, 300, 70, 32), jnp.bfloat16)
    with jax.set_mesh(mesh_of(2, 2, 2)):
        fused = functools.partial(linear.relu_linear_attention, implementation="pallas")
        program = lower_for_cuda(fused, *[shape] * 3)
        by_cudnn = functools.partial(softmax_attention, implementation="cudnn")
        attended = lower_for_cuda(by_cudnn, shape, caption, caption)
    parts = [own in program, own in attended and "fmhaSoftmax" in attended]
    return {"kernels": triton_kernels(program), "parts": parts}


def main() -> None:
    report = {"cuda": lowered_for_cuda()}
    interpret_kernels()
    made = {"frames": frames_split_as_well, "refusals": refusals}
    made |= {name: functools.partial(one_device_and_eight, name) for name in CASES}
    report |= {name: made[name]() for name in sys.argv[2:]}
    with open(sys.argv[1], "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main()
