"""A ControlNet through the trainer: the start, its control pictures, exact resume, the pipeline, exports."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from convert.main import main as convert
from sana_jax.errors import UserError
from sana_jax.generate import main as generate
from sana_jax.images import automatic_enlargement, enlarge_image, image_grid, to_pil
from sana_jax.pipelines.controlnet import SanaControlNetPipeline
from sana_jax.pipelines.text_to_image import SanaPipeline
from tests.kernels.shapes import relative_error
from tests.pipelines.tiny_model import random_params, tiny_config, write_run
from tests.prove.edges import edges_of
from tests.train.run_training import (
    assert_same_run,
    cache_directory,
    call,
    in_this_process,
    left_behind,
    pixels,
    rows,
    saved_state,
    the_error,
)
from train.example_pictures import main as write_pictures
from train.main import main as train

STEPS, SAVE_EVERY = 6, 3
PROMPT = "a handwritten seven"


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    with in_this_process(cache_directory(tmp_path_factory)):
        yield


def write_base(directory, **changes):
    config = tiny_config(patch_size=2, **changes)
    write_run(directory, random_params(config, 1), random_params(config, 2), config)
    return directory


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a few pictures and a base model whose every parameter acts."""
    directory = tmp_path_factory.mktemp("controlnet")
    write_pictures([str(directory / "pictures"), "--digits", "7", "--count", "6", "--style", "plain"])
    write_base(directory / "base")
    return directory


