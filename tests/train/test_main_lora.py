"""A LoRA through the trainer: the start, exact resume, its files and exports, base models that are gone, DreamBooth."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from convert.main import main as convert
from sana_jax.errors import UserError
from sana_jax.generate import main as generate
from sana_jax.images import automatic_enlargement, enlarge_image, image_grid, to_pil
from sana_jax.pipelines.text_to_image import SanaPipeline
from sana_jax.weights.safetensors_files import SafetensorsSource
from tests.pipelines.tiny_model import random_params, tiny_config, write_run
from tests.train.run_training import (
    assert_same_run,
    cache_directory,
    call,
    in_this_process,
    left_behind,
    pixels,
    rows,
    saved_state,
    saved_steps,
    the_error,
)
from train.base_model import _whole_with_lora
from train.example_pictures import main as write_pictures
from train.main import main as train

STEPS, SAVE_EVERY = 8, 4
PROMPTS = ["a handwritten seven", "a handwritten zero"]
FILE, CARD = "pytorch_lora_weights.safetensors", "README.md"


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    with in_this_process(cache_directory(tmp_path_factory)):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a few pictures and a base model whose every parameter acts."""
    directory = tmp_path_factory.mktemp("lora")
    write_pictures([str(directory / "pictures"), "--digits", "7", "--count", "5"])
    config = tiny_config(patch_size=2, qk_norm="rms_norm_across_heads", timestep_scale=0.001)
    write_run(directory / "base", random_params(config, 1), random_params(config, 2), config)
    return directory


