"""``python -m kernels.benchmark``: every implementation of every operation, beside the roofline and its reference.

Each row is an implementation at the sizes of a published model: time per call (median, 10th and 90th percentile), time
of compiling, FLOPs and bytes by formula with the share of the peak measured on this machine, and the error against the
operation's reference. An implementation that cannot run here is a row with the reason. ``kernels`` imports JAX alone,
so that this command runs wherever a kernel does; it therefore reads its options with argparse.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels import selection
from kernels.benchmarking.ops import Op, describe_sizes
from kernels.benchmarking.pointwise_ops import OPS
from kernels.benchmarking.report import compare, environment, markdown, read_report, write_report, write_whole
from kernels.benchmarking.roofline import measure_peaks, roofline
from kernels.benchmarking.timing import compile_timed, time_interleaved

PROGRAM = "python -m kernels.benchmark"
SIZES = ("tiny", "reduced", "full")
WHATS = ("values", "gradients")
DTYPES = ("float32", "bfloat16")
# matrix product's side and copied bytes: on a GPU far more than its caches hold
PEAK_SIZES = {"tiny": (128, 1 << 16), "reduced": (1024, 1 << 28), "full": (8192, 1 << 30)}


def measure_op(
    op: Op,
    implementations: Sequence[str],
    case: str,
    sizes: Mapping[str, Any],
    dtype: str,
    what: str,
    peaks: Mapping[str, Any],
    repetitions: int,
) -> list[dict[str, Any]]:
    """The rows of one operation at one size: its implementations in turn.

    Args:
        op: the operation.
        implementations: names of those to run.
        case: what has these sizes.
        sizes: its sizes.
        dtype: of the inputs.
        what: ``values`` or ``gradients``.
        peaks: of ``measure_peaks``.
        repetitions: samples of each.
    """
    arrays = op.draw(dict(sizes), jnp.dtype(dtype))
    start = {"case": f"{op.name}, {case}", "what": what, "shape": describe_sizes(dict(sizes)), "dtype": dtype}
    cost = op.least(dict(sizes), dtype, what == "gradients")
    rows, functions, cotangent = {}, {}, None
    if what == "gradients":
        shape = jax.eval_shape(lambda arrays: op.run(arrays, selection.DEFAULT), arrays)
        cotangent = jnp.asarray(np.random.default_rng(3).standard_normal(shape.shape, np.float32))
    expected = _expected(op, arrays, cotangent)
    for name in implementations:
        row = rows[name] = {**start, "implementation": name}
        try:
            compiled, compilation = compile_timed(measured_function(op, name, what), arrays, cotangent)
            found = jax.block_until_ready(compiled(arrays, cotangent))
        except Exception as error:  # whatever a kernel or its library raises is a row's reason, not the table's end
            row["note"] = f"cannot run here: {_first_line(error)}"
            continue
        row |= compilation
        row["error"] = max(relative_error(x, y) for x, y in zip(_narrowed(op, found, what), expected))
        functions[name] = functools.partial(compiled, arrays, cotangent)
        del found
    if functions:
        at_least = 0.0 if jax.default_backend() == "cpu" else 0.02
        timings = time_interleaved(functions, repetitions, at_least=at_least)
        for name, timing in timings.items():
            rows[name] |= timing.summary() | roofline(cost, peaks, timing.median)
            if selection.DEFAULT in timings and name != selection.DEFAULT:
                ratio = timing.median / timings[selection.DEFAULT].median
                rows[name]["figures"] = {f"time / {selection.DEFAULT}'s": ratio}
    return list(rows.values())


def measured_function(op: Op, name: str, what: str) -> Callable[[Any, Any], Any]:
    """What a row is about, of the inputs and of the cotangent (None for values): ``values`` or ``gradients``."""

    def values(arrays: Any, cotangent: Any) -> Any:
        return op.run(arrays, name)

    def gradients(arrays: Any, cotangent: Any) -> Any:
        def scalar(chosen: Any) -> Any:
            return (op.run(arrays | chosen, name).astype(jnp.float32) * cotangent).sum()

        return jax.grad(scalar)({own: arrays[own] for own in op.differentiable})

    return gradients if what == "gradients" else values


def _expected(op: Op, arrays: Any, cotangent: Any) -> list[np.ndarray]:
    """The reference on float32 copies of the part of the inputs that is compared, as a list of arrays.

    One example and head of an input do not act on another's result, so the part is exact. Parameters that all examples
    share (kernels of a convolution) come whole: operations that have them are not cut.
    """
    narrow = {name: x if x.dtype == jnp.bool_ else x.astype(jnp.float32) for name, x in op.narrow(arrays).items()}
    if cotangent is None:
        return [np.asarray(jax.jit(op.reference)(narrow))]
    towards = op.narrow_result(cotangent)

    def scalar(chosen: Any) -> Any:
        return (op.reference(narrow | chosen) * towards).sum()

    gradients = jax.jit(jax.grad(scalar))({name: narrow[name] for name in op.differentiable})
    return [np.asarray(gradients[name]) for name in sorted(gradients)]


def _narrowed(op: Op, found: Any, what: str) -> list[np.ndarray]:
    if what == "values":
        return [np.asarray(op.narrow_result(found).astype(jnp.float32))]
    narrow = op.narrow(found)
    return [np.asarray(narrow[name].astype(jnp.float32)) for name in sorted(narrow)]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference over that of what is expected; infinite where a value is not finite."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    if found.shape != expected.shape:
        raise ValueError(f"shapes {found.shape} and {expected.shape} differ: the benchmark's narrowing is wrong")
    if not np.isfinite(found).all():
        return float("inf")
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


# -- the command -------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The report of the operations that the options name."""
    started, picked = time.monotonic(), selection.describe(options.ops).splitlines()
    operations = _operations(options)
    report = environment(f"{PROGRAM} {' '.join(options.argv)}".strip())
    matmul, copied = PEAK_SIZES[options.size]
    say(f"measuring the peaks of {report['device']}")
    report["peaks"] = measure_peaks(matmul, copied)
    rows: list[dict[str, Any]] = []
    for name, implementations in operations.items():
        if name not in OPS:
            rows.append({"case": name, "note": "no sizes and reference for it in kernels/benchmarking"})
            continue
        for (case, sizes), dtype, what in _runs(OPS[name], options):
            if options.seconds is not None and time.monotonic() - started > options.seconds:
                row = {"case": f"{name}, {case}", "what": what, "dtype": dtype}
                rows.append({**row, "note": f"left out: --seconds {options.seconds:g} had passed"})
                continue
            say(f"{name}, {case}: {what} in {dtype} of {', '.join(implementations)}")
            rows += measure_op(
                OPS[name], implementations, case, sizes, dtype, what, report["peaks"], options.repetitions
            )
            gc.collect()
            jax.clear_caches()
    report["rows"] = rows
    report["notes"] = [
        "Errors: root mean square of the difference from the reference in float32 over the reference's, first example "
        "and head; the largest over all inputs where gradients are taken.",
        "Operands are the same in every call: what fits a cache may stay there, and the share can pass 100 %.",
        *(f"None picks: {line}" for line in picked),
    ]
    return report