def options(place, run_dir, **changes) -> list[str]:
    """The preset's options for a run of a few steps."""
    values = {
        "model": place / "base",
        "run-dir": run_dir,
        "data.path": place / "pictures",
        "data.cache": place / "cache",
        "controlnet.num-layers": 1,
        "steps": STEPS,
        "batch-size": 4,
        "compute.dtype": "float32",
        "compute.remat": "none",
        "optimizer.learning-rate": 3e-2,
        "optimizer.warmup-steps": 0,
        "optimizer.epsilon": 1e-6,
        "optimizer.clip-norm": 1,
        "ema.decay": 0.5,
        "logging.every": 1,
        "checkpoint.every": SAVE_EVERY,
        "preview.every": STEPS,
        "preview.captions": 3,
        "preview.per-caption": 2,
        "preview.num-inference-steps": 2,
        "preview.guidance-scale": 2.0,
        "preview.sampler": "flow_euler",  # the base model's
    } | {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return ["controlnet", *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def run(place):
    """A finished run."""
    assert train(options(place, place / "run")) == 0
    return place / "run"


def control_pictures(place) -> list[Image.Image]:
    """The edges of the pictures in the previews: the first, one in the middle, the last."""
    names = sorted(path for path in (place / "pictures").glob("*.png"))
    chosen = np.linspace(0, len(names) - 1, 3).round().astype(int)
    edges = edges_of(np.stack([np.asarray(Image.open(names[index])) for index in chosen]))
    return [Image.fromarray(np.repeat(np.uint8(255 * one)[..., None], 3, axis=-1)) for one in edges]


def drawn(pipeline, count: int = 6, **options) -> np.ndarray:
    fixed = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
    return np.asarray(pipeline([PROMPT] * count, **fixed, **options).images)


def grid(control, pictures) -> np.ndarray:
    cells = [to_pil(picture) for picture in [*(np.asarray(one)[..., :1] / 255 for one in control), *pictures]]
    cells = [enlarge_image(cell, automatic_enlargement(8, 8) // 2) for cell in cells]
    return np.asarray(image_grid(cells, 3, ["control"] * 3 + [PROMPT] * 6), np.int64)


def test_previews_show_the_control_pictures_and_begin_with_the_base_models(place, run):
    control = control_pictures(place)
    assert len({picture.tobytes() for picture in control}) == 3
    expected = grid(control, drawn(SanaPipeline.from_pretrained(place / "base")))
    assert np.abs(pixels(run, 0).astype(np.int64) - expected).max() <= 1
    assert np.abs(pixels(run, STEPS).astype(np.int64) - expected).max() > 10
    height = expected.shape[0] // 3  # of a row of the grid
    np.testing.assert_array_equal(pixels(run, STEPS)[:height], pixels(run, 0)[:height])
    assert np.isfinite([row["loss"] for row in rows(run)]).all()


def test_the_pipeline_draws_what_the_preview_shows(place, run, tmp_path):
    control = control_pictures(place)
    pipeline = SanaControlNetPipeline.from_pretrained(run)
    pictures = drawn(pipeline, control_image=control * 2)
    assert np.abs(pixels(run, STEPS).astype(np.int64) - grid(control, pictures)).max() <= 1
    other = drawn(pipeline, control_image=control[1:] + control[:1] + control[1:] + control[:1])
    assert np.abs(other - pictures).max() > 0.02
    base = drawn(SanaPipeline.from_pretrained(place / "base"))
    off = drawn(pipeline, control_image=control * 2, controlnet_conditioning_scale=0.0)
    assert relative_error(off, base) <= 1e-6

    control[0].save(tmp_path / "edges.png")
    command = ["--model", str(run), "--prompt", PROMPT, "--control-image", str(tmp_path / "edges.png")]
    generate([*command, "--steps", "2", "--output", str(tmp_path / "seven.png"), "--enlarge", "1"])
    found = np.asarray(Image.open(tmp_path / "seven.png"), np.float64) / 255
    assert np.abs(found - pictures[0, ..., 0]).max() <= 1.01 / 255


def test_a_control_picture_that_is_too_small(run):
    with pytest.raises(UserError, match="control_image of 7x8 pixels is too small; allowed is 8 or more"):
        SanaControlNetPipeline.from_pretrained(run)(PROMPT, control_image=Image.new("RGB", (8, 7)))


def test_resume_is_exact(place, run, capfd):
    copy = place / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    (copy / "samples" / f"step_{STEPS:06d}.png").unlink()
    status, out, err = call(capfd, "--resume", str(copy))
    assert status == 0, err
    assert f"resumed at step {SAVE_EVERY} of {STEPS}" in out
    assert_same_run(copy, run, STEPS)
    assert not left_behind(copy)


def test_the_checkpoint_holds_the_controlnet_alone(run):
    names = {name.split("/")[1] for name in saved_state(run, STEPS) if name.startswith("params/")}
    assert {"controlnet_blocks", "input_block", "transformer_blocks"} <= names
    assert not {"proj_out", "scale_shift_table"} & names


@pytest.mark.parametrize("kind", ["soft_edges", "scribble"])
def test_other_edges(place, tmp_path, kind, capfd):
    changes = {"data.conditions": f"control={kind}", "data.cache": tmp_path / "cache", "steps": 2}
    status, _, err = call(capfd, *options(place, tmp_path / "run", **changes))
    assert status == 0, err
    changes["data.conditions"] = "control=picture"  # of which the folder has none
    status, _, err = call(capfd, *options(place, tmp_path / "other", **changes | {"data.cache": tmp_path / "none"}))
    assert status == 2
    assert "has no control" in err


# -- for diffusers -----------------------------------------------------------------------------------------------------


def with_settings(run, tmp_path, **changes):
    """A copy of a run that says something else of its ControlNet."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, dirs_exist_ok=True)
    values = json.loads((copy / "base_model.json").read_text())
    values["settings"]["controlnet"] |= changes
    (copy / "base_model.json").write_text(json.dumps(values))
    return copy


def test_what_diffusers_has_no_place_for(run, tmp_path, capsys):
    copy = with_settings(run, tmp_path, qk_norm="rms_norm_across_heads")
    with pytest.raises(UserError, match=r"q/k norms .* SanaControlNetModel has no place for"):
        convert(["export", str(copy), str(tmp_path / "exported")])
    with pytest.raises(UserError, match=r"describes no ControlNet .*nonsense"):
        convert(["export", str(with_settings(run, tmp_path, nonsense=1)), str(tmp_path / "exported")])
    assert not (tmp_path / "exported").exists()

    copy = tmp_path / "scaled"
    shutil.copytree(run, copy)
    config = json.loads((copy / "transformer" / "config.json").read_text())
    (copy / "transformer" / "config.json").write_text(json.dumps(config | {"timestep_scale": 0.001}))
    assert convert(["export", str(copy), str(tmp_path / "exported")]) == 0
    assert "timesteps times 0.001" in capsys.readouterr().out


def test_export_loads_in_diffusers_with_equal_outputs(place, run, tmp_path, capsys):
    import torch
    from diffusers import SanaControlNetModel

    assert convert(["export", str(run), str(tmp_path / "exported")]) == 0
    assert "left out: the base model" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "exported").iterdir()] == ["controlnet"]
    theirs, info = SanaControlNetModel.from_pretrained(tmp_path / "exported" / "controlnet", output_loading_info=True)
    assert not any(info.values())
    model = SanaControlNetPipeline.from_pretrained(run)
    ours, params = model.controlnet, model.controlnet_weights.params
    rng = np.random.default_rng(0)
    latents, control = rng.standard_normal((2, 2, 8, 6, 1)).astype(np.float32)
    text, timestep = rng.standard_normal((2, 5, 12)).astype(np.float32), np.array([10.0, 700.0], np.float32)
    with jax.default_matmul_precision("highest"):
        found = ours.apply({"params": params}, latents, control, text, timestep)
    to_torch = [torch.from_numpy(array.transpose(0, 3, 1, 2).copy()) for array in (latents, control)]
    with torch.no_grad():
        (expected,) = theirs.eval()(
            to_torch[0], torch.from_numpy(text), torch.from_numpy(timestep), to_torch[1], return_dict=False
        )
    expected = np.stack([part.numpy() for part in expected])
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())

    # and beside the base model it is the run
    beside = SanaControlNetPipeline.from_pretrained(place / "base", controlnet=tmp_path / "exported" / "controlnet")
    picture = control_pictures(place)[:1]
    np.testing.assert_allclose(
        drawn(beside, 1, control_image=picture), drawn(model, 1, control_image=picture), atol=1e-6
    )


def test_a_base_model_of_few_steps(place, tmp_path, capfd):
    write_base(tmp_path / "base", guidance_embeds=True)
    status, _, err = call(capfd, *options(place, tmp_path / "run", model=tmp_path / "base"))
    assert status == 2
    assert "for which there is no ControlNet" in the_error(err)
