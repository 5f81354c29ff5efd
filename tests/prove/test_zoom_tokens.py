"""Condition tokens on real pixels: a model learns to draw objects of photographs at the zoom that a token names.

Everything goes through the commands that a user has: ``train.main finetune`` makes a base model of captions alone,
``train.main siglip_zoom_lora`` teaches it the object and the zoom, ``sana_jax.generate`` draws.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image, ImageSequence

from sana_jax.pipelines.text_to_image import SanaPipeline
from tests.prove.zoom import OBJECTS, measured_zoom, rank_correlation, write_manifest
from tests.prove.zoom_models import SIGLIP, network, write_model, write_siglip

pytestmark = [pytest.mark.prove, pytest.mark.timeout(2400)]
SIZE = 16
ZOOMS = np.linspace(0, 1, 9)
GUIDANCE = 3.0
PICTURES = 4  # of each object at each zoom
BOTH = {
    "batch-size": 32,
    "compute.dtype": "float32",
    "compute.remat": "none",
    "data.validation-share": 0,  # all objects are drawn again
    "optimizer.schedule": "cosine",
    "checkpoint.every": 500,
    "preview.every": 500,
    "logging.every": 50,
}
BASE = {
    "steps": 600,
    "ema.decay": 0.99,
    "optimizer.learning-rate": 2e-3,
    "optimizer.warmup-steps": 50,
    "optimizer.clip-norm": 1.0,
}
TOKENS = {
    "steps": 1500,
    "tokens.object.width": SIGLIP.hidden_size,
    # The base model's caption projection has seen three words, and has room for little else.
    "tokens.zoom.inject": "after",
    "tokens.zoom.frequencies": 2,
    "lora.targets": "all_linear_and_pointwise",
    "optimizer.learning-rate": 4e-3,
    "optimizer.warmup-steps": 20,
}
TOKEN_RATES = (r"tokens/\w+/(linear_\d+/.*|null)=1e-2", r"tokens/\w+/attention_weight=4e-2")


def command(module: str, *words: object) -> None:
    """Runs it as a user does, and shows what it printed."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, words)], capture_output=True, text=True, check=False, env=environment
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    print(f"{module} {words[0]}: {time.perf_counter() - started:.0f} s")


def train(preset: str, model, run_dir, manifest, *more: str, **options: object) -> None:
    values = {"model": model, "run-dir": run_dir, "data.path": manifest, **BOTH, **options}
    command("train.main", preset, *(word for name, value in values.items() for word in (f"--{name}", value)), *more)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with pictures, the base model, the SigLIP and the run that has learned to zoom."""
    directory = tmp_path_factory.mktemp("zoom")
    manifest = write_manifest(directory / "pictures", size=SIZE)
    write_model(directory / "untrained", network(SIZE))
    write_siglip(directory / "siglip")
    train("finetune", directory / "untrained", directory / "base", manifest, **BASE)
    conditions = ("--data.conditions", f"object=siglip:{directory / 'siglip'}", "zoom=scalar")
    rates = ("--optimizer.learning-rates", *TOKEN_RATES)
    train("siglip_zoom_lora", directory / "base", directory / "zoom", manifest, *conditions, *rates, **TOKENS)
    return directory


def draw(pipeline: SanaPipeline, thing, conditions: dict) -> np.ndarray:
    """Pictures of an object's photograph with the same noises each time, (PICTURES, SIZE, SIZE, 3)."""
    settings = {"num_images_per_prompt": PICTURES, "seed": 1, "guidance_scale": GUIDANCE, "output_type": "np"}
    return pipeline(thing.photograph, conditions=conditions, **settings).images


def test_the_zoom_follows_the_token_and_the_object_its_picture(place):
    pipeline = SanaPipeline.from_pretrained(place / "zoom")
    correlations, recognised = {}, []
    for thing in OBJECTS:
        picture = {"object": str(place / "pictures" / thing.name / "object.png")}
        given = pipeline.embed_pictures(picture)
        drawn = [draw(pipeline, thing, {**given, "zoom": float(zoom)}) for zoom in ZOOMS]
        found, agreement = measured_zoom(np.concatenate(drawn), thing)
        correlations[thing.name] = rank_correlation(np.repeat(ZOOMS, PICTURES), found)
        others = [measured_zoom(np.concatenate(drawn), other)[1] for other in OBJECTS if other != thing]
        recognised.append((agreement > np.max(others, axis=0)).mean())
        means = found.reshape(len(ZOOMS), PICTURES).mean(axis=1)
        print(f"{thing.name}: {correlations[thing.name]:.3f}, agreement {agreement.mean():.2f}, {means.round(2)}")
    print(f"mean {np.mean(list(correlations.values())):.3f}; taken for the object itself {np.mean(recognised):.2f}")
    assert min(correlations.values()) >= 0.9
    assert np.mean(recognised) >= 0.8


def test_without_tokens_nothing_follows(place):
    """The base model draws the photographs at zooms of its own choice."""
    pipeline = SanaPipeline.from_pretrained(place / "base")
    asked = np.repeat(ZOOMS, PICTURES)
    for thing in OBJECTS:
        pictures = pipeline(
            thing.photograph, num_images_per_prompt=len(asked), seed=1, output_type="np", guidance_scale=1.0
        ).images
        found, _ = measured_zoom(pictures, thing)
        print(f"{thing.name}: {rank_correlation(asked, found):.3f}")
        assert abs(rank_correlation(asked, found)) < 0.5


def test_the_sweep_is_drawn(place, tmp_path):
    thing = OBJECTS[-1]
    words = [
        "--model",
        place / "zoom",
        "--prompt",
        thing.photograph,
        "--sweep",
        "zoom=0:1:9",
        "--guidance-scale",
        GUIDANCE,
    ]
    words += ["--condition", f"object={place / 'pictures' / thing.name / 'object.png'}"]
    command("sana_jax.generate", *words, "--output", tmp_path / "sweep.png", "--num-images", 3)
    command("sana_jax.generate", *words, "--output", tmp_path / "sweep.gif")
    with Image.open(tmp_path / "sweep.gif") as film:
        frames = [
            frame.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX) for frame in ImageSequence.Iterator(film)
        ]
    assert len(frames) == 16
    found, _ = measured_zoom(np.stack([np.asarray(frame) for frame in frames[:9]]), thing)
    assert rank_correlation(ZOOMS, found) >= 0.9
    with Image.open(tmp_path / "sweep.png") as sheet:
        assert sheet.size[0] > 2 * sheet.size[1]
