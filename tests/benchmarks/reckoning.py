"""What a program compiled for a GPU would take there, reckoned from its text: bytes, FLOPs and kernels, none of it run.

Every kernel takes as long as its bytes or its products do, whichever is more, and a launch. Bytes are operands read
once and results written once; of an operand that is only cut, what is cut out of it. Loops count as often as they run.
It knows nothing of caches, of how well a kernel fills the device, nor what a Pallas kernel does between its operands
and results; it serves to find what moves far more than it needs to, and to compare forms that differ by a lot.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply)=%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_NAMES = re.compile(r'op_name="([^"]*)"')
_BYTES = {"pred": 1, "bf16": 2, "f16": 2}
_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "partition-id", "after-all")
_CUT = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What a device does per second when it does it well; by default an H100 SXM.

    Attributes:
        bytes: of memory, read or written: 84 % of 3.35e12.
        products: FLOPs of matrix products and convolutions of halves: two thirds of 989e12.
        wide_products: of float32, as TF32 or in parts.
        narrow_products: of 8 bits: two thirds of 1979e12.
        attention: of cuDNN's attention.
        launch: seconds that starting a kernel takes.
    """

    bytes: float = 2.8e12
    products: float = 650e12
    wide_products: float = 200e12
    narrow_products: float = 1300e12
    attention: float = 350e12
    launch: float = 2e-6

    def of(self, kind: str, operands: str) -> float:
        """FLOPs per second of a kind of kernel on operands of a dtype."""
        if kind == "attention":
            return self.attention
        width = shape_bytes(f"{operands}[]")
        return {1: self.narrow_products, 4: self.wide_products}.get(width, self.products)


class Kernel(NamedTuple):
    """An instruction that the device runs."""

    name: str
    kind: str
    """``product``, ``convolution``, ``attention``, ``custom`` for other libraries' and Pallas', or ``elementwise``."""
    shape: str
    """Of its result."""
    source: str
    """Where it comes from, in the traced program."""
    times: int
    """How often it runs."""
    bytes: float
    """Of one run."""
    flops: float
    """Of the products of one run."""
    seconds: float
    """Of all runs."""


class Reckoning(NamedTuple):
    """A program's kernels."""

    kernels: tuple[Kernel, ...]

    @property
    def seconds(self) -> float:
        """Of one run of the program."""
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def bytes(self) -> float:
        """Read and written."""
        return sum(kernel.times * kernel.bytes for kernel in self.kernels)

    @property
    def flops(self) -> float:
        """Of products."""
        return sum(kernel.times * kernel.flops for kernel in self.kernels)

    @property
    def launches(self) -> int:
        """Kernels that are started."""
        return sum(kernel.times for kernel in self.kernels)


class _Instruction(NamedTuple):
    root: bool
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    line: str


def reckon(text: str, speeds: Speeds = Speeds()) -> Reckoning:
    """Reads ``Compiled.as_text()`` of a program for a GPU; a loop whose trips the compiler does not say counts once."""
    program = _Program(text)
    return Reckoning(tuple(program.kernels(program.entry, 1, speeds)))


