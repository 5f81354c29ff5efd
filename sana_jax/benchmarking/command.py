"""What the benchmark commands of the library and of training share: options, the loop over cases, files."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

from kernels.benchmarking.report import compare, environment, markdown, read_report, write_report
from kernels.benchmarking.roofline import measure_peaks
from kernels.selection import AUTO, Preference
from sana_jax.benchmarking.other_side import check_other_side
from sana_jax.benchmarking.sides import Setting
from sana_jax.devices import choose_device, using_kernels
from sana_jax.errors import UserError
from sana_jax.host_memory import keep_freed_memory

_PEAK_SIZES = {"tiny": (128, 1 << 16), "cpu": (1024, 1 << 28), "gpu": (8192, 1 << 30)}


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Options of every benchmark command; its cases are added by the command."""

    cases: tuple[str, ...] = ()
    """Which cases; without it all that are usual on this device. An unknown name lists them."""
    size: Literal["auto", "tiny", "full"] = "auto"
    """full: the published shapes; tiny: small ones of the same kinds; auto: full on a GPU, tiny on a CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and computation; auto: bfloat16 on a GPU, float32 on a CPU."""
    repetitions: int = 3
    """Runs of each case after a first one that compiles."""
    against: Literal["none", "diffusers"] = "none"
    """diffusers: also run PyTorch's side, where it is installed, in turn with ours; on a GPU also by torch.compile."""
    torch_threads: int | None = None
    """Threads of PyTorch on a CPU; None: all cores."""
    seconds: float | None = None
    """Begin no further case after so many seconds; those left out are named in the table."""
    output: pathlib.Path = pathlib.Path("runs/benchmarks/report")
    """Where the report goes, as .json and .md."""
    compare: tuple[pathlib.Path, pathlib.Path] | None = None
    """Only compare two reports: two .json files."""
    across_devices: bool = False
    """With --compare: allow reports from different devices."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """What to run on."""
    kernels: Preference = "auto"
    """What runs operations that have several forms: the one measured to be faster (auto), XLA's own (xla), or kernels
    for NVIDIA GPUs wherever there are such."""

    def __post_init__(self) -> None:
        if self.repetitions < 1:
            raise ValueError(f"repetitions {self.repetitions} is not allowed; choose 1 or more: 3 is usual")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds {self.seconds} is not allowed; choose more than 0, or leave it out")
        if self.across_devices and self.compare is None:
            raise ValueError("across_devices would not be used without --compare; leave it out")
        if self.torch_threads is not None and (self.against == "none" or self.torch_threads < 1):
            raise ValueError(
                f"torch_threads {self.torch_threads} is for --against diffusers, 1 or more; add that, or leave it out"
            )
        if self.compare is not None:
            self._check_compare()

    def _check_compare(self) -> None:
        """Raises ``ValueError`` for options that comparing two reports, which measures nothing, would not read."""
        unused = [
            f"--{field.name.replace('_', '-')}"
            for field in dataclasses.fields(self)
            if field.name not in ("compare", "across_devices") and getattr(self, field.name) != field.default
        ]
        if unused:
            raise ValueError(
                f"{', '.join(unused)} would not be used with --compare, which measures nothing; leave it out"
            )


Case = Callable[[Setting], list[dict[str, Any]]]


def run(
    config: BenchmarkConfig,
    program: str,
    argv: Sequence[str],
    cases: Mapping[str, Case],
    usual: Mapping[str, Sequence[str]],
    finish: Callable[[dict[str, Any], pathlib.Path], list[pathlib.Path]] = lambda report, output: [],
    sized: bool = True,
    **setting: Any,
) -> int:
    """Measures, prints and writes the report, or compares two; returns the exit status.

    Args:
        config: the options.
        program: what the user types.
        argv: the words behind it.
        cases: by name.
        usual: names of those that run where none are named, by ``cpu`` and ``gpu``.
        finish: writes further files of a report beside it and names them.
        sized: whether ``--size`` acts on the cases.
        setting: further fields of ``Setting``.
    """
    if config.compare is not None:
        try:
            first, second = map(read_report, config.compare)
            print(compare(first, second, across_devices=config.across_devices))
        except ValueError as error:
            raise UserError(str(error)) from error
        return 0
    if unknown := [name for name in config.cases if name not in cases]:
        raise UserError(f"--cases {' '.join(unknown)} is not known; choose from {', '.join(cases)}")
    if config.against == "diffusers":
        check_other_side()
        # before JAX takes most of a GPU's memory for itself alone
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    keep_freed_memory(config.device)  # as the commands do that are measured
    device = choose_device(config.device)
    platform = "cpu" if device.platform == "cpu" else "gpu"
    size = ("tiny" if platform == "cpu" else "full") if config.size == "auto" else config.size
    dtype = ("float32" if platform == "cpu" else "bfloat16") if config.dtype == "auto" else config.dtype
    started = time.monotonic()
    report = environment(" ".join((program, *argv)))
    report["peaks"] = measure_peaks(*_PEAK_SIZES["tiny" if sized and size == "tiny" else platform])
    shared = Setting(
        size, dtype, config.repetitions, against=config.against == "diffusers",
        torch_threads=config.torch_threads, peaks=report["peaks"], **setting,
    )  # fmt: skip
    with using_kernels(config.kernels, device):
        report["rows"] = _rows(config, {name: cases[name] for name in config.cases or usual[platform]}, shared, started)
    report["notes"] = [
        f"Random weights{f', {size} sizes' if sized else ''}, batch as stated; medians of {config.repetitions} runs "
        "after a first one; compiling is not in them.",
        "FLOPs are those of matrix products and convolutions in the traced program; the share is of this device's peak "
        "as measured above, with weights and inputs read once.",
        *([] if config.kernels == AUTO else [f"Operations of several forms run as --kernels {config.kernels} asks."]),
    ]
    written = write_report(report, config.output)
    written += finish(report, config.output)
    print("\n" + markdown(report))
    print("\nwritten: " + ", ".join(map(str, written)))
    return int(any(row.get("failed") for row in report["rows"]))


def _rows(config: BenchmarkConfig, cases: Mapping[str, Case], setting: Setting, started: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, case in cases.items():
        passed = time.monotonic() - started
        if config.seconds is not None and passed > config.seconds:
            rows.append({"case": name, "note": f"left out: {passed:.0f} of --seconds {config.seconds:g} had passed"})
            continue
        setting.say(f"-- {name}, after {passed:.0f} s")
        try:
            rows += case(setting)
        except jax.errors.JaxRuntimeError as error:
            # out of memory above all; the other cases are still worth their time, and the exit status says so
            lines = str(error).splitlines() or ["no message"]
            rows.append({"case": name, "failed": True, "note": f"failed: {lines[0][:300]}"})
    return rows
