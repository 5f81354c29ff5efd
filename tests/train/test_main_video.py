"""Clips through the trainer: moving digits, a LoRA of a video model, pictures between clips."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from sana_jax import SanaImageToVideoPipeline, SanaVideoPipeline
from sana_jax.errors import UserError
from sana_jax.generate import main as generate
from sana_jax.models.sana_video import SanaVideoConfig
from sana_jax.videos import read_video
from tests.train.data.video.clip_files import write_video
from tests.train.run_training import (
    assert_same_run,
    cache_directory,
    call,
    in_this_process,
    left_behind,
    pixels,
    rows,
    saved_state,
)
from train.compare import main as compare
from train.main import main as train
from train.preview_clips import clip_table
from train.run_directory import read_config

STEPS, SAVE_EVERY = 4, 2
FILE, CARD = "pytorch_lora_weights.safetensors", "README.md"
OPTIONS = {
    "steps": STEPS,
    "optimizer.warmup-steps": 0,
    "optimizer.epsilon": 1e-3,
    "logging.every": 1,
    "logging.tensorboard": False,
    "checkpoint.every": SAVE_EVERY,
    "checkpoint.keep-last": 9,
    "preview.every": STEPS,
    "preview.num-inference-steps": 2,
    "preview.guidance-scale": 2.0,
}
DIGITS = {
    "transformer.num-layers": 2,
    "transformer.num-attention-heads": 2,
    "transformer.attention-head-dim": 8,
    "transformer.num-cross-attention-heads": 1,
    "transformer.cross-attention-head-dim": 16,
    "transformer.cross-attention-dim": 16,
    "data.digits": [3, 7],
    "data.frames": 3,
    "batch-size": 4,
    "optimizer.schedule": "constant",
    "preview.captions": 2,
    "validation.every": STEPS,
    "validation.samples": 4,
}


def words(preset: str, run_dir, *values: dict) -> list[str]:
    found = [preset, "--run-dir", str(run_dir)]
    for name, value in {key: value for part in (OPTIONS, *values) for key, value in part.items()}.items():
        if value is not None:
            found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return found


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    with in_this_process(cache_directory(tmp_path_factory)):
        yield


# -- moving digits -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    directory = tmp_path_factory.mktemp("moving") / "run"
    assert train(words("moving_digits", directory, DIGITS)) == 0
    return directory


def test_a_run_on_clips_is_a_video_model(digits, tmp_path, capsys):
    assert isinstance(read_config(digits).transformer, SanaVideoConfig)
    index = json.loads((digits / "model_index.json").read_text())
    assert index["_class_name"] == "SanaVideoPipeline"
    sizes = {name: index["defaults"][name] for name in ("frames", "height", "width", "fps")}
    assert sizes == {"frames": 3, "height": 12, "width": 12, "fps": 4.0}
    found = rows(digits)
    assert np.isfinite([row["loss"] for row in found]).all()
    assert all(row["clips_per_second"] > 0 for row in found)
    assert found[-1]["validation_loss"] > 0
    out = tmp_path / "clip.gif"
    generate([f"--model={digits}", "--prompt=a seven moving left", f"--output={out}", "--enlarge=1"])
    assert read_video(out).frames.shape == (3, 12, 12, 3)
    assert "3 frames" in capsys.readouterr().out


def test_previews_are_what_the_pipeline_draws(digits):
    captions = ["a three moving right", "a seven moving left"]
    pipeline = SanaVideoPipeline.from_pretrained(digits)
    clips = pipeline(captions, num_inference_steps=2, guidance_scale=2.0, output_type="np").frames
    expected = np.asarray(clip_table(clips, ["three moving right", "seven moving left"]), np.int64)
    assert expected.std() > 20
    found = pixels(digits, STEPS).astype(np.int64)
    assert np.abs(found - expected).max() <= 1
    moving = read_video(digits / "samples" / f"step_{STEPS:06d}.gif")
    assert len(moving.frames) == 3
    assert moving.fps == pytest.approx(4)
    assert not (digits / "samples" / f"step_{STEPS:06d}.mp4").exists()  # gray, and small


def test_an_image_begins_the_clip(digits):
    image = np.zeros((12, 12, 3), np.uint8)
    image[2:8, 3:6] = 255
    pipeline = SanaImageToVideoPipeline.from_pretrained(digits)
    frames = pipeline(Image.fromarray(image), "a seven moving left", output_type="np").frames[0]
    np.testing.assert_allclose(frames[0, ..., 0], image[..., 0] / 255, atol=1e-6)
    assert np.abs(frames[1] - frames[0]).max() > 0.1


def test_resume_is_exact(digits, capfd):
    copy = digits.with_name("copy")
    shutil.copytree(digits, copy)
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    for path in (copy / "samples").glob(f"step_{STEPS:06d}.*"):
        path.unlink()
    status, out, err = call(capfd, "--resume", str(copy))
    assert status == 0, err
    assert f"resumed at step {SAVE_EVERY} of {STEPS}" in out
    assert re.search(r"median \d+ clips/s", out)
    assert_same_run(copy, digits, STEPS)
    gif = f"samples/step_{STEPS:06d}.gif"
    assert (copy / gif).read_bytes() == (digits / gif).read_bytes()
    assert not left_behind(copy)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flow.image-to-video": 1.5}, "--flow.image-to-video 1.5 is not allowed; allowed is 0 to 1"),
        ({"flow.sampling-flow-shift": 0}, "--flow.sampling-flow-shift 0.0 is not allowed"),
        ({"data.embedding-dim": 8}, "--data.embedding-dim 8 is not allowed"),
        ({"data.frames": 1}, "--data.frames 1 is not allowed"),
    ],
)
def test_values_that_are_refused(tmp_path, values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        train(words("moving_digits", tmp_path / "run", values))


def test_pictures_know_nothing_of_clips(capsys):
    with pytest.raises(UserError, match=r"unknown option --flow\.image-to-video"):
        train(["digits", "--flow.image-to-video", "0.5"])
    with pytest.raises(SystemExit):
        train(["digits", "--help"])
    out = capsys.readouterr().out
    assert "--transformer.timestep-scale" in out
    assert "rope-max-seq-len" not in out


# -- a LoRA of a published model, and pictures between clips -----------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny random video model as diffusers saves it, two videos and two pictures."""
    from tests.parity import video_pipeline_oracle

    directory = tmp_path_factory.mktemp("lora")
    video_pipeline_oracle.save("video", directory / "base")
    (directory / "videos").mkdir()
    (directory / "pictures").mkdir()
    for number in range(2):
        write_video(directory / "videos" / f"{number}.mp4", 12, first=20 * number)
        picture = np.full((32, 64, 3), 90 * number + 40, np.uint8)
        Image.fromarray(picture).save(directory / "pictures" / f"{number}.png")
    return directory


