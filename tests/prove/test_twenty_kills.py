"""Kill -9 at twenty random moments in a row: start-up, preparation, compiling, training, saving, previews."""

from __future__ import annotations

import random
import signal
import time

import pytest

from tests.train.run_training import (
    assert_same_run,
    cache_directory,
    left_behind,
    run,
    saved_steps,
    start,
    straight_run,
    tiny,
)

KILLS, STEPS = 20, 600
# Short intervals, so that many of the kills fall into a save.
CHANGES = {"steps": STEPS, "checkpoint__every": 20, "checkpoint__keep_last": 2, "preview__every": 200}


def lora_options(base, photos, run_dir) -> list[str]:
    return [
        *("lora", "--model", str(base), "--data.path", str(photos), "--data.caption", "a handwritten three"),
        *("--data.cache", f"{run_dir}-cache", "--run-dir", str(run_dir), "--batch-size", "4"),
        *("--compute.dtype", "float32", "--lora.dropout", "0.1", "--ema.enabled", "--logging.every", "20"),
        *("--preview.num-inference-steps", "2", "--steps", f"{STEPS}", "--checkpoint.every", "20"),
        *("--checkpoint.keep-last", "2", "--preview.every", "200"),
    ]


@pytest.fixture
def photos(tmp_path):
    """Twelve drawings of a digit."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, picture in enumerate(digits.images[digits.target == 3][:12]):
        Image.fromarray((picture * 15.9).astype("uint8")).resize((64, 64)).save(folder / f"{number}.png")
    return folder


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_twenty_kills(kind, tmp_path, tmp_path_factory, photos):
    cache = cache_directory(tmp_path_factory)
    base = straight_run(tmp_path_factory)

    def options(name: str) -> list[str]:
        run_dir = tmp_path / name
        return lora_options(base, photos, run_dir) if kind == "lora" else tiny(run_dir, **CHANGES)

    started = time.perf_counter()
    run(cache, *options("straight"))
    whole = time.perf_counter() - started

    moments, steps = random.Random(0), []
    for _ in range(KILLS):
        training = start(cache, *options("killed"))
        deadline = time.perf_counter() + moments.uniform(0.0, whole)
        while time.perf_counter() < deadline and training.process.poll() is None:
            time.sleep(0.01)
        finished = training.process.poll() is not None
        training.send(signal.SIGKILL)
        training.finish(status=0 if finished else -signal.SIGKILL)
        steps.append(max(saved_steps(tmp_path / "killed"), default=0))
    run(cache, *options("killed"))
    print(f"newest checkpoint after each kill: {steps}")
    assert steps == sorted(steps)
    assert len(set(steps)) > 3, "the kills came too early or too late to show anything"
    assert_same_run(tmp_path / "killed", tmp_path / "straight", STEPS)
    assert left_behind(tmp_path) == []
    assert saved_steps(tmp_path / "killed") == saved_steps(tmp_path / "straight")
