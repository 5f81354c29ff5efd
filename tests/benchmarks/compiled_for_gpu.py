"""``python -m tests.benchmarks.compiled_for_gpu``: what programs would take on an H100, where there is none.

They are compiled as they would be there; time is reckoned from what they read, write and multiply (``reckoning``), and
memory is what the compiler says.

    python -m tests.benchmarks.compiled_for_gpu ops bounded_softmax_attention --rows rows.json
    python -m tests.benchmarks.compiled_for_gpu networks
    python -m tests.benchmarks.compiled_for_gpu networks world --most 20
    python -m tests.benchmarks.compiled_for_gpu steps lora_24gb sana_video_2b_480p:8

``ops`` compares implementations and writes rows for ``kernels/measurements.json``; ``networks`` are forward passes and
decoders at full size, with ``--most`` their dearest kernels; ``steps`` are train steps of presets, on so many devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernels import selection
from kernels.benchmark import measured_function
from kernels.benchmarking.ops import Op, describe_sizes
from kernels.benchmarking.pointwise_ops import OPS
from kernels.softmax_attention.cudnn import on_capability
from sana_jax.compilation import readable_bytes
from sana_jax.devices import prefer_device
from sana_jax.gpu_compiler import Target
from tests.benchmarks.gpu_compiler import H100, compile_for
from tests.benchmarks.gpu_networks import NETWORKS
from tests.benchmarks.reckoning import Reckoning, reckon
from train.memory import compiled_bytes

HOW = "python -m tests.benchmarks.compiled_for_gpu ops: compiled for it without one; bytes, products and launches"
HEAD = ("reckoned", "launched", "moved", "products", "memory", "compile")


def cells(compiled: jax.stages.Compiled, seconds: float) -> tuple[Reckoning, list[str]]:
    """What ``HEAD`` names."""
    found, memory = reckon(compiled.as_text()), compiled.memory_analysis()
    return found, [
        f"{1e3 * found.seconds:.2f} ms",
        f"{found.launches}",
        f"{found.bytes / 1e9:.2f} GB",
        f"{found.flops / 1e12:.2f} TFLOP",
        readable_bytes(memory.temp_size_in_bytes),
        f"{seconds:.1f} s",
    ]


def print_row(name: str, values: list[str]) -> None:
    print(f"| {name} | " + " | ".join(values) + " |", flush=True)


def print_head(*names: str) -> None:
    print_row(" | ".join(names), list(HEAD))
    print("|---" * (len(names) + len(HEAD)) + "|")


def print_dearest(found: Reckoning, most: int) -> None:
    for kernel in sorted(found.kernels, key=lambda kernel: -kernel.seconds)[:most]:
        print(
            f"    {1e3 * kernel.seconds:9.3f} ms  {kernel.times:6d} x {kernel.bytes / 1e6:9.1f} MB "
            f"{kernel.flops / 1e9:9.1f} GFLOP  {kernel.kind:11s} {kernel.name[:32]:32s} {kernel.shape[:40]:40s} "
            f"{kernel.source[-70:]}"
        )


# -- operations --------------------------------------------------------------------------------------------------------


def op_rows(op: Op, device: jax.Device, most: int) -> Iterator[dict[str, Any]]:
    """Prints an operation's implementations; rows of the table of measurements for those that can be reckoned."""
    implementations = selection.operations()[op.name]
    runs = [
        (case, sizes, dtype, what)
        for case, sizes in op.cases["full"].items()
        for dtype in ("bfloat16", "float32")
        for what in ("values", "gradients")
    ]
    for case, sizes, dtype, what in runs:
        arrays = jax.eval_shape(lambda sizes=sizes, dtype=dtype: op.draw(dict(sizes), jnp.dtype(dtype)))
        result = jax.eval_shape(lambda arrays: op.run(arrays, selection.DEFAULT), arrays)
        cotangent = jax.ShapeDtypeStruct(result.shape, jnp.float32) if what == "gradients" else None
        found: dict[str, Reckoning] = {}
        for name in implementations:
            label, started = f"{op.name}, {case} | {what} | {dtype} | {name}", time.perf_counter()
            try:
                compiled = compile_for(device, measured_function(op, name, what), arrays, cotangent)
            except (ValueError, RuntimeError) as error:  # what it does not take, or lacks here
                print_row(label, [f"not here: {' '.join(str(error).split())[:120]}"])
                continue
            found[name], values = cells(compiled, time.perf_counter() - started)
            print_row(label, values)
            print_dearest(found[name], most)
        for name, reckoned in found.items():
            known = all(kernel.kind != "custom" for kernel in reckoned.kernels)
            if name != selection.DEFAULT and known:
                yield dataclasses.asdict(
                    selection.Measurement(
                        op=op.name,
                        implementation=name,
                        platform="cuda",
                        device=device.device_kind,
                        versions={"jax": jax.__version__},
                        date=f"{datetime.date.today()}",
                        shapes=f"{what}, {dtype}, {describe_sizes(dict(sizes))}",
                        ratio=round(reckoned.seconds / found[selection.DEFAULT].seconds, 4),
                        how=HOW,
                        timed=False,
                    )
                )


