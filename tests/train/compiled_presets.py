"""Presets compiled for simulated devices in a process of their own, and what must hold of them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

from tests.train.compiled_text import Exchange

ROOT = Path(__file__).parents[2]
STACK = "transformer_blocks"
LORA_PARAMETERS = "params/lora/transformer_blocks"


def compiled_report(output: Path, *words: str, timeout: int = 500) -> dict:
    """What ``full_size_worker`` writes for a preset."""
    command = [sys.executable, "-m", "tests.train.full_size_worker", str(output), *words]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def check_fetched_layer_by_layer(report: dict) -> None:
    """Every matrix is cut, and no device ever gathers a matrix of the blocks but one layer's, inside the loop."""
    layers = report["layers"]
    exchanged = [Exchange(kind, tuple(shape), loops) for kind, shape, loops in report["exchanges"]]
    gathered = [exchange for exchange in exchanged if exchange.kind == "all-gather"]
    of_blocks, stacked, others = set(), set(), set()
    for path, (shape, part) in report["parameters"].items():
        if math.prod(shape) == math.prod(part):
            continue
        if STACK in path:
            assert shape[0] == layers == part[0], path
            of_blocks.add(math.prod(shape[1:]))
            stacked.add(math.prod(shape))
        else:
            others.add(math.prod(shape))
    in_loop = [exchange for exchange in gathered if exchange.loops]
    outside = [exchange for exchange in gathered if not exchange.loops]
    # A LoRA's matrices lie in the blocks as well.
    lora = [shape for path, (shape, part) in report["trained"].items() if LORA_PARAMETERS in path and shape != part]
    assert of_blocks <= {exchange.size for exchange in in_loop} <= of_blocks | {math.prod(shape[1:]) for shape in lora}
    for exchange in outside:
        assert exchange.size in others, f"gathered outside of the loop: {exchange}"
        assert exchange.size not in stacked
    # one forward and at most two backward (again, and for the gradient) of each
    cut = len(lora) + sum(STACK in path and shape != part for path, (shape, part) in report["parameters"].items())
    assert len(in_loop) <= 3 * cut
    matrices = {path: (shape, part) for path, (shape, part) in report["trained"].items() if path.endswith("kernel")}
    for path, (shape, part) in matrices.items():
        assert math.prod(part) * 8 == math.prod(shape) or "conv_depth" in path, path
