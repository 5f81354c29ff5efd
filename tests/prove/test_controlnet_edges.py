"""A ControlNet really learns: pictures keep to the edges that they are given, far better than without it.

The base model draws digits in the middle; the ControlNet learns from digits that were moved to the left or right. It is
measured with the edges of a hundred others.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sana_jax import SanaControlNetPipeline, SanaPipeline
from sana_jax.generate import main as generate
from tests.prove.edges import Pictures, digits, edge_agreement, edges_of

TRAINING, HELD_OUT = digits()
SEED = 5


def next_of_its_digit(values: np.ndarray) -> np.ndarray:
    """Ten of each digit, of which each takes the place of another one of its digit."""
    return np.concatenate([np.roll(ten, 1, axis=0) for ten in np.split(values, 10)])


# -- the measure -------------------------------------------------------------------------------------------------------


def test_pictures_agree_with_their_own_edges_only():
    assert edge_agreement(HELD_OUT.pixels, HELD_OUT.edges) == 1
    assert edge_agreement(next_of_its_digit(HELD_OUT.pixels), HELD_OUT.edges) < 0.45
    assert edge_agreement(np.zeros_like(HELD_OUT.pixels), HELD_OUT.edges) == 0
    noise = np.random.default_rng(1).integers(-20, 20, HELD_OUT.pixels.shape)
    rough = np.clip(HELD_OUT.pixels * 0.9 + noise, 0, 255).astype(np.uint8)
    assert edge_agreement(rough, HELD_OUT.edges) > 0.75


def test_no_picture_is_in_both_parts():
    seen = {picture.tobytes() for picture in TRAINING.pixels}
    assert len(HELD_OUT.pixels) == 100
    assert sum(picture.tobytes() in seen for picture in HELD_OUT.pixels) == 0


# -- the proof ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Models:
    base: SanaPipeline
    controlled: SanaControlNetPipeline
    run_dir: str


def train(*words: str) -> None:
    command = [sys.executable, "-m", "train.main", *words, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    """The embedded default, of fewer steps, and a ControlNet for it; SANA_JAX_DIGITS names a finished run instead."""
    folder = tmp_path_factory.mktemp("controlnet")
    base = os.environ.get("SANA_JAX_DIGITS")
    if base is None:
        base = str(folder / "digits")
        train("--run-dir", base, "--steps", "500", "--preview.every", "0")
    TRAINING.write(folder / "pictures")
    run_dir = str(folder / "controlnet")
    train("digits_controlnet", "--model", base, "--data.path", str(folder / "pictures"), "--run-dir", run_dir)
    return Models(SanaPipeline.from_pretrained(base), SanaControlNetPipeline.from_pretrained(run_dir), run_dir)


def controls(edges: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(np.repeat(np.uint8(255 * one)[..., None], 3, axis=-1)) for one in edges]


def drawn(pipeline, pictures: Pictures = HELD_OUT, **options) -> np.ndarray:
    found = pipeline(pictures.captions, seed=SEED, output_type="np", progress_bar=False, **options).images
    return np.round(np.asarray(found)[..., 0] * 255).astype(np.uint8)


@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_samples_keep_to_the_edges(models, tmp_path):
    edges = HELD_OUT.edges
    others = next_of_its_digit(edges)
    without = drawn(models.base)
    given = drawn(models.controlled, control_image=controls(edges))
    given_others = drawn(models.controlled, control_image=controls(others))
    figures = {
        "with the ControlNet": edge_agreement(given, edges),
        "without it": edge_agreement(without, edges),
        "with another one's edges": edge_agreement(given_others, edges),
        "with another one's edges, compared with these": edge_agreement(given_others, others),
        "other real pictures of the same digits": edge_agreement(next_of_its_digit(HELD_OUT.pixels), edges),
    }
    print("".join(f"{name}: F1 {value:.3f}\n" for name, value in figures.items()))
    assert figures["with the ControlNet"] >= 0.7
    assert figures["with another one's edges, compared with these"] >= 0.7
    assert figures["without it"] <= 0.45
    assert figures["with another one's edges"] <= 0.45

    # one after the other it holds as well: nearly every picture gains, and none by the caption alone
    each = [
        (edge_agreement(a[None], e[None]), edge_agreement(b[None], e[None])) for a, b, e in zip(given, without, edges)
    ]
    assert np.mean([mine > theirs for mine, theirs in each]) >= 0.85

    off = drawn(models.controlled, control_image=controls(edges), controlnet_conditioning_scale=0.0)
    np.testing.assert_array_equal(off, without)
    assert edges_of(off).shape == edges.shape

    controls(edges)[0].save(tmp_path / "edges.png")
    options = ["--model", models.run_dir, "--prompt", HELD_OUT.captions[0], "--seed", str(SEED), "--enlarge", "1"]
    files = ["--control-image", str(tmp_path / "edges.png"), "--output", str(tmp_path / "zero.png")]
    generate([*options, *files])
    found = np.asarray(Image.open(tmp_path / "zero.png"), np.int64)
    assert np.abs(found - given[0]).max() <= 1