def _operations(options: argparse.Namespace) -> dict[str, list[str]]:
    """Names of operations and of their implementations that are asked for.

    Raises:
        ValueError: a name that there is not.
    """
    known = {name: list(implementations) for name, implementations in selection.operations().items()}
    if unknown := sorted(set(options.ops or ()) - set(known)):
        raise ValueError(f"--ops {' '.join(unknown)}: choose from {', '.join(sorted(known))}")
    chosen = {name: known[name] for name in options.ops or known}
    every = sorted({name for names in chosen.values() for name in names})
    if unknown := sorted(set(options.implementations or ()) - set(every)):
        raise ValueError(f"--implementations {' '.join(unknown)}: these operations have {', '.join(every)}")
    if options.implementations:
        chosen = {op: [name for name in names if name in options.implementations] for op, names in chosen.items()}
    return {op: names for op, names in chosen.items() if names}


def _runs(op: Op, options: argparse.Namespace) -> Iterator[tuple[tuple[str, Mapping[str, Any]], str, str]]:
    for case in op.cases[options.size].items():
        for dtype in options.dtypes:
            for what in options.what:
                yield case, dtype, what


def measurement_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the report says about each implementation beside XLA, in the form of ``kernels/measurements.json``."""
    platform = {"gpu": "cuda"}.get(report["platform"], report["platform"])
    kept = ("jax", "jaxlib", "triton", "jax-triton")
    versions = {name: value for name, value in report["versions"].items() if name in kept}
    return [
        dataclasses.asdict(
            selection.Measurement(
                op=row["case"].split(",")[0],
                implementation=row["implementation"],
                platform=platform,
                device=report["device"],
                versions=versions,
                date=report["date"].split()[0],
                shapes=f"{row['what']}, {row['dtype']}, {row['shape']}",
                ratio=round(row["figures"][f"time / {selection.DEFAULT}'s"], 4),
                how=f"{report['command']}: median of {row['repetitions']} samples in turn",
            )
        )
        for row in report["rows"]
        if "median_s" in row and "figures" in row
    ]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message}; see {self.prog} --help")


# What is read where nothing is measured.
_READ = {"compare": ("compare", "across_devices"), "picks": ("picks", "ops", "implementations")}


def _refuse_unread(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raises ``ValueError`` for options that a command which measures nothing would not read."""
    for mode, read in _READ.items():
        if not getattr(options, mode):
            continue
        others = [name for name in vars(options) if name not in read]
        unused = [
            f"--{name.replace('_', '-')}" for name in others if getattr(options, name) != parser.get_default(name)
        ]
        if unused:
            raise ValueError(
                f"{', '.join(unused)} would not be used with --{mode}, which measures nothing; leave it out"
            )


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = _Parser(
        prog=PROGRAM, description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--size", choices=("auto", *SIZES), default="auto", help="of the inputs; auto: full on a GPU, else reduced")
    add("--ops", nargs="+", metavar="OP", help="operations; all of them without it")
    add("--implementations", nargs="+", metavar="NAME", help="only these, such as xla pallas; all without it")
    add("--what", nargs="+", choices=WHATS, default=list(WHATS), help="values, gradients by all inputs, or both")
    add("--dtypes", nargs="+", choices=DTYPES, help="of the inputs; without it float32, and bfloat16 on a GPU")
    add("--seconds", type=float, help="begin no further row after so many; those left out are named in the table")
    add("--repetitions", type=int, default=10, help="samples of each row")
    place = "where the report goes, as .json and .md, and .measurements.json for kernels/measurements.json"
    add("--output", type=pathlib.Path, default=pathlib.Path("runs/benchmarks/kernels"), help=place)
    add("--picks", action="store_true", help="only say what implementation=None picks, and by which measurements")
    add("--compare", nargs=2, type=pathlib.Path, metavar=("A.json", "B.json"), help="only compare two reports")
    add("--across-devices", action="store_true", help="with --compare: allow reports from different devices")
    options = parser.parse_args(list(argv))
    _refuse_unread(options, parser)
    options.argv = list(argv)
    if options.across_devices and not options.compare:
        raise ValueError("--across-devices would not be used without --compare; leave it out")
    if options.seconds is not None and not options.seconds > 0:
        raise ValueError(f"--seconds {options.seconds}: allowed is more than 0; leave it out for all rows")
    if options.repetitions < 1:
        raise ValueError(f"--repetitions {options.repetitions}: allowed is 1 or more; 10 is usual")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    try:
        options = parse_options(sys.argv[1:] if argv is None else argv)
        if options.picks:
            print(selection.describe(_operations(options)))
            return 0
        if options.compare:
            first, second = (read_report(path) for path in options.compare)
            print(compare(first, second, across_devices=options.across_devices))
            return 0
        on_gpu = jax.default_backend() != "cpu"
        options.size = ("full" if on_gpu else "reduced") if options.size == "auto" else options.size
        options.dtypes = options.dtypes or (list(DTYPES) if on_gpu else ["float32"])
        report = measure(options)
        written = write_report(report, options.output)
        rows = json.dumps(measurement_rows(report), indent=2) + "\n"
        written.append(options.output.with_name(options.output.name + ".measurements.json"))
        write_whole(written[-1], rows.encode())
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("\n" + markdown(report))
    print("\nwritten: " + ", ".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
