"""A streamed, refined world of forty chunks: the last ten take as long as the early ones, in as much memory."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.pipelines.tiny_refiner import tiny_refiner
from tests.pipelines.tiny_world import REFINER, arguments, tiny_world

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1800)]
CHUNKS = 40


def test_time_and_memory_of_a_chunk_are_flat(tmp_path):
    pipe, refiner, live = tiny_world(), tiny_refiner(), []

    def on_chunk(pipeline, chunk, shown):
        live.append(sum(array.nbytes for array in jax.live_arrays()))

    options = {"refine": refiner, "refiner_options": REFINER, "say": lambda line: None}
    pipe(**arguments(4), **options, output_path=tmp_path / "warm.mp4")
    out = pipe(**arguments(2 * CHUNKS), **options, output_path=tmp_path / "out.mp4", callback_on_block_end=on_chunk)
    seconds = [chunk.seconds for chunk in out.chunks]
    early, late = float(np.median(seconds[5:15])), float(np.median(seconds[-10:]))
    print(f"a chunk takes {early:.4f} s (5 to 15), {late:.4f} s (the last ten); {live[10]} bytes on the device")
    assert len(seconds) == CHUNKS
    assert abs(late - early) <= 0.15 * early, seconds
    assert len({tuple(chunk.state_bytes.items()) for chunk in out.chunks[1:-1]}) == 1
    assert len(set(live[5:-2])) == 1, live