def lora(place) -> dict:
    return {
        "model": place / "base",
        "data.path": place / "videos",
        "data.cache": place / "cache",
        "data.caption": "a red panda",
        "data.clip-frames": 5,
        "data.clip-fps": 10,
        "data.clip-size": [32, 64],
        "batch-size": 2,
        "compute.dtype": "float32",
        "compute.remat": "none",
        "lora.rank": 2,
        "lora.alpha": 4,
        "lora.dropout": 0.1,
        "lora.targets": "all_linear",
        "flow.image-to-video": 0.5,
        "optimizer.learning-rate": 3e-2,
        "preview.seed": 5,
    }


@pytest.fixture(scope="module")
def tuned(place):
    assert train(words("lora_video", place / "run", lora(place))) == 0
    return place / "run"


def drawn(model, **options) -> np.ndarray:
    pipeline = SanaVideoPipeline.from_pretrained(model)
    if file := options.pop("lora", None):
        pipeline.load_lora_weights(file)
    size = {"height": 32, "width": 64, "frames": 5, "binning": "off", "num_inference_steps": 2, "guidance_scale": 2.0}
    return np.asarray(pipeline("a red panda", seed=5, output_type="np", **size, **options).frames)


@pytest.mark.prove
def test_a_lora_of_a_video_model(place, tuned):
    base, expected = drawn(place / "base"), drawn(tuned)
    first, last = pixels(tuned, 0).astype(np.int64), pixels(tuned, STEPS).astype(np.int64)
    assert np.abs(first - np.asarray(clip_table(base, ["a red panda"]), np.int64)).max() <= 1
    assert np.abs(last - np.asarray(clip_table(expected, ["a red panda"]), np.int64)).max() <= 1
    assert np.abs(expected - base).max() > 0.02
    np.testing.assert_allclose(drawn(place / "base", lora=tuned / FILE), expected, atol=1e-5)
    assert {name.split("/")[1] for name in saved_state(tuned, STEPS) if name.startswith("params/")} == {"lora"}
    assert read_video(tuned / "samples" / f"step_{STEPS:06d}.mp4").frames.shape == (5, 32, 64, 3)
    flow = read_config(tuned).flow
    assert (flow.flow_shift, flow.sampling_flow_shift) == (3.0, 8.0)