class _Program:
    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.entry, own = "", {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                own = self.computations.setdefault(header[1], {})
                self.entry = header[1] if line.startswith("ENTRY") else self.entry
            elif found := _INSTRUCTION.match(line):
                root, name, shape, op, rest = found.groups()
                operands = tuple(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
                own[name] = _Instruction(bool(root), name, shape, op, operands, line)

    def kernels(self, computation: str, times: int, speeds: Speeds) -> Iterator[Kernel]:
        for own in self.computations[computation].values():
            if own.op in _FREE:
                continue
            if own.op == "while":
                trips = _TRIPS.search(own.line)
                body = re.search(r"body=%([\w.\-]+)", own.line)[1]
                yield from self.kernels(body, times * (int(trips[1]) if trips else 1), speeds)
            elif own.op == "conditional":  # the dearest branch
                branches = [list(self.kernels(name, times, speeds)) for name in _branches(own.line)]
                yield from max(branches, key=lambda branch: sum(kernel.seconds for kernel in branch))
            elif own.op in ("call", "async-start"):
                yield from self.kernels(_CALLED.search(own.line)[1], times, speeds)
            elif not own.op.endswith("-done"):  # what was started is ready
                yield self._kernel(computation, own, times, speeds)

    def _kernel(self, computation: str, own: _Instruction, times: int, speeds: Speeds) -> Kernel:
        kind, flops, dtype = self._products(computation, own)
        moved = self._bytes(computation, own)
        seconds = times * (max(moved / speeds.bytes, flops / speeds.of(kind, dtype)) + speeds.launch)
        source = _NAMES.search(own.line)
        shape = re.sub(r"\{[^}]*\}", "", own.shape)
        return Kernel(own.name, kind, shape, source[1] if source else "", times, moved, flops, seconds)

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def _bytes(self, computation: str, own: _Instruction) -> float:
        scope = self.computations[computation]
        called = self.computations.get(_CALLED.search(own.line)[1], {}) if _CALLED.search(own.line) else {}
        results = [one for one in called.values() if one.root]
        updates = {one.operands[0]: one for one in called.values() if one.op == "dynamic-update-slice"}
        written = shape_bytes(own.shape)
        if own.op == "fusion-start":  # its shape names the operands too
            written = sum(shape_bytes(one.shape) for one in results)
        if own.op == "custom-call" and own.shape.startswith("(") and re.search(r"[su]8\[\d+\]\S*\)$", own.shape):
            written -= shape_bytes(_split(own.shape)[-1])  # the memory that it works in
        if updates and all(one.op in ("dynamic-update-slice", "tuple") for one in results):
            written = sum(shape_bytes(called[one.operands[1]].shape) for one in updates.values())
        read = 0.0
        parameters = {int(re.search(r"parameter\((\d+)\)", one.line)[1]): one for one in called.values() if
                      one.op == "parameter"}  # fmt: skip
        for number, name in enumerate(dict.fromkeys(own.operands)):
            if name not in scope:
                continue
            whole, inner = shape_bytes(scope[name].shape), parameters.get(number)
            read += whole if inner is None else self._read(called, inner.name, whole, updates)
        return read + written

    def _read(self, called: dict[str, _Instruction], name: str, whole: int, updates: dict) -> float:
        """What of a fusion's operand is read: all of it, or what is cut out; nothing of what is written into."""
        if name in updates:
            return 0.0
        users = [one for one in called.values() if name in one.operands]
        if users and all(one.op in ("bitcast", *_CUT) for one in users):
            cut = 0.0
            for one in users:
                cut += shape_bytes(one.shape) if one.op in _CUT else self._read(called, one.name, whole, updates)
            return min(cut, whole)
        return whole

    # -- products ------------------------------------------------------------------------------------------------------

    def _products(self, computation: str, own: _Instruction) -> tuple[str, float, str]:
        """The kind of an instruction, the FLOPs of its products, and the dtype of what they multiply."""
        scope = self.computations[computation]
        target = re.search(r'custom_call_target="([^"]*)"', own.line)
        if target is not None:
            operands = [scope[name].shape for name in own.operands if name in scope]
            dtype = operands[0].partition("[")[0].strip("(") if operands else "f32"
            if "cublas" in target[1]:
                inner = re.search(r'"lhs_contracting_dimensions":\["(\d+)"', own.line)
                size = _sizes(operands[0])[int(inner[1])]
                return "product", 2.0 * size * math.prod(_sizes(_split(own.shape)[0])), dtype
            if "$conv" in target[1]:
                return "convolution", self._convolution(own.line, own.shape, operands), dtype
            if "$fmha" in target[1]:
                return "attention", _attention(operands, "Backward" in target[1]), dtype
            return "custom", 0.0, dtype
        if (called := _CALLED.search(own.line)) is None:
            return "elementwise", 0.0, "f32"
        flops, dtype = self._inner_products(called[1])
        return ("product" if flops else "elementwise"), flops, dtype

    @functools.cache  # noqa: B019 (a program is read once and dropped)
    def _inner_products(self, computation: str) -> tuple[float, str]:
        scope, flops, dtype = self.computations.get(computation, {}), 0.0, "f32"
        for own in scope.values():
            if own.op == "dot":
                contracted = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", own.line)[1]
                left = scope[own.operands[0]].shape
                inner = math.prod(_sizes(left)[int(number)] for number in contracted.split(","))
                flops, dtype = flops + 2.0 * inner * math.prod(_sizes(own.shape)), left.partition("[")[0]
            elif called := _CALLED.search(own.line):
                more, of = self._inner_products(called[1])
                flops, dtype = flops + more, of if more else dtype
        return flops, dtype

    @staticmethod
    def _convolution(line: str, shape: str, operands: list[str]) -> float:
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line)
        kernel, result = _sizes(operands[1]), _sizes(_split(shape)[0])
        if "BackwardFilter" in line:
            kernel, result = result, _sizes(operands[1])
        return 2.0 * math.prod(result) * math.prod(kernel) / kernel[labels[2].index("o")]


def _attention(operands: list[str], backward: bool) -> float:
    """cuDNN's: of the products of (B, M, h, d) queries with (B, N, h, d) keys, five in place of two backward."""
    batch, queries, heads, size = _sizes(operands[0])
    pairs = batch * heads * queries * _sizes(operands[1])[1]
    return (10.0 if backward else 4.0) * pairs * size


def _branches(line: str) -> list[str]:
    if several := re.search(r"branch_computations=\{([^}]*)\}", line):
        return re.findall(r"%([\w.\-]+)", several[1])
    return re.findall(r"(?:true|false)_computation=%([\w.\-]+)", line)


def _split(shape: str) -> list[str]:
    return [f"{dtype}[{sizes}]" for dtype, sizes in _ARRAY.findall(shape)]


def _sizes(shape: str) -> tuple[int, ...]:
    return tuple(int(size) for size in _ARRAY.search(shape)[2].split(",") if size)


def shape_bytes(shape: str) -> int:
    """Bytes of the arrays of a shape such as ``(bf16[2,1024], f32[])``."""
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        width = _BYTES.get(dtype) or max(1, int(re.search(r"\d+", dtype)[0]) // 8)
        total += width * math.prod(int(size) for size in sizes.split(",") if size)
    return total
