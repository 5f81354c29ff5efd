"""Kill -9 at twenty random moments in a row: start-up, preparation, compiling, training, saving, previews."""

from __future__ import annotations

import random
import signal
import time
from typing import NamedTuple

import pytest

from tests.train.run_training import (
    Training,
    assert_same_run,
    cache_directory,
    left_behind,
    run,
    saved_steps,
    start,
    straight_run,
    tiny,
)

STEPS, EVERY = 600, 20
# Every row is followed by a save, and every other one by a preview: what is random falls into all of them.
CHANGES = {
    **{"steps": STEPS, "logging__every": EVERY, "checkpoint__every": EVERY, "checkpoint__keep_last": 2},
    "preview__every": 2 * EVERY,
}


class Moment(NamedTuple):
    """After a line of this kind has come so many times, some seconds later."""

    phase: str
    line: str | None
    count: int
    seconds: float


def moments(kind: str) -> list[Moment]:
    """Twenty random moments, in phases that follow one another as those of a run do."""
    draw = random.Random(0)
    preparing = 4 if kind == "lora" else 0
    chosen = [Moment("start-up", None, 0, draw.uniform(0.0, 4.0)) for _ in range(3)]
    chosen += [Moment("preparing", "distinct prompts", 1, draw.uniform(0.0, 0.5)) for _ in range(preparing)]
    chosen += [Moment("compiling", "compiling", 1, draw.uniform(0.0, 2.0)) for _ in range(3)]
    for _ in range(20 - len(chosen)):
        chosen.append(Moment("training", f"/{STEPS}  loss", draw.choice((1, 1, 2, 3)), draw.uniform(0.0, 0.4)))
    return chosen


def wait_for(training: Training, moment: Moment) -> None:
    """Returns at the moment, or when the process has ended."""
    seen = 0
    while seen < moment.count and (line := training.process.stdout.readline()):
        training.out += line
        seen += moment.line in line
    time.sleep(moment.seconds)


def lora_options(base, photos, run_dir) -> list[str]:
    return [
        *("lora", "--model", str(base), "--data.path", str(photos), "--data.caption", "a handwritten three"),
        *("--data.cache", f"{run_dir}-cache", "--run-dir", str(run_dir), "--batch-size", "4"),
        *("--compute.dtype", "float32", "--lora.dropout", "0.1", "--ema.enabled", "--logging.every", f"{EVERY}"),
        *("--preview.num-inference-steps", "2", "--steps", f"{STEPS}", "--checkpoint.every", f"{EVERY}"),
        *("--checkpoint.keep-last", "2", "--preview.every", f"{2 * EVERY}"),
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
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_twenty_kills(kind, tmp_path, tmp_path_factory, photos):
    cache = cache_directory(tmp_path_factory)
    base = straight_run(tmp_path_factory)

    def options(name: str) -> list[str]:
        run_dir = tmp_path / name
        return lora_options(base, photos, run_dir) if kind == "lora" else tiny(run_dir, **CHANGES)

    run(cache, *options("straight"))
    steps = []
    for number, moment in enumerate(moments(kind), 1):
        # a batch of two pictures takes a while, and every batch is a shard of its own
        hook = ["preparing_takes", "0.2", "2"] if moment.phase == "preparing" else []
        training = start(cache, *options("killed"), hook=hook)
        wait_for(training, moment)
        training.send(signal.SIGKILL)
        training.finish(status=-signal.SIGKILL)
        steps.append(max(saved_steps(tmp_path / "killed"), default=0))
        last = (training.out.splitlines() or ["nothing printed yet"])[-1]
        print(f"kill {number:2}, {moment.phase}: newest checkpoint {steps[-1]}, half-written: ", end="")
        print(f"{len(left_behind(tmp_path))}; last line: {last}", flush=True)
    run(cache, *options("killed"))
    assert steps == sorted(steps)
    assert len(set(steps)) > 3, "the kills came too early or too late to show anything"
    assert_same_run(tmp_path / "killed", tmp_path / "straight", STEPS)
    assert left_behind(tmp_path) == []
    assert saved_steps(tmp_path / "killed") == saved_steps(tmp_path / "straight")
    names = [sorted(path.name for path in (tmp_path / name).rglob("*.png")) for name in ("killed", "straight")]
    assert names[0] == names[1]