@pytest.mark.prove
def test_the_card_speaks_of_clips(tuned):
    card = (tuned / CARD).read_text()
    assert "pipeline_tag: text-to-video" in card
    assert "from diffusers import SanaVideoPipeline" in card
    assert "| clips | 5 frames of 32x64 pixels, 10 per second |" in card
    assert "4 clips" in card


@pytest.mark.prove
def test_diffusers_loads_the_lora(tuned):
    from tests.parity import video_pipeline_oracle

    pipeline = video_pipeline_oracle.make_pipeline("video")
    pipeline.load_lora_weights(str(tuned), weight_name=FILE)
    changed = {name for name, module in pipeline.transformer.named_modules() if hasattr(module, "lora_A")}
    assert len(changed) == 2 * 8 + 6  # two blocks' attentions; embeddings, projections and the output


@pytest.mark.prove
def test_a_whole_model_with_pictures_between_clips(place, tmp_path, capfd):
    whole = {name: value for name, value in lora(place).items() if not name.startswith(("lora.", "preview."))}
    values = {
        "data.joint-interval": 2,
        "data.joint-pictures": place / "pictures",
        "data.joint-batch-size": 4,
        "data.joint-caption": "a gray wall",
        "optimizer.learning-rate": 1e-3,
        "preview.every": 0,
    }
    status, out, err = call(capfd, *words("finetune_video", tmp_path / "run", whole, values))
    assert status == 0, err
    assert "compiled the train step for latents 2x2x4x8x4" in out
    assert "compiled the train step for latents 4x1x4x8x4" in out
    assert "one step in 2 has 4 pictures as clips of one frame" in out
    assert np.isfinite([row["loss"] for row in rows(tmp_path / "run")]).all()
    assert np.abs(drawn(tmp_path / "run") - drawn(place / "base")).max() > 0.005


def test_a_comparison_shows_clips(digits, tmp_path):
    prompts = ["a three moving up", "a seven moving left"]
    steps = [str(SAVE_EVERY), str(STEPS)]
    output = tmp_path / "seen"
    compare([str(digits), "--prompts", *prompts, "--checkpoint-steps", *steps, "--output", str(output), "--strip"])
    moving, still = (sorted((output / "pictures").glob(f"*.{kind}")) for kind in ("gif", "png"))
    assert [path.stem for path in moving] == [path.stem for path in still]
    assert len(moving) == 4
    assert {len(read_video(path).frames) for path in moving} == {3}
    page = (output / "comparison.html").read_text()
    assert page.count("data:image/gif") == 4
    assert len(list((output / "strips").glob("*.png"))) == 2
