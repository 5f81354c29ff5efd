"""Reads the text of compiled programs: which arrays devices exchange, and inside which loops."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")


class Exchange(NamedTuple):
    """An array that devices exchange."""

    kind: str
    shape: tuple[int, ...]
    loops: int
    """How many loops it is in."""

    @property
    def size(self) -> int:
        """Its values, the devices' parts together."""
        return math.prod(self.shape)


def exchanges(program: str) -> list[Exchange]:
    """Every array that devices exchange in a compiled program."""
    bodies: dict[str, list[str]] = {}
    entry, own = None, []
    for line in program.splitlines():
        if header := _HEADER.match(line):
            own = bodies.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        else:
            own.append(line)
    depth = {entry: 0}
    todo = [entry]
    while todo:
        name = todo.pop()
        for line in bodies.get(name, ()):
            for single, several in _CALLED.findall(line):
                for called in [single] if single else re.findall(r"[\w.\-]+", several):
                    inside = depth[name] + (" while(" in line)
                    if inside > depth.get(called, -1):
                        depth[called] = inside
                        todo.append(called)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            if match := re.search(rf"= (\(?.*?\)?) ({_KINDS})(?:-start)?\(", line):
                for shape in re.findall(r"\w+\[([\d,]*)\]", match[1]):
                    sizes = tuple(int(size) for size in shape.split(",") if size)
                    found.append(Exchange(match[2], sizes, depth.get(name, 0)))
    return found
