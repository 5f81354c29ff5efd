"""Videos of 2, 8 and 32 times as many blocks take no more memory, and no longer for a block; twelve kills in a row."""

from __future__ import annotations

import itertools
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sana_jax.videos import read_video
from tests.benchmarks import long_video_memory
from tests.pipelines.tiny_long_model import as_longsana

KILLS = 12
ROOT = pathlib.Path(__file__).parents[2]

pytestmark = [pytest.mark.prove, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def rows():
    found = long_video_memory.measure_all()
    for row in found:
        print(
            f"{row.blocks} blocks: {row.peak_bytes} bytes, {row.resident_bytes} resident, {row.seconds:.4f} s a block"
        )
    return found


def test_memory_is_constant(rows):
    assert [row.blocks for row in rows] == [3, 6, 24, 96]
    assert len({row.program_bytes for row in rows}) == 1
    assert all(abs(row.growth) <= 0.01 for row in rows), rows
    peaks = [row.peak_bytes for row in rows]
    assert max(peaks) <= 1.01 * min(peaks), peaks
    after_two, at_the_end = rows[-1].resident_bytes
    assert at_the_end <= 1.01 * after_two, "the process has grown"


def test_time_of_a_block_is_flat(rows):
    first, last = rows[-1].block_seconds[:24], rows[-1].block_seconds[-24:]
    # the faster half of each: other work on the machine comes and goes
    middle = [float(np.median(sorted(part)[:12])) for part in (first, last)]
    assert middle[1] <= 1.25 * middle[0], middle


def test_kills_in_a_row(tmp_path):
    """Kill -9 at random moments: start-up, compiling, blocks, writing; what comes out is as without them."""
    from tests.parity import video_pipeline_oracle

    video_pipeline_oracle.save("video", tmp_path / "base")
    model = as_longsana(tmp_path / "base", tmp_path / "model")
    options = ("--max-sequence-length", "8", "--instruction", "none", "--enlarge", "1", "--binning", "off")
    options += ("--height", "64", "--width", "96", "--frames", "237", "--prompt", "0s: a red panda", "7s: a tram")

    def command(path, *more):
        words = ["--model", str(model), "--output", str(path), *options, *more]
        return [sys.executable, "-u", "-m", "sana_jax.generate", *words]

    def state(path):
        return path.with_name(f"{path.name}.resume") / "state.npz"

    straight, path = tmp_path / "straight.mp4", tmp_path / "killed.mp4"
    subprocess.run(command(straight), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    draw, done, kills = random.Random(0), [], 0
    for number in itertools.count():
        resume = ("--resume",) if state(path).is_file() else ()
        with subprocess.Popen(command(path, *resume), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            wanted, seen = draw.choice((0, 1, 1, 2)), 0
            for line in process.stdout if number < KILLS else ():
                if found := re.match(r"block (\d+) of", line):
                    done.append(int(found[1]))
                    seen += 1
                if seen > wanted or (number < 2 and "compiling" in line):
                    time.sleep(draw.uniform(0, 0.05))
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                    break
            process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
    print(f"{kills} kills, the last blocks seen before them: {done}")
    assert kills >= KILLS // 2
    np.testing.assert_array_equal(read_video(path).frames, read_video(straight).frames)
    assert sorted(entry.name for entry in tmp_path.glob("*.mp4*")) == ["killed.mp4", "straight.mp4"]