# -- train steps -------------------------------------------------------------------------------------------------------


def compile_steps(preset: str, count: int) -> Iterator[tuple[str, jax.stages.Compiled, float]]:
    """The kinds of step of a preset at its full size, with the published model where it starts from one."""
    from configs import load_preset
    from tests.train.presets import preset_run
    from train.sharding import make_mesh

    mesh = make_mesh(load_preset(preset).mesh, Target(H100, count).devices())
    # not jax.set_mesh: what is computed while tracing would be computed on devices that compute nothing
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = preset_run(preset, mesh)
        for number, step in enumerate(run.jitted_steps(), 1):
            started = time.perf_counter()
            compiled = compile_for(mesh.devices.flat[0], step, run.state.abstract, run.frozen, run.batch)
            name = (
                f"{preset}, step {number}, {count} devices, batch {run.config.batch_size}, {run.config.compute.remat}"
            )
            yield name, compiled, time.perf_counter() - started


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.compiled_for_gpu", description=__doc__)
    parser.add_argument("what", choices=("ops", "networks", "steps"))
    parser.add_argument(
        "names", nargs="*", help="operations or networks, all of them without it; or presets (PRESET:DEVICES)"
    )
    parser.add_argument("--most", type=int, default=0, help="of each program's kernels that are shown, the dearest")
    parser.add_argument("--rows", type=pathlib.Path, help="with ops: where rows for kernels/measurements.json go")
    options = parser.parse_args(argv)
    known = {"ops": OPS, "networks": NETWORKS}.get(options.what)
    if known is None and not options.names:
        parser.error("steps: name presets, such as lora_24gb or sana_1600m_1024:8")
    if unknown := [name for name in options.names if known is not None and name not in known]:
        parser.error(f"{options.what}: {', '.join(unknown)} not known; choose from {', '.join(known)}")
    if options.rows and options.what != "ops":
        parser.error(f"--rows would not be used with {options.what}; leave it out")
    prefer_device("cpu")
    (device,) = Target(H100, 1).devices()
    if options.what == "ops":
        print_head("operation", "what", "dtype", "implementation")
        rows = [row for name in options.names or OPS for row in op_rows(OPS[name], device, options.most)]
        if options.rows:
            options.rows.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    elif options.what == "networks":
        print_head("network")
        for name in options.names or NETWORKS:
            started = time.perf_counter()
            with on_capability(H100.capability):
                function, arguments = NETWORKS[name]()
            compiled = compile_for(device, function, *arguments)
            found, values = cells(compiled, time.perf_counter() - started)
            print_row(name, values)
            print_dearest(found, options.most)
    else:
        print_head("step", "in all")
        for name in options.names:
            preset, _, count = name.partition(":")
            for label, compiled, seconds in compile_steps(preset, int(count or 1)):
                found, values = cells(compiled, seconds)
                print_row(f"{label} | {readable_bytes(compiled_bytes(compiled))}", values)
                print_dearest(found, options.most)
    return 0


if __name__ == "__main__":
    sys.exit(main())
