"""``python -m sana_jax.quantization``: what each format costs in error and saves in memory."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import jax

from sana_jax.command_line import parse
from sana_jax.errors import run_command_line
from sana_jax.quantization.formats import FORMATS
from sana_jax.quantization.tables import block_errors, markdown, network_bytes


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """Prints what quantization formats cost and save, as Markdown.

    Relative errors of blocks at random parameters, and bytes of networks.
    """

    full_width: bool = True
    """Whether blocks of the published widths are measured beside tiny ones: a minute on a CPU."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; returns the exit status."""
    config = parse(TableConfig, sys.argv[1:] if argv is None else argv, prog="python -m sana_jax.quantization")
    device = jax.local_devices()[0]
    print(f"relative error of a block's output, random parameters, float32 otherwise, on {device.device_kind}\n")
    by_block: dict[str, list[str]] = {}
    for row in block_errors(config.full_width):
        by_block.setdefault(row.block, []).append(f"{row.relative_error:.2e}")
    print(markdown([["block", *FORMATS], *([name, *errors] for name, errors in by_block.items())]))
    print("\nweights in GB (10^9 bytes); layers that are left out by default stay in bfloat16\n")
    rows = [["network", "parameters", "quantised share", "bfloat16", *FORMATS]]
    for network in network_bytes():
        sizes = [f"{size / 1e9:.2f}" for size in network.bytes.values()]
        rows.append([network.network, f"{network.parameters:,}", f"{network.quantised_share:.1%}", *sizes])
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    run_command_line(main)
