"""Benchmark reports: where and with what they were measured, as JSON and Markdown, and the comparison of two.

A report is a dictionary of ``environment`` and a list of rows. Rows that say the same under ``IDENTITY`` measure the
same thing.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

IDENTITY = ("case", "what", "implementation", "shape", "dtype")
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "triton", "jax-triton", "torch", "diffusers")


def environment(command: str) -> dict[str, Any]:
    """What was run, when, on which device and with which versions."""
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = f"{cpu_name()}, {cores} cores" if on_cpu else f"{len(jax.devices())} x {device.device_kind}"
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "platform": device.platform,
        "device": name,
        "versions": dict(_versions()),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for name in _LIBRARIES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def cpu_name() -> str:
    """As the processor calls itself."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# -- Markdown ----------------------------------------------------------------------------------------------------------


def readable(value: float | int, unit: str) -> str:
    """Three digits and a prefix: ``12.3 ms``, ``1.25 TFLOP/s``."""
    prefixes = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))
    if value == 0 or not math.isfinite(value):
        return f"{value} {unit}"
    if unit == "s" and value >= 1:
        return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"
    factor, prefix = next((pair for pair in prefixes if abs(value) >= pair[0]), prefixes[-1])
    return f"{value / factor:.3g} {prefix}{unit}"


def _seconds(value: float) -> str:
    return readable(value, "s")


def _figures(value: Mapping[str, Any]) -> str:
    return "; ".join(f"{name} {number:.4g}" if isinstance(number, float) else f"{name} {number}"
                     for name, number in value.items())  # fmt: skip


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "case": ("case", str),
    "what": ("what", str),
    "shape": ("shape", str),
    "dtype": ("dtype", str),
    "implementation": ("implementation", str),
    "median_s": ("median", _seconds),
    "p10_s": ("p10", _seconds),
    "p90_s": ("p90", _seconds),
    "repetitions": ("n", str),
    "compile_s": ("compile", lambda value: f"{value:.1f} s"),
    "temporary_MB": ("temporary memory", lambda value: f"{value:.4g} MB"),
    "flops": ("FLOPs", lambda value: readable(value, "FLOP")),
    "bytes": ("bytes", lambda value: readable(value, "B")),
    "bound": ("bound by", str),
    "roofline_share": ("share of measured peak", lambda value: f"{100 * value:.0f} %"),
    "error": ("error", lambda value: f"{value:.1e}"),
    "figures": ("figures", _figures),
    "note": ("note", str),
}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A Markdown table of the columns that any row has."""
    shown = [key for key in _COLUMNS if any(row.get(key) not in (None, "") for row in rows)]
    lines = ["| " + " | ".join(_COLUMNS[key][0] for key in shown) + " |", "|" + "---|" * len(shown)]
    for row in rows:
        cells = ["" if row.get(key) is None else _COLUMNS[key][1](row[key]) for key in shown]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return lines


def markdown(report: Mapping[str, Any]) -> str:
    """The report for people."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    load = report.get("load_average")
    label = " **CPU figures: they say nothing about a GPU.**" if report["platform"] == "cpu" else ""
    lines = [
        f"`{report['command']}`",
        "",
        f"{report['date']}; {report['device']} ({report['platform']}); {versions}"
        + (f"; load average {load:.1f} at the start." if load is not None else ".")
        + label,
    ]
    if peaks := report.get("peaks"):
        products = ", ".join(f"{name} {readable(value, 'FLOP/s')}" for name, value in peaks["flops_per_s"].items())
        lines += [
            "",
            f"Measured peaks: matrix products of {peaks['matmul_size']}²: {products}; copy of "
            f"{readable(peaks['copy_bytes'], 'B')}: {readable(peaks['bytes_per_s'], 'B/s')}.",
        ]
    lines += ["", *table(report["rows"])] if report["rows"] else []
    if notes := report.get("notes"):
        lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines)


# -- files -------------------------------------------------------------------------------------------------------------


def write_report(report: Mapping[str, Any], output: pathlib.Path) -> list[pathlib.Path]:
    """Writes ``output`` with the suffixes .json and .md; each file appears whole or not at all."""
    stem = output.with_suffix("") if output.suffix in (".json", ".md") else output
    texts = {".json": json.dumps(report, indent=2, ensure_ascii=False), ".md": markdown(report)}
    written = []
    for suffix, text in texts.items():
        path = stem.with_name(stem.name + suffix)
        write_whole(path, (text + "\n").encode())
        written.append(path)
    return written


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes under a temporary name and renames; ``kernels`` may not import the library's files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_report(path: pathlib.Path) -> dict[str, Any]:
    """A report that ``write_report`` has written.

    Raises:
        ValueError: there is no such file, or it is something else.
    """
    advice = "name a .json that a benchmark command wrote with --output"
    if not path.is_file():
        raise ValueError(f"{path} is not a file: {advice}")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): {advice}") from error
    good = isinstance(report, dict) and {"device", "versions", "date", "rows"} <= set(report)
    if not good or not isinstance(report["rows"], list):
        raise ValueError(f"{path} is not a benchmark report: {advice}")
    return report


# -- comparison --------------------------------------------------------------------------------------------------------


def compare(first: Mapping[str, Any], second: Mapping[str, Any], *, across_devices: bool = False) -> str:
    """A Markdown table of the time of every row in both reports, and how many times faster the second is.

    Raises:
        ValueError: reports from different devices, unless ``across_devices``; or reports without a common row.
    """
    if first["device"] != second["device"] and not across_devices:
        raise ValueError(
            f"the reports are from different devices, {first['device']!r} and {second['device']!r}: their ratios would "
            "not be of the code; measure both on one, or add --across-devices"
        )
    before, after = ({_identity(row): row for row in report["rows"] if "median_s" in row} for report in (first, second))
    common = [key for key in before if key in after]
    if not common:
        raise ValueError(
            f"the reports have no row in common (same {', '.join(IDENTITY)}): run both with the same options"
        )
    lines = [f"first: {_origin(first)}", f"second: {_origin(second)}", ""]
    lines += [f"| {' | '.join(IDENTITY)} | first | second | first / second | error first | error second |"]
    lines.append("|" + "---|" * (len(IDENTITY) + 5))
    ratios = []
    for key in common:
        one, other = before[key], after[key]
        ratios.append(one["median_s"] / other["median_s"])
        errors = " | ".join(f"{row['error']:.1e}" if row.get("error") is not None else "" for row in (one, other))
        times = f"{_seconds(one['median_s'])} | {_seconds(other['median_s'])} | {ratios[-1]:.2f}"
        lines.append(f"| {' | '.join(key)} | {times} | {errors} |")
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    lines += ["", f"Geometric mean of first / second over {len(ratios)} rows: {mean:.2f}."]
    for name, only in (("first", set(before) - set(after)), ("second", set(after) - set(before))):
        if only:
            lines.append(f"Only in the {name}: {len(only)} rows.")
    return "\n".join(lines)


def _identity(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(name, "")) for name in IDENTITY)


def _origin(report: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{report['date']}, {report['device']}, {versions}"
