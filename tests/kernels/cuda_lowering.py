"""Lowering for CUDA on a machine without one: what a kernel's tests on a CPU can say about its compiled form.

Lowering runs the whole of Pallas' translation to Triton, which refuses shapes that interpret mode lets pass, such as
blocks whose size is not a power of two. It neither compiles for a device nor runs anything.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

# What a Pallas kernel that is lowered through Triton becomes; jax 0.10 and later agree on it.
TRITON_CALL = "gpu.triton"


def lower_for_cuda(function: Callable, *arguments: Any) -> str:
    """The program that ``function`` lowers to for CUDA, as text; arguments may be ``jax.ShapeDtypeStruct``."""
    return _lowered(function, *arguments).as_text()


def triton_kernels(program: str) -> int:
    """How many calls of Triton kernels a lowered program has."""
    return program.count(TRITON_CALL)


def shared_memory(function: Callable, *arguments: Any) -> dict[str, int]:
    """Bytes of shared memory that each Pallas kernel of ``function`` asks for on an H100.

    Compiles what Pallas hands over with the ``triton`` package, which brings its compiler along and needs no GPU. A
    kernel that asks for more than a device has lowers, and fails only when it is started there.
    """
    import triton
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect
    from triton.backends.compiler import GPUTarget

    module = _lowered(function, *arguments).compiler_ir()
    found = {}
    for place, call in enumerate(_triton_calls(module.operation)):
        config = call.attributes["mhlo.backend_config"]
        context = ir.Context()
        dialect.register_dialect(context)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.ttir"
            path.write_text(str(ir.Module.parse(config["ir"].value_bytes, context)))
            options = {name: int(config[name].value) for name in ("num_warps", "num_stages")}
            kernel = triton.compile(str(path), target=GPUTarget("cuda", 90, 32), options=options)
        found[f"{place} {config['name'].value}"] = kernel.metadata.shared
    return found


def _lowered(function: Callable, *arguments: Any) -> jax.stages.Lowered:
    compiled = function if hasattr(function, "trace") else jax.jit(function)
    with an_h100():
        return compiled.trace(*arguments).lower(lowering_platforms=("cuda",))


def an_h100() -> AbstractContextManager:
    """What Pallas lowers for: from jax 0.12 on it asks which GPU, before that it takes none."""
    if jax.__version_info__ < (0, 12):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.get_abstract_mesh()
    axes = {"axis_types": mesh.axis_types} if mesh.axis_names else {}
    mesh = jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names, abstract_device=device, **axes)
    return jax.sharding.use_abstract_mesh(mesh)


def _triton_calls(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                if inner.operation.name == "stablehlo.custom_call" and TRITON_CALL in str(
                    inner.attributes["call_target_name"]
                ):
                    yield inner
                yield from _triton_calls(inner.operation)
