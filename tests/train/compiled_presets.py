"""Presets compiled for simulated devices in a process of their own, and what must hold of them."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

from tests.train.compiled_text import Exchange

ROOT = Path(__file__).parents[2]
STACKED = re.compile(r"(^|/)(transformer|controlnet|delta|softmax)_blocks/")
LORA_PARAMETERS = "params/lora/"
# Of a few values per channel.
UNCUT = re.compile("conv_depth|conv_[qkv]|/logvar/")


def compiled_report(output: Path, *words: str, timeout: int = 1500) -> dict:
    """What ``full_size_worker`` writes for a preset."""
    command = [sys.executable, "-m", "tests.train.full_size_worker", str(output), *words]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def check_fetched_layer_by_layer(report: dict, fetches: int | None = 3) -> None:
    """Every matrix is cut, and no device ever gathers a matrix of the blocks but one layer's, inside a loop.

    ``fetches`` is how often each may be: once forward and at most twice backward (again, and for the gradient); None
    for objectives that run networks several times.
    """
    trained = {path: pair for path, pair in report["trained"].items() if path.startswith("params/")}
    cut = {path: shape for path, (shape, part) in (trained | report["parameters"]).items() if shape != part}
    parts = trained | report["parameters"]
    stacked = {path: shape for path, shape in cut.items() if STACKED.search(path)}
    for path, shape in stacked.items():
        assert shape[0] == parts[path][1][0], f"{path} is cut by its layers"
    whole_stacks = {math.prod(shape) for shape in stacked.values()}
    of_lora = {math.prod(shape[1:]) for path, shape in stacked.items() if LORA_PARAMETERS in path}
    of_blocks = {math.prod(shape[1:]) for path, shape in stacked.items() if LORA_PARAMETERS not in path}
    others = {math.prod(shape) for path, shape in cut.items() if path not in stacked}

    exchanged = [Exchange(kind, tuple(shape), loops) for kind, shape, loops in report["exchanges"]]
    gathered = [exchange for exchange in exchanged if exchange.kind == "all-gather"]
    in_loop = [exchange for exchange in gathered if exchange.loops]
    assert of_blocks <= {exchange.size for exchange in in_loop}, "never fetched"
    assert fetches is None or len(in_loop) <= fetches * len(stacked), "fetched too often"
    largest_whole = max(math.prod(shape) for shape, part in parts.values() if shape == part)
    for exchange in in_loop:
        small = exchange.size <= largest_whole
        assert small or exchange.size in of_blocks | of_lora, f"more than a layer: {exchange}"
    for exchange in (exchange for exchange in gathered if not exchange.loops):
        of_a_block = exchange.size in (of_blocks | of_lora | whole_stacks) - others
        assert not of_a_block, f"gathered outside of the loop: {exchange}"
    # Beside parameters and their gradients devices are all given only what they hold anyway, nothing of the batch.
    whole = others | of_blocks | of_lora | whole_stacks
    # what one device of a row holds of a gradient, which is summed over the rows
    own = {math.prod(parts[path][1]) for path in cut}
    for exchange in (exchange for exchange in exchanged if exchange.kind in ("all-gather", "all-reduce")):
        known = exchange.size in whole | own or exchange.size <= largest_whole
        assert exchange.loops or known, f"neither a parameter nor small: {exchange}"
    for path, (shape, part) in report["trained"].items():  # the optimizer's too
        if path.endswith("kernel"):
            assert math.prod(part) * 8 == math.prod(shape) or UNCUT.search(path), f"{path} of {shape} is whole"
