"""One device, eight simulated ones and two real processes train the same LoRA and the same Sprint student."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.train.run_training import (
    cache_directory,
    call,
    exact_rows,
    in_this_process,
    left_behind,
    made_once,
    pixels,
    rows,
    run,
    saved_state,
    saved_steps,
    shared_directory,
    start,
    straight_run,
)

STEPS, EVERY, PICTURES, BATCH = 12, 4, 20, 8
TOLERANCE = 1e-5


def common(base: Path, pictures: Path, run_dir: Path, steps: int) -> list[str]:
    return [
        *("--model", str(base), "--data.path", str(pictures), "--run-dir", str(run_dir), "--steps", f"{steps}"),
        *("--data.cache", f"{run_dir}-cache", "--batch-size", f"{BATCH}", "--compute.dtype", "float32"),
        # with a smaller epsilon the sign of a gradient that is nothing but rounding makes a whole update
        *("--optimizer.name", "adamw", "--optimizer.learning-rate", "1e-2", "--optimizer.epsilon", "1e-3"),
        *("--optimizer.schedule", "constant", "--optimizer.warmup-steps", "2", "--logging.every", "1"),
        *("--checkpoint.every", f"{EVERY}", "--checkpoint.keep-last", "9", "--ema.enabled"),
        *("--preview.every", f"{EVERY}", "--preview.num-inference-steps", "2"),
    ]


def lora(base: Path, pictures: Path, run_dir: Path, steps: int = STEPS) -> list[str]:
    return [
        *("lora", *common(base, pictures, run_dir, steps)),
        *("--lora.rank", "8", "--lora.dropout", "0.1", "--lora.targets", "all_linear_and_pointwise"),
        *("--data.validation-share", "0.3", "--validation.every", f"{EVERY}"),
    ]


def sprint(base: Path, pictures: Path, run_dir: Path, steps: int = EVERY) -> list[str]:
    return [
        *("sprint", *common(base, pictures, run_dir, steps)),
        *("--sprint.head-blocks", "0", "1", "--sprint.guidance-scales", "1.5", "2.5"),
        *("--sprint.tangent-warmup-steps", "2", "--sprint.discriminator-learning-rate", "1e-3"),
    ]


def in_two_processes(cache: Path, *options: str) -> tuple[str, str]:
    """What the first of two processes with a device each printed; the second prints nothing."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    options = [*options, "--distributed.coordinator", address, "--distributed.num-processes", "2"]
    both = [start(cache, *options, "--distributed.process-id", f"{index}") for index in range(2)]
    (out, err), (silent, _) = [training.finish() for training in both]
    assert [line for line in silent.splitlines() if not line.startswith("[Gloo]")] == []
    return out, err


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return cache_directory(tmp_path_factory)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return straight_run(tmp_path_factory)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Drawings of threes and sevens with their captions."""

    def draw(folder):
        from PIL import Image
        from sklearn.datasets import load_digits

        digits = load_digits()
        folder.mkdir()
        for name, digit in (("three", 3), ("seven", 7)):
            for number, picture in enumerate(digits.images[digits.target == digit][: PICTURES // 2]):
                Image.fromarray((picture * 15.9).astype("uint8")).save(folder / f"{name}{number}.png")
                (folder / f"{name}{number}.txt").write_text(f"a handwritten {name}")

    return made_once(shared_directory(tmp_path_factory) / "agreement-pictures", draw)


def assert_same_to_rounding(got: Path, want: Path, step: int) -> None:
    have, expected = exact_rows(got), exact_rows(want)[: len(exact_rows(got))]
    assert [row["step"] for row in have] == list(range(1, step + 1))
    for row, reference in zip(have, expected, strict=True):
        assert row == pytest.approx(reference, rel=TOLERANCE)
    for row, reference in zip(rows(got), rows(want)):
        measured = {name: value for name, value in reference.items() if name.startswith("validation_loss")}
        assert {name: row[name] for name in measured} == pytest.approx(measured, rel=TOLERANCE)
    have, expected = saved_state(got, step), saved_state(want, step)
    assert have.keys() == expected.keys()
    for name, array in expected.items():
        difference = np.abs(have[name].astype(float) - array).max()
        # Sprint's heads have biases before a normalisation: their gradients are 0 but for rounding, and so are moments.
        floor = 1e-6 if name.startswith("opt_state/discriminator") and name.endswith("/bias") else 0.0
        assert difference <= 10 * TOLERANCE * np.abs(array).max() + floor, f"{name}: {difference}"
    for drawn in range(0, step + 1, EVERY):
        difference = np.abs(pixels(got, drawn).astype(int) - pixels(want, drawn))
        assert difference.max() <= 1, f"the preview of step {drawn}"


@pytest.mark.prove  # two minutes; whole models are moved so with every commit
def test_lora_on_8_devices_then_in_2_processes_then_on_one(cache, base, pictures, tmp_path, capfd):
    straight, moving = tmp_path / "straight", tmp_path / "moving"
    run(cache, *lora(base, pictures, straight))
    assert "validation_loss" in rows(straight)[EVERY - 1]

    out, _ = run(cache, *lora(base, pictures, moving, EVERY), "--mesh.fsdp", "4", devices=8)
    assert "mesh data=2, fsdp=4" in out
    out, _ = in_two_processes(cache, "--resume", str(moving), "--mesh.fsdp", "2", "--steps", f"{2 * EVERY}")
    assert "over 2 processes, mesh fsdp=2" in out
    assert f"resumed at step {EVERY} of {2 * EVERY}" in out
    with in_this_process(cache):
        status, out, err = call(capfd, "--resume", str(moving), "--mesh.fsdp", "1", "--steps", f"{STEPS}")
    assert status == 0, err
    assert "mesh of one device" in out
    assert f"resumed at step {2 * EVERY} of {STEPS}" in out

    assert_same_to_rounding(moving, straight, STEPS)
    assert saved_steps(moving) == saved_steps(straight) == [EVERY, 2 * EVERY, STEPS]
    published, expected = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (moving, straight))
    assert published.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(published[name], array, atol=10 * TOLERANCE * np.abs(array).max(), err_msg=name)
    assert left_behind(tmp_path) == []


@pytest.mark.prove  # two minutes
@pytest.mark.parametrize("kind", [lora, sprint])
def test_two_processes_from_the_beginning(kind, cache, base, pictures, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(cache, *kind(base, pictures, one, EVERY))
    # both start without a cache: the first process makes it, and the other waits
    out, _ = in_two_processes(cache, *kind(base, pictures, two, EVERY), "--mesh.fsdp", "2")
    assert out.count(f"{PICTURES:,} pictures, 0 of them there") == 1
    assert "over 2 processes, mesh fsdp=2" in out
    assert_same_to_rounding(two, one, EVERY)
    files, expected = ({path.relative_to(d).parts[0] for path in d.rglob("*")} for d in (two, one))
    assert files == expected
    assert left_behind(tmp_path) == []