def options(place, run_dir, preset: str = "lora", **changes) -> list[str]:
    """The preset's options for a run of a few steps."""
    values = {
        "model": place / "base",
        "run-dir": run_dir,
        "data.path": place / "pictures",
        "data.cache": place / "cache",
        "data.caption": PROMPTS[0],
        "steps": STEPS,
        "batch-size": 4,
        "accumulation": 1,
        "compute.dtype": "float32",
        "compute.remat": "none",
        "lora.rank": 2,
        "lora.alpha": 3,
        "lora.dropout": 0.1,
        "optimizer.learning-rate": 1e-2,
        "optimizer.warmup-steps": 0,
        "optimizer.epsilon": 1e-3,
        "logging.every": 2,
        "checkpoint.every": SAVE_EVERY,
        "checkpoint.keep-last": 9,
        "preview.every": 4,
        "preview.num-inference-steps": 2,
        "preview.guidance-scale": 2.0,
        "preview.per-caption": 2,
        "preview.sampler": "flow_euler",  # the base model's
        "preview.prompts": PROMPTS,
    } | {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    words = [preset]
    for name, value in values.items():
        words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return words


@pytest.fixture(scope="module")
def run(place):
    """A finished run."""
    assert train(options(place, place / "run")) == 0
    return place / "run"


def drawn(model, **options) -> np.ndarray:
    lora, weight = options.pop("lora", None), options.pop("weight", 1.0)
    pipeline = SanaPipeline.from_pretrained(model)
    if lora is not None:
        pipeline.load_lora_weights(lora, weights=weight)
    return np.asarray(pipeline(PROMPTS, num_inference_steps=2, guidance_scale=2.0, output_type="np", **options).images)


# -- the run -----------------------------------------------------------------------------------------------------------


def test_previews_begin_with_the_base_models_pictures_and_change(place, run):
    pipeline = SanaPipeline.from_pretrained(place / "base")
    pictures = pipeline(PROMPTS * 2, num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    factor = automatic_enlargement(8, 8) // 2
    cells = [enlarge_image(to_pil(picture), factor) for picture in pictures]
    expected = np.asarray(image_grid(cells, 2, ["seven", "zero"] * 2), np.int64)
    assert expected.std() > 20
    assert np.abs(pixels(run, 0).astype(np.int64) - expected).max() <= 1
    assert np.abs(pixels(run, STEPS).astype(np.int64) - expected).max() > 10
    assert np.isfinite([row["loss"] for row in rows(run)]).all()


def test_resume_is_exact(place, run, capfd):
    copy = place / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    (copy / "samples" / f"step_{STEPS:06d}.png").unlink()
    (copy / FILE).unlink()
    status, out, err = call(capfd, "--resume", str(copy))
    assert status == 0, err
    assert f"resumed at step {SAVE_EVERY} of {STEPS}" in out
    assert_same_run(copy, run, STEPS)
    assert (copy / FILE).read_bytes() == (run / FILE).read_bytes()
    assert not left_behind(copy)


def test_the_checkpoint_holds_the_lora_alone(run):
    state = saved_state(run, STEPS)
    assert {name.split("/")[1] for name in state if name.startswith("params/")} == {"lora"}
    assert all(name.rpartition("/")[2] in ("down", "up") for name in state if name.startswith("params/"))
    assert saved_steps(run) == [SAVE_EVERY, STEPS]


# -- what it leaves ----------------------------------------------------------------------------------------------------


def test_run_file_and_exports_draw_the_same(place, run, tmp_path, capsys):
    base, expected = drawn(place / "base"), drawn(run)
    assert np.abs(expected - base).max() > 0.05
    np.testing.assert_allclose(drawn(place / "base", lora=run / FILE), expected, atol=1e-6)
    assert drawn(place / "base", lora=run / FILE, weight=0.0).tobytes() == base.tobytes()
    assert "from diffusers" not in (run / CARD).read_text()  # which cannot open a training run

    assert convert(["export", str(run), str(tmp_path / "only"), "--lora", "only"]) == 0
    newest = f"samples/step_{STEPS:06d}.png"
    assert sorted(path.name for path in (tmp_path / "only").iterdir()) == [CARD, FILE, "samples"]
    assert (tmp_path / "only" / newest).read_bytes() == (run / newest).read_bytes()
    assert str(place).encode() not in (run / FILE).read_bytes()  # which is for others to read
    ours, exported = (SafetensorsSource(folder / FILE) for folder in (run, tmp_path / "only"))
    assert list(ours.tensors) == list(exported.tensors)
    assert all(ours.read(name).tobytes() == exported.read(name).tobytes() for name in ours.tensors)

    capsys.readouterr()
    assert convert(["export", str(run), str(tmp_path / "merged"), "--lora", "merged"]) == 0
    assert "contract:" not in capsys.readouterr().out  # whose sizes are those of published autoencoders
    np.testing.assert_allclose(drawn(tmp_path / "merged"), expected, atol=1e-4)
    assert convert(["import", str(tmp_path / "merged"), str(tmp_path / "imported")]) == 0
    np.testing.assert_allclose(drawn(tmp_path / "imported"), expected, atol=1e-4)


def test_an_exported_card_is_that_of_its_checkpoint(run, tmp_path):
    assert f"| Steps | {STEPS} |" in (run / CARD).read_text()
    words = ["export", str(run), str(tmp_path / "early"), "--lora", "only", "--checkpoint-step", str(SAVE_EVERY)]
    assert convert(words) == 0
    card = (tmp_path / "early" / CARD).read_text()
    assert f"| Steps | {SAVE_EVERY} |" in card
    assert [path.name for path in (tmp_path / "early" / "samples").iterdir()] == [f"step_{SAVE_EVERY:06d}.png"]
    assert f"(<samples/step_{SAVE_EVERY:06d}.png>)" in card
    assert f"step_{STEPS:06d}" not in card


def test_the_command_line_draws_the_same(place, run, tmp_path):
    common = ["--prompt", PROMPTS[0], "--steps", "2", "--seed", "5"]
    commands = {
        "run": ["--model", str(run)],
        "file": ["--model", str(place / "base"), "--lora", str(run / FILE)],
        "off": ["--model", str(place / "base"), "--lora", f"{run / FILE}:0"],
        "base": ["--model", str(place / "base")],
    }
    found = {}
    for name, words in commands.items():
        generate([*words, *common, "--guidance-scale", "2", "--output", str(tmp_path / f"{name}.png")])
        found[name] = np.asarray(Image.open(tmp_path / f"{name}.png"), np.int64)
    assert np.abs(found["run"] - found["file"]).max() <= 1
    np.testing.assert_array_equal(found["off"], found["base"])
    assert np.abs(found["run"] - found["base"]).max() > 10


# -- base models that have moved, changed or gone ----------------------------------------------------------------------


@pytest.fixture
def moved(place, run, tmp_path):
    """Copies of base model and run, in which the run's path of its base is the copy's: (base, run)."""
    base, copy = tmp_path / "models" / "base", tmp_path / "models" / "run"
    shutil.copytree(place / "base", base)
    shutil.copytree(run, copy)
    for name in ("base_model.json", "config.json"):
        values = json.loads((copy / name).read_text())
        values |= {"model": str(base)} | ({"path": str(base)} if name == "base_model.json" else {})
        (copy / name).write_text(json.dumps(values))
    return base, copy


def test_a_run_that_was_moved(run, tmp_path, capfd):
    shutil.copytree(run, tmp_path / "elsewhere")
    assert drawn(tmp_path / "elsewhere").tobytes() == drawn(run).tobytes()
    status, out, err = call(capfd, "--resume", str(tmp_path / "elsewhere"))
    assert status == 0, err
    assert "nothing left to do" in out


def test_a_base_model_that_was_moved_together_with_its_run(run, moved, tmp_path, capfd):
    (tmp_path / "models").rename(tmp_path / "others")
    assert drawn(tmp_path / "others" / "run").tobytes() == drawn(run).tobytes()
    status, out, err = call(capfd, "--resume", str(tmp_path / "others" / "run"))
    assert status == 0, err
    assert "nothing left to do" in out


def test_a_base_model_that_is_gone(moved, capfd):
    base, copy = moved
    shutil.rmtree(base)
    with pytest.raises(FileNotFoundError, match=f"beside the base model {base}, which is neither at {base} nor"):
        SanaPipeline.from_pretrained(copy)
    status, _, err = call(capfd, "--resume", str(copy))
    assert status == 2, err
    assert str(base) in the_error(err)


def test_a_base_model_whose_weights_are_others(moved, capfd):
    base, copy = moved
    config = tiny_config(patch_size=2, qk_norm="rms_norm_across_heads", timestep_scale=0.001)
    shutil.rmtree(base)
    write_run(base, random_params(config, 3), random_params(config, 4), config)
    with pytest.raises(UserError, match=r"was trained beside .* with weights .* there are weights"):
        SanaPipeline.from_pretrained(copy)
    status, _, err = call(capfd, "--resume", str(copy))
    assert status == 2, err
    assert "there are weights" in the_error(err)


def test_training_does_not_start_from_a_loras_run(place, run, tmp_path, capfd):
    status, _, err = call(capfd, *options(place, tmp_path / "run", model=run))
    assert status == 2
    assert "training starts from whole models" in the_error(err)
    # what is advised leads there
    advised = re.search(r"\(python -m convert\.main (export .* DIR --lora merged)\)", the_error(err))
    words = [str(tmp_path / "merged") if word == "DIR" else word for word in advised[1].split()]
    assert convert(words) == 0
    status, _, err = call(capfd, *options(place, tmp_path / "run", model=tmp_path / "merged", steps=1))
    assert status == 0, err


def test_a_lora_beside_a_run_that_leans_on_a_model_is_put_into_it_in_python():
    """Of such a base an export has the transformer alone, from which training does not start."""
    base = SimpleNamespace(trained_from=SimpleNamespace(kind="whole"))
    parts = SimpleNamespace(trained_from=SimpleNamespace(kind="lora"), base=base)
    advice = _whole_with_lora("runs/lora", "SanaPipeline", parts)
    assert "sana_jax.SanaPipeline.from_pretrained('runs/lora', dtype='float32'); pipe.fuse_lora(); pipe.save" in advice
    parts.trained_from.kind = "controlnet"
    assert not _whole_with_lora("runs/controlnet", "SanaPipeline", parts)


# -- DreamBooth --------------------------------------------------------------------------------------------------------


@pytest.mark.prove
def test_dreambooth_draws_its_class_once(place, tmp_path, capfd):
    folder = tmp_path / "class"
    prior = {"prior.caption": PROMPTS[1], "prior.path": folder, "prior.pictures": 3, "prior.num-inference-steps": 2}
    changes = {"steps": 4, **prior, "data.cache": tmp_path / "cache"}
    status, out, err = call(capfd, *options(place, tmp_path / "first", "dreambooth", **changes))
    assert status == 0, err
    assert "the base model draws 3 more" in out
    pictures = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert len(pictures) == 3
    base = SanaPipeline.from_pretrained(place / "base")
    for name in pictures:
        with Image.open(folder / name) as picture:
            expected = base(PROMPTS[1], seed=int(picture.info["seed"]), num_inference_steps=2).images[0]
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))

    status, out, err = call(capfd, *options(place, tmp_path / "second", "dreambooth", **changes))
    assert status == 0, err
    assert "the base model draws" not in out
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == pictures
    assert_same_run(tmp_path / "second", tmp_path / "first", 4)
