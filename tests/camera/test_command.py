"""``python -m sana_jax.camera``: what it prints, writes and refuses, and its picture."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana_jax.camera import action_to_c2w, draw_trajectory
from sana_jax.camera.__main__ import main
from sana_jax.errors import UserError

ROOT = Path(__file__).parents[2]
START, END = (22, 140, 70), (196, 36, 36)


def middle_of(picture: Image.Image, colour: tuple[int, int, int], columns: slice) -> np.ndarray:
    """Column and row of the middle of a mark; the labels in its colour are thin and move it little."""
    pixels = np.asarray(picture, int)[:, columns]
    rows, found = np.nonzero(np.abs(pixels - colour).max(-1) < 12)
    assert len(rows), colour
    return np.array([np.median(found), np.median(rows)])


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(file, array):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"cannot write .*path.npy \(No space left on device\); choose another place"):
        main(["w-40", "--npy", str(tmp_path / "path.npy")])
    assert list(tmp_path.iterdir()) == []


def test_numbers_poses_and_picture(tmp_path, capsys):
    plot, npy = tmp_path / "new" / "path.png", tmp_path / "path.npy"
    assert main(["w-40,jw-20,k-4", "--plot", str(plot), "--npy", str(npy)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "w-40,jw-20,k-4   scheme v1 (diffusers 0.42.1), 0.05 units and 1.2° per frame",
        "65 frames, path 3.000 units, yaw -24.0°, pitch -4.8°",
        f"poses: {npy}, float32 (65, 4, 4)",
        f"picture: {plot}",
    ]
    poses = np.load(npy)
    np.testing.assert_array_equal(poses, action_to_c2w("w-40,jw-20,k-4", "v1"))
    with Image.open(plot) as picture:
        assert picture.mode == "RGB"
        assert 600 <= picture.width <= 1200
        half = picture.width // 2
        above_start, above_end = (middle_of(picture, colour, slice(0, half)) for colour in (START, END))
        side_start, side_end = (middle_of(picture, colour, slice(half, None)) for colour in (START, END))
    # forward is up and left is left from above; from the side forward is to the right, at one height
    assert above_end[1] < above_start[1] - 100
    assert above_end[0] < above_start[0] - 10
    assert side_end[0] > side_start[0] + 100
    assert abs(side_end[1] - side_start[1]) < 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "path.npy"]

    assert main(["--c2w", str(npy), "--num-frames", "65"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "path.npy   camera-to-world matrices",
        "65 frames, path 3.000 units, yaw -24.0°, pitch -4.8°",
    ]


@pytest.mark.parametrize("scheme", ["--scheme", "--action-scheme"])  # as generate calls it
def test_schemes_and_speeds(scheme, capsys):
    assert main(["--action", "d-10", scheme, "v2", "--rotation-speed", "3", "--smooth", "False"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "d-10   scheme v2 (NVlabs/Sana since the streaming release), 0.025 units and 3° per frame",
        "11 frames, path 0.000 units, yaw +30.0°, pitch +0.0°",
        "a model with 1 + 8k frames, as SANA-WM, would use the first 9",
    ]


def test_as_a_program():
    """One process for both: what it prints, and one line and status 2 for a mistake."""
    done = subprocess.run(
        [sys.executable, "-m", "sana_jax.camera", "w-8,q-3"], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: action 'w-8,q-3', segment 2 'q-3' has keys that are not known, 'q'; scheme")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "an action and --c2w: neither is given"),
        (["w-8", "--c2w", "{tmp}/good.npy"], "an action and --c2w: both are given"),
        (["w-8", "--scheme", "v9"], "--scheme cannot be 'v9'; allowed is one of v1, v2"),
        (["w-8", "--num-frames", "17"], "makes 9 frames"),
        (["w-8", "--translation-speed", "nan"], "--translation-speed nan is not allowed"),
        (["w-8", "--plot", "out.jpg"], "--plot 'out.jpg' is not allowed; its name ends in .png: try out.png"),
        (["w-8", "--npy", "out.npz"], "--npy 'out.npz' is not allowed; its name ends in .npy: try out.npy"),
        (["w-8", "--npy", "{tmp}/folder.npy"], "is a folder"),
        (["w-8", "--pitch-limit", "95"], "--pitch-limit 95"),
        (["--c2w", "{tmp}/good.npy", "--scheme", "v2"], "--scheme v2 would not be used with --c2w"),
        (["--c2w", "{tmp}/good.npy", "--smooth", "False"], "--smooth False would not be used with --c2w"),
        (["--c2w", "{tmp}/good.npy", "--num-frames", "9"], "has 2 frames, not the 9"),
        (["--c2w", "{tmp}/bad.npy"], r"shape \(2, 3, 4\); allowed is \(frames, 4, 4\)"),
        (["--c2w", "{tmp}/text.npy"], "is no .npy file of numbers"),
        (["--c2w", "{tmp}/absent.npy"], "is missing"),
        (["--c2w", "{tmp}/empty.npy"], "is no .npy file of numbers"),
        (["--c2w", "{tmp}/cut.npy"], "is no .npy file of numbers"),
        (["--c2w", "{tmp}/cut.npz"], "is no .npy file of numbers"),
        (["--c2w", "{tmp}/several.npz"], r"holds arrays by name \(c2w, K\), and --c2w takes an .npy file of one"),
    ],
)
def test_mistakes(arguments, message, tmp_path):
    np.save(tmp_path / "good.npy", np.tile(np.eye(4, dtype=np.float32), (2, 1, 1)))
    np.save(tmp_path / "bad.npy", np.zeros((2, 3, 4)))
    (tmp_path / "text.npy").write_text("1 0 0 0")
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "empty.npy").touch()
    np.savez(tmp_path / "several.npz", c2w=np.eye(4)[None], K=np.ones(4))
    for cut, whole in (("cut.npy", "good.npy"), ("cut.npz", "several.npz")):
        (tmp_path / cut).write_bytes((tmp_path / whole).read_bytes()[:-9])
    with pytest.raises((UserError, FileNotFoundError), match=message):
        main([argument.format(tmp=tmp_path) for argument in arguments])


@pytest.mark.parametrize("action", ["none-1", "l-30,i-40", "wl-300", "d-4000"])
def test_every_path_fits_its_picture(action):
    """Marks are drawn, and nothing is drawn over the border."""
    picture = draw_trajectory(action_to_c2w(action), "a title that is much too long for one line " * 5)
    half = picture.width // 2
    for columns in (slice(0, half), slice(half, None)):
        middle_of(picture, END, columns)
    pixels = np.asarray(picture)
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all()


def test_one_frame_can_be_drawn():
    picture = draw_trajectory(np.eye(4, dtype=np.float32)[None])
    for columns in (slice(0, picture.width // 2), slice(picture.width // 2, None)):
        middle_of(picture, END, columns)  # which fails where no mark is
