"""Condition tokens through the trainer: no effect at the start, exact resume, files, pictures, mistakes."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageSequence

from configs.optimizer import OptimizerConfig
from sana_jax.condition_tokens_files import CONFIG_NAME, WEIGHTS_NAME, load_condition_tokens
from sana_jax.errors import UserError
from sana_jax.generate import main as generate
from sana_jax.images import automatic_enlargement, enlarge_image, image_grid, to_pil
from sana_jax.models.condition_tokens import ConditionEncoders, TokenEncoderConfig, init_tokens
from sana_jax.pipelines.text_to_image import SanaPipeline
from sana_jax.weights.rules import flatten
from tests.pipelines.tiny_model import random_params
from tests.prove.zoom import OBJECTS, write_manifest
from tests.prove.zoom_models import SIGLIP, network, write_model, write_siglip
from tests.train.run_training import (
    assert_same_run,
    cache_directory,
    call,
    in_this_process,
    pixels,
    saved_state,
    saved_steps,
    the_error,
)
from train.optimizers import make_optimizer
from train.previews import short_labels

SIZE, STEPS, SAVE_EVERY = 16, 8, 4
THINGS = (OBJECTS[0], OBJECTS[-1])


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    with in_this_process(cache_directory(tmp_path_factory)):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with pictures, a base model whose every parameter acts, and a SigLIP."""
    directory = tmp_path_factory.mktemp("tokens")
    write_manifest(directory / "pictures", size=SIZE, zooms=(0.0, 0.3, 0.7, 1.0), objects=THINGS)
    config = network(SIZE, heads=2, layers=2)
    write_model(directory / "base", config, random_params(config, seed=1))
    write_siglip(directory / "siglip")
    return directory


def options(place, run_dir, **changes) -> list[str]:
    """The preset's options for a run of a few steps; None leaves an option out."""
    values = {
        "model": place / "base",
        "run-dir": run_dir,
        "data.path": place / "pictures" / "triples.jsonl",
        "data.conditions": f"object=siglip:{place / 'siglip'} zoom=scalar",
        "data.validation-share": 0,
        "tokens.object.width": SIGLIP.hidden_size,
        "tokens.zoom.dropout": 0.3,
        "steps": STEPS,
        "batch-size": 4,
        "compute.dtype": "float32",
        "compute.remat": "none",
        "lora.rank": 2,
        "lora.dropout": 0.1,
        "optimizer.learning-rate": 1e-2,
        "optimizer.warmup-steps": 0,
        "optimizer.epsilon": 1e-3,
        "optimizer.weight-decay": 0.01,
        "logging.every": 2,
        "checkpoint.every": SAVE_EVERY,
        "preview.every": 4,
        "preview.at": None,
        "preview.num-inference-steps": 2,
        "preview.guidance-scale": 2.0,
    } | {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    words = ["siglip_zoom_lora"]
    for name, value in values.items():
        several = name in ("data.conditions", "preview.at")
        words += [f"--{name}", *(str(value or "").split() if several else [str(value)])]
    return words


@pytest.fixture(scope="module")
def run(place):
    """A finished run."""
    from train.main import main

    assert main(options(place, place / "run")) == 0
    return place / "run"


# -- the start ---------------------------------------------------------------------------------------------------------


def test_the_first_preview_is_the_base_models_picture(place, run):
    pipeline = SanaPipeline.from_pretrained(place / "base")
    captions = ["china"] * 4 + ["flower"] * 4  # a column for each of eight examples
    rows = 2
    drawn = pipeline(captions * rows, num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    factor = automatic_enlargement(SIZE, SIZE) // 2
    pictures = [enlarge_image(to_pil(picture), factor) for picture in drawn]
    expected = np.asarray(image_grid(pictures, len(captions), short_labels(captions) * rows), np.int64)
    assert expected.std() > 20
    assert np.abs(pixels(run, 0).astype(np.int64) - expected).max() <= 1
    assert np.abs(pixels(run, STEPS).astype(np.int64) - expected).max() > 10


# -- resume and files --------------------------------------------------------------------------------------------------


def test_resume_is_exact(place, run, capfd):
    copy = place / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    (copy / "samples" / f"step_{STEPS:06d}.png").unlink()
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        (copy / name).unlink()
    status, out, err = call(capfd, "--resume", str(copy))
    assert status == 0, err
    assert f"resumed at step {SAVE_EVERY} of {STEPS}" in out
    assert_same_run(copy, run, STEPS)
    for name in (WEIGHTS_NAME, CONFIG_NAME, "pytorch_lora_weights.safetensors"):
        assert (copy / name).read_bytes() == (run / name).read_bytes()


def test_an_image_encoder_may_move(place, run, tmp_path, capfd):
    copy, moved = place / "copy-of-moved", shutil.copytree(place / "siglip", tmp_path / "moved")
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    there = ["--data.conditions", f"object=siglip:{moved}", "zoom=scalar"]
    write_siglip(tmp_path / "other", seed=1)
    status, _, err = call(capfd, "--resume", str(copy), *(word.replace("moved", "other") for word in there))
    assert status == 2
    assert "holds a run of another configuration: data.conditions" in the_error(err)
    status, _, err = call(capfd, "--resume", str(copy), *(word.replace("moved", "gone") for word in there))
    assert status == 2
    assert "gone is no SigLIP, it has no config.json; write object=siglip:DIRECTORY, with a published" in the_error(err)
    status, out, err = call(capfd, "--resume", str(copy), *there)
    assert status == 0, err
    assert f"resumed at step {SAVE_EVERY} of {STEPS}" in out
    assert_same_run(copy, run, STEPS)
    assert load_condition_tokens(copy).image_encoders["object"]["directory"] == str(moved)


def tokens_of_step(run, step: int) -> dict[str, np.ndarray]:
    start = "params/tokens/"
    return {name[len(start) :]: leaf for name, leaf in saved_state(run, step).items() if name.startswith(start)}


def named(params) -> dict[str, np.ndarray]:
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten(params).items()}


def assert_equal(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name].tobytes() != wanted[name].tobytes()] == []


