"""Kill -9 at each of ten blocks of the refiner, behind a block's file or while it is written: the same latents."""

from __future__ import annotations

import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.pipelines.tiny_refiner import BLOCKS

pytestmark = pytest.mark.prove
ROOT = pathlib.Path(__file__).parents[2]


def refine(folder: pathlib.Path, *kill: str) -> int:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.pipelines.tiny_refiner", str(folder), *kill]
    return subprocess.run(command, cwd=ROOT, check=False, timeout=600).returncode


def test_killed_at_each_block(tmp_path):
    assert refine(tmp_path / "straight", "none") == 0
    straight = np.load(tmp_path / "straight" / "latents.npy")
    folder = tmp_path / "killed"
    for block in range(BLOCKS):
        mid_write = block % 2 == 0
        assert refine(folder, str(block), *(["mid-write"] if mid_write else [])) == -signal.SIGKILL
        whole = len(list((folder / "blocks").glob("block-*.npy")))
        assert whole == block + (not mid_write)
        assert len(list((folder / "blocks").glob(".block-*.tmp"))) > 0  # what a kill leaves, and nobody reads
        if mid_write:
            assert refine(folder, str(block)) == -signal.SIGKILL
    assert refine(folder, "none") == 0
    np.testing.assert_array_equal(np.load(folder / "latents.npy"), straight)
