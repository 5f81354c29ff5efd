"""Kill -9 in every stage of a streamed, refined world, behind a file or while it is written: the same frames."""

from __future__ import annotations

import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from sana_jax.videos import read_video

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1800)]
ROOT = pathlib.Path(__file__).parents[2]
# chunk and stage: see tests.pipelines.tiny_world
KILLS = [(0, "latents"), (1, "latents"), (0, "refined"), (0, "frames"), (0, "frames"), (3, "latents"), (2, "refined")]


def stream(folder: pathlib.Path, chunk: int = 0, stage: str = "none") -> int:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.pipelines.tiny_world", str(folder), str(chunk), stage]
    return subprocess.run(command, cwd=ROOT, check=False, timeout=600).returncode


def test_killed_in_every_stage(tmp_path):
    assert stream(tmp_path / "straight") == 0
    straight = read_video(tmp_path / "straight" / "out.mp4").frames
    folder = tmp_path / "killed"
    for chunk, stage in KILLS:
        assert stream(folder, chunk, stage) == -signal.SIGKILL, (chunk, stage)
        if (folder / "out.mp4").is_file():
            # what plays of it is the film's beginning; the last frame may be cut
            there = read_video(folder / "out.mp4").frames[:-1]
            assert np.array_equal(there, straight[: len(there)]) or not len(there)
    assert stream(folder) == 0
    np.testing.assert_array_equal(read_video(folder / "out.mp4").frames, straight)
    assert [entry.name for entry in folder.iterdir()] == ["out.mp4"]
