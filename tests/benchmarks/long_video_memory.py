"""Memory and time of long videos: a tiny LongSANA through the whole pipeline to an mp4, for more and more blocks.

``python -m tests.benchmarks.long_video_memory --plot long_video_memory.png --json long_video_memory.json``

Every length runs in the same process, so that a leak of an earlier one would be seen as well. Beside it: what the state
of SANA-Video 2B takes at 480p, on paper, and what a cache of keys and values would.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import pathlib
import statistics
import tempfile
from collections.abc import Sequence

import jax

from sana_jax.autoencoders.base import pixel_frames
from sana_jax.compilation import readable_bytes
from sana_jax.models.sana_video import SanaVideoConfig, kv_cache_bytes, state_bytes
from sana_jax.pipelines.long_video import LongSanaVideoPipeline
from tests.benchmarks.sana_cpu import environment
from tests.pipelines.tiny_long_model import BLOCK, PROMPT, tiny_pipeline

FEWEST, FACTORS = 3, (1, 2, 8, 32)
SETTLED = 2  # blocks after which memory must not grow
GRID_480P, FRAMES_PER_MINUTE = (30, 52), 241


@dataclasses.dataclass(frozen=True)
class Row:
    """One video.

    Attributes:
        blocks: their number.
        settled_bytes: arrays on the device after block 2.
        peak_bytes: the most of them after any later block.
        resident_bytes: of the process, after block 2 and after the last.
        program_bytes: what the compiled block holds, by the compiler's own analysis.
        block_seconds: of every block after the second.
        held: arrays on the device after every block.
    """

    blocks: int
    settled_bytes: int
    peak_bytes: int
    resident_bytes: tuple[int, int]
    program_bytes: int
    block_seconds: tuple[float, ...]
    held: tuple[int, ...]

    @property
    def growth(self) -> float:
        """Of the arrays after block 2, as a share."""
        return self.peak_bytes / self.settled_bytes - 1

    @property
    def seconds(self) -> float:
        """Median of a block."""
        return statistics.median(self.block_seconds)


def resident_bytes() -> int:
    """Of this process."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(pipeline: LongSanaVideoPipeline, blocks: int, folder: pathlib.Path) -> Row:
    """Makes a video of so many blocks and notes what is held after each."""
    held: list[int] = []
    resident: list[int] = []

    def note(pipe, block, values):
        del values
        held.append(sum(array.nbytes for array in jax.live_arrays()))
        resident.append(resident_bytes())

    gc.collect()
    result = pipeline(
        PROMPT,
        frames=pixel_frames(blocks * BLOCK, pipeline.autoencoder.temporal_factor),
        output_path=folder / f"{blocks}.mp4",
        callback_on_block_end=note,
        say=lambda line: None,
    )
    assert len(held) == blocks
    return Row(
        blocks,
        held[SETTLED - 1],
        max(held[SETTLED:]),
        (resident[SETTLED - 1], resident[-1]),
        result.device_bytes,
        result.block_seconds[SETTLED:],
        tuple(held),
    )


def measure_all(factors: Sequence[int] = FACTORS) -> list[Row]:
    """Videos of 3 blocks and of 2, 8 and 32 times as many."""
    pipeline = tiny_pipeline(wan=True)
    with tempfile.TemporaryDirectory() as folder:
        measure(pipeline, FEWEST + 1, pathlib.Path(folder))  # compiles, and fills what is filled once
        return [measure(pipeline, FEWEST * factor, pathlib.Path(folder)) for factor in factors]


def on_paper() -> list[str]:
    """The state of SANA-Video 2B at 480x832 in bfloat16 beside a cache of keys and values."""
    config = SanaVideoConfig.sana_video_2b_480p()
    lines = []
    for window in (None, 1, 4):
        own = state_bytes(config, GRID_480P, num_cached_blocks=window, dtype="bfloat16")
        seen = "all earlier blocks" if window is None else f"{window} earlier block{'s' * (window > 1)}"
        lines.append(
            f"SANA-Video 2B, 480x832, {seen} in sight: {own.sums:,} bytes of sums and {own.last_frame:,} of the last "
            f"frame, {own.per_layer:,} per layer, {own.total:,} in all {config.num_layers} layers, for any length"
        )
    per_layer = state_bytes(config, GRID_480P, dtype="bfloat16").per_layer
    for frames, name in ((11, "the first block"), (FRAMES_PER_MINUTE, "a minute"), (1024, "4 minutes 16 seconds")):
        cache = kv_cache_bytes(config, GRID_480P, frames)
        lines.append(
            f"keys and values of {name} ({frames} latent frames): {cache:,} bytes per layer, "
            f"{readable_bytes(cache * config.num_layers)} in all, {cache / per_layer:,.0f} times the state"
        )
    return lines


def plot(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Arrays held and seconds, block by block, for every length."""
    from PIL import Image, ImageDraw, ImageFont

    width, height, left, gap = 900, 620, 90, 50
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    colours = ("#d62728", "#ff7f0e", "#2ca02c", "#1f77b4")
    most = max(row.blocks for row in rows)
    panels = [
        ("arrays on the device after each block, kB", [[n / 1e3 for n in row.held] for row in rows]),
        ("milliseconds of each block after the second", [[1e3 * s for s in row.block_seconds] for row in rows]),
    ]
    for number, (title, series) in enumerate(panels):
        top, bottom = 40 + number * height // 2, (number + 1) * height // 2 - gap
        ceiling = 1.5 * max(sorted(values)[int(0.95 * (len(values) - 1))] for values in series)
        draw.text((left, top - 28), title, "black", font)
        draw.line([(left, top), (left, bottom), (width - 20, bottom)], "black")
        for part in (0, 0.5, 1):
            y = bottom - part * (bottom - top)
            draw.line([(left - 4, y), (left, y)], "black")
            draw.text((left - 10, y), f"{part * ceiling:.3g}", "black", font, anchor="rm")
            x = left + part * (width - 20 - left)
            draw.text((x, bottom + 6), f"{part * most:.0f}", "black", font, anchor="mt")
        draw.text((width // 2, bottom + 24), "block", "black", font, anchor="mt")
        for row, values, colour in reversed(list(zip(rows, series, colours))):
            first = row.blocks - len(values) + 1
            points = [
                (
                    left + (first + index) / most * (width - 20 - left),
                    bottom - min(value / ceiling, 1) * (bottom - top),
                )
                for index, value in enumerate(values)
            ]
            draw.line(points, colour, 2)
            for x, y in points if len(points) < 30 else ():
                draw.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
        for index, (row, colour) in enumerate(zip(rows, colours)):
            draw.text((width - 150, top + 18 * index), f"{row.blocks} blocks", colour, font)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", help="a .png of memory and time")
    parser.add_argument("--json", help="the figures")
    arguments = parser.parse_args()
    rows = measure_all()
    print(environment())
    print(
        "| blocks | arrays after block 2 | peak after it | growth | program | process after 2 -> last | s per block |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        resident = " -> ".join(readable_bytes(count) for count in row.resident_bytes)
        print(
            f"| {row.blocks} | {row.settled_bytes:,} | {row.peak_bytes:,} | {100 * row.growth:.2f} % | "
            f"{row.program_bytes:,} | {resident} | {row.seconds:.4f} |"
        )
    for line in on_paper():
        print(line)
    if arguments.plot:
        plot(rows, arguments.plot)
    if arguments.json:
        figures = {"environment": environment(), "rows": [dataclasses.asdict(row) for row in rows], "paper": on_paper()}
        pathlib.Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