def test_files_hold_the_newest_steps_tokens(place, run):
    saved = load_condition_tokens(run)
    assert saved.encoders.encoders["object"].width == SIGLIP.hidden_size
    assert saved.image_encoders["object"]["directory"] == str(place / "siglip")
    assert_equal(named(saved.params), tokens_of_step(run, STEPS))
    card = (run / "README.md").read_text()
    assert "zoom (a number from 0 to 1" in card
    assert saved_steps(run) == [SAVE_EVERY, STEPS]


def test_a_checkpoint_is_opened_with_its_own_tokens(place, run, tmp_path):
    opened = {step: SanaPipeline.from_pretrained(run, checkpoint_step=step) for step in (SAVE_EVERY, STEPS)}
    for step, pipeline in opened.items():
        assert_equal(named(pipeline.condition_tokens.params), tokens_of_step(run, step))
    assert (
        tokens_of_step(run, SAVE_EVERY)["zoom/attention_weight"] != tokens_of_step(run, STEPS)["zoom/attention_weight"]
    )
    # where a run was killed before its files were written, its checkpoint is enough
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        (run / name).rename(tmp_path / name)
    try:
        alone = SanaPipeline.from_pretrained(run)
    finally:
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            (tmp_path / name).rename(run / name)
    assert_equal(named(alone.condition_tokens.params), tokens_of_step(run, STEPS))
    picture = place / "pictures" / THINGS[0].name / "object.png"
    quick = {"num_inference_steps": 2, "output_type": "np"}
    with_zoom = [alone("china", conditions={"object": str(picture), "zoom": z}, **quick).images for z in (0.0, 1.0)]
    assert np.abs(with_zoom[0] - with_zoom[1]).max() > 1e-3


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_generate_draws_sweeps(place, run, tmp_path, capsys):
    picture = place / "pictures" / THINGS[0].name / "object.png"
    words = ["--model", str(run), "--prompt", "china", "--condition", f"object={picture}", "--sweep", "zoom=0:1:3"]
    assert generate([*words, "--output", str(tmp_path / "sweep.gif"), "--steps", "2"]) == 0
    assert "conditions: object (a vector of 48 or a picture" in capsys.readouterr().out
    with Image.open(tmp_path / "sweep.gif") as film:
        frames = [np.asarray(frame.convert("RGB"), np.int64) for frame in ImageSequence.Iterator(film)]
    assert len(frames) == 4  # there and back
    assert np.abs(frames[0] - frames[2]).max() > 0
    assert generate([*words, "--output", str(tmp_path / "sweep.png"), "--steps", "2", "--num-images", "2"]) == 0
    with Image.open(tmp_path / "sweep.png") as sheet:
        assert sheet.size[0] > 3 * 128


# -- what is decayed ---------------------------------------------------------------------------------------------------


def test_weight_decay_spares_the_null_tokens_and_the_weights():
    encoders = {"zoom": TokenEncoderConfig("scalar"), "object": TokenEncoderConfig("vector", width=3)}
    params = {"tokens": init_tokens(ConditionEncoders(encoders, 4, 8), jax.random.key(0))}
    params = jax.tree.map(lambda leaf: leaf + 1.0, params)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.1), 10, params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = {name for name, leaf in named(updates).items() if np.abs(leaf).max() > 0}
    assert moved == {name for name in named(params) if name.endswith("/kernel")}


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"data__conditions": "zoom=scalar"}, ["condition object", "does not have", "--data.conditions object="]),
        ({"more": "thumbnail=vector"}, ["--data.conditions declares thumbnail", "leave it out"]),
        ({"data__conditions": "object=scalar zoom=scalar"}, ["which is no number"]),
        ({"tokens__object__width": 7}, ["a vector of 7 numbers", "a vector of 48", "--tokens.object.width 48"]),
        ({"data__conditions": "object=siglip zoom=scalar"}, ["names no model"]),
    ],
    ids=["missing", "superfluous", "no number", "width", "no tower"],
)
def test_mistakes_are_one_line(place, tmp_path, capfd, changes, parts):
    if more := changes.get("more"):
        changes = {"data__conditions": f"object=siglip:{place / 'siglip'} zoom=scalar {more}"}
    status, _, err = call(capfd, *options(place, tmp_path / "run", **changes))
    assert status != 0
    line = the_error(err)
    assert all(part in line for part in parts), line


def test_conditions_of_a_call(run):
    pipeline = SanaPipeline.from_pretrained(run)
    with pytest.raises(UserError, match="unknown conditions size; this model's are object, zoom"):
        pipeline("china", conditions={"size": 1.0})
    with pytest.raises(UserError, match=r"condition object has the shape \(3,\)"):
        pipeline("china", conditions={"object": np.zeros(3), "zoom": 0.5})
