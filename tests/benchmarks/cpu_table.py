"""Every network beside PyTorch and beside its own products on a CPU, in one table.

``python -m tests.benchmarks.cpu_table`` runs the benchmarks of SANA 1.6B at 1024 px, DC-AE's decoder at 512 px, and one
block of full width of SANA-Video and of SANA-WM, each in a process of its own, one after another. Within each of them
the sides are timed in turn. The networks take 9 GB of memory and, on two cores, about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        what: its name.
        module: the benchmark, of this package, with its options.
        ours: the timing of our network there.
        ratio: what it is called in the ratios.
        torch: the timing of PyTorch's.
    """

    what: str
    module: tuple[str, ...]
    ours: str
    ratio: str
    torch: str


ROWS = (
    Row(
        "SANA 1.6B, 1024 px",
        ("sana_cpu", "--full", "--pixels", "1024"),
        "network_1024",
        "network 1024 px",
        "torch_1024",
    ),
    Row("DC-AE decoder, 512 px", ("dc_ae_cpu", "--only", "decode"), "decode", "decode", "decode_torch"),
    Row("SANA-Video block, 5 x 15 x 26 tokens", ("sana_video_cpu",), "block", "block", "torch"),
    Row("SANA-WM block, delta rule, 3 x 22 x 40", ("sana_wm_cpu", "--kind", "delta rule"), "block", "block", "torch"),
    Row("SANA-WM block, softmax, 3 x 22 x 40", ("sana_wm_cpu", "--kind", "softmax"), "block", "block", "torch"),
)


def run(row: Row, repetitions: int, directory: pathlib.Path) -> dict[str, Any]:
    """What the row's benchmark measures, by a process of its own."""
    name, *options = row.module
    file = directory / f"{ROWS.index(row)}.json"
    words = [sys.executable, "-m", f"tests.benchmarks.{name}", *options]
    subprocess.run([*words, "--repetitions", str(repetitions), "--json", str(file)], check=True, stdout=sys.stderr)
    return json.loads(file.read_text())


def figures(row: Row, report: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of ours and of PyTorch's, and ours over PyTorch's and over the products, of shared rounds."""
    timings, ratios = report["timings"], report["ratios"]
    return {
        "ours_s": timings[row.ours]["median_s"],
        "torch_s": timings[row.torch]["median_s"],
        "to_torch": ratios[f"{row.ratio} / torch"],
        "to_products": ratios[f"{row.ratio} / products"],
    }


def markdown(found: Mapping[str, Mapping[str, float]], report: Mapping[str, Any]) -> str:
    """The table, with the geometric mean of how many times faster ours are than PyTorch's."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{report['device']}; {versions}; float32, batch 1",
        "",
        "| network | ours | PyTorch | ours / PyTorch | ours / its products |",
        "|---|---|---|---|---|",
    ]
    for what, row in found.items():
        seconds = f"{row['ours_s']:.3f} s | {row['torch_s']:.3f} s"
        lines.append(f"| {what} | {seconds} | {row['to_torch']:.2f} | {row['to_products']:.2f} |")
    mean = math.exp(-sum(math.log(row["to_torch"]) for row in found.values()) / len(found))
    return "\n".join([*lines, "", f"Geometric mean: {mean:.2f} times as fast as PyTorch."])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cpu_table", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5, help="rounds")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures as well")
    options = parser.parse_args(arguments)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for row in ROWS:
            report = run(row, options.repetitions, pathlib.Path(directory))
            found[row.what] = figures(row, report)
    print(markdown(found, report))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
