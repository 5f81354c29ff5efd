"""``python -m sana_jax.generate`` with published models of every kind."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from sana_jax import generate
from sana_jax.errors import run_command_line
from sana_jax.pipelines.base_model_file import BaseModelFile
from sana_jax.weights.identity import weights_id
from tests.parity.pipeline_oracle import picture

HEIGHT, WIDTH = 64, 96
SIZE = ("--height", HEIGHT, "--width", WIDTH, "--binning", "off")
QUICK = ("--prompt", "a red panda", "--max-sequence-length", 8, "--instruction", "none", "--enlarge", 1)


@pytest.fixture(autouse=True, scope="module")
def _everything_is_cached():
    """So that a second program of the same shapes is not compiled again."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture
def photo(tmp_path):
    (tmp_path / "in").mkdir()
    picture(HEIGHT, WIDTH).save(tmp_path / "in" / "photo.png")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, :40] = 255
    Image.fromarray(mask).save(tmp_path / "in" / "mask.png")
    return tmp_path / "in" / "photo.png"


def call(*words) -> int:
    with pytest.raises(SystemExit) as caught:
        run_command_line(lambda: generate.main([str(word) for word in words]))
    return caught.value.code


def text_of(path) -> dict[str, str]:
    with Image.open(path) as image:
        return dict(image.text)


def test_text_to_image_twice(published, tmp_path, capsys):
    """The same bytes; what is said, in order; what the file says."""
    model, paths = published("sana-1.0"), [tmp_path / "one.png", tmp_path / "two.png"]
    words = (*QUICK, *SIZE, "--model", model, "--steps", 2, "--seed", 3, "--guidance-scale", 4)
    said = []
    for path in paths:
        assert call(*words, "--negative-prompt", "blurry", "--output", path) == 0
        said.append(capsys.readouterr().out.splitlines())
    assert paths[0].read_bytes() == paths[1].read_bytes()
    starts = ["model: ", "prompt: ", "sampling: ", "in memory: text: text encoder", "in memory: denoise: transformer"]
    starts += ["in memory: decode: transformer"]
    for lines in said:
        assert [line[: len(start)] for line, start in zip(lines, starts)] == starts
        compiling = [line for line in lines[len(starts) : -2] if not line.startswith("guidance: ")]
        assert len(compiling) >= len(lines) - len(starts) - 3
        assert all(
            line.startswith(("compiling the t", "compiled the t", "compiling DC", "compiled DC")) for line in compiling
        )
        assert lines[-2].startswith("sampled in ")
        assert "text " in lines[-2]
        assert lines[-1].startswith("picture: ")
        for part in ("1 x 64x96 pixels", "2 steps of DPMSolver", "guidance 4", "seed 3", "float32 on cpu"):
            assert part in lines[2]
    expected = {
        "prompt": "a red panda",
        "negative_prompt": "blurry",
        "seed": "3",
        "steps": "2",
        "guidance_scale": "4.0",
        "model": str(model),
        "checkpoint_id": weights_id(model / "transformer"),
        "sampled_size": "64x96",
        "binning": "off",
        "instruction": "none",
        "max_sequence_length": "8",
    }
    found = text_of(paths[0])
    assert expected.items() <= found.items()
    assert found["sampler"].startswith("DPMSolver(flow_shift=3.0")
    with Image.open(paths[0]) as image:
        assert image.size == (WIDTH, HEIGHT)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["one.png", "two.png"]


KINDS = {
    "pag": (
        "pag",
        ("--pag-scale", 3, "--pag-layers", 1, "--steps", 1, *SIZE),
        {"pag_scale": "3.0", "pag_layers": "(1,)"},
    ),
    "sprint from a picture": (
        "sprint",
        ("--timesteps", 1.5, 1.0, 0, "--image", "PHOTO", "--binning", "off"),
        {"timesteps": "(1.5, 1.0, 0.0)", "steps": "2", "image": "PHOTO"},
    ),
    "controlnet": (
        "controlnet",
        ("--control-image", "PHOTO", "--control-scale", 0.5, "--steps", 1, *SIZE),
        {"control_image": "PHOTO", "control_scale": "0.5"},
    ),
    "controlnet of its own": (
        "sana-1.0",
        ("--controlnet", "CONTROLNET", "--control-image", "PHOTO", "--steps", 1, *SIZE),
        {"controlnet": "CONTROLNET"},
    ),
    "inpainting": (
        "sana-1.0",
        (
            "--image",
            "PHOTO",
            "--mask",
            "MASK",
            "--strength",
            1,
            "--steps",
            1,
            "--binning",
            "off",
            "--guidance-scale",
            1,
        ),
        {"strength": "1.0", "mask": "MASK"},
    ),
}


@pytest.mark.parametrize("case", KINDS)
def test_every_kind(published, tmp_path, photo, capsys, case):
    kind, words, metadata = KINDS[case]
    names = {"PHOTO": str(photo), "MASK": str(photo.with_name("mask.png"))}
    if "CONTROLNET" in words:
        names["CONTROLNET"] = str(published("controlnet"))
    words = [names.get(word, word) for word in words]
    path = tmp_path / "out.png"
    assert call(*QUICK, *words, "--model", published(kind), "--output", path, "--low-memory") == 0
    out = capsys.readouterr().out
    plan = [line.removeprefix("in memory: ") for line in out.splitlines() if line.startswith("in memory: ")]
    stages = ["text", *(["encode"] if str(photo) in words else []), "denoise", "decode"]
    assert [line.partition(":")[0] for line in plan] == stages
    assert ("together" in plan[-2]) == ("controlnet" in case)  # one network at a time, and its ControlNet
    assert "transformer" not in plan[-1]
    found = text_of(path)
    assert {name: names.get(value, value) for name, value in metadata.items()}.items() <= found.items()
    with Image.open(path) as image:
        assert image.size == (WIDTH, HEIGHT)
        pixels = np.asarray(image, int)
    if case == "inpainting":
        assert f"strength 1 where {names['MASK']} is white" in out
        np.testing.assert_array_equal(pixels[:, 40:], np.asarray(Image.open(photo), int)[:, 40:])
        assert (pixels[:, :40] != np.asarray(Image.open(photo), int)[:, :40]).any(axis=-1).mean() > 0.9


MISTAKES = [
    ("sana-1.0", ("--timesteps", 1, 0), ("--timesteps would not be used by SanaPipeline", "choose another model")),
    ("sana-1.0", ("--control-image", "PHOTO"), ("--control-image would not be used by SanaPipeline",)),
    ("sana-1.0", ("--control-scale", 0.5), ("--control-scale would not be used without --control-image",)),
    ("sana-1.0", ("--controlnet", "nowhere", "--control-image", "PHOTO"), ("nowhere",)),
    ("sana-1.0", ("--controlnet", "nowhere"), ("--controlnet", "without --control-image")),
    ("sprint", ("--negative-prompt", "a"), ("--negative-prompt would not be used by SanaSprintPipeline",)),
    ("sprint", ("--pag-scale", 3, "--image", "PHOTO", "--mask", "PHOTO"), ("--mask, --pag-scale would not be used",)),
    ("sprint", ("--guidance-interval", 0, 1), ("--guidance-interval would not be used",)),
    ("sprint", ("--timesteps", 1.5, 0), ("2 timesteps do not make 2 steps",)),
    ("controlnet", (), ("--control-image is missing",)),
    ("sana-1.0", ("--controlnet", "MODEL", "--control-image", "PHOTO"), ("is a model directory and no ControlNet;",)),
    ("controlnet", ("--controlnet", "MODEL", "--control-image", "PHOTO"), ("has a ControlNet of its own",)),
    ("sana-1.0", ("--strength", 0.5), ("--strength would not be used without --image",)),
    ("sana-1.0", ("--mask", "PHOTO"), ("--mask would not be used without --image",)),
    ("sana-1.0", ("--image", "PHOTO", "--strength", 0), ("strength 0",)),
    ("sana-1.0", ("--image", "PHOTO", "--strength", "nan"), ("strength nan",)),
    ("sana-1.0", ("--image", "nowhere.png"), ("image nowhere.png is not a file",)),
    ("sana-1.0", ("--image", "MODEL"), ("is not a file",)),
    ("sana-1.0", ("--image", "MODEL/model_index.json"), ("is not a picture",)),
    ("sana-1.0", ("--image", "PHOTO", "--mask", "nowhere.png"), ("--mask nowhere.png is not a file",)),
    ("sana-1.0", ("--steps", 0), ("--steps 0",)),
    ("sana-1.0", ("--steps", -1), ("--steps -1",)),
    ("sana-1.0", ("--height", 70), ("height 70", "64 or 96")),
    ("sana-1.0", ("--height", 70, "--binning", "error"), ("size 70x1024", "nearest")),
    ("sana-1.0", ("--binning", "closest"), ("--binning", "nearest, off, error")),
    ("sana-1.0", ("--pag-layers", 1), ("--pag-scale 0",)),
    ("sana-1.0", ("--pag-scale", 3), ("--pag-layers", "0 to 2")),
    ("sana-1.0", ("--weights", "ema"), ("is not a training run",)),
    ("sana-1.0", ("--checkpoint-step", 7), ("is not a training run",)),
    ("sana-1.0", ("--variant", "fp16"), ("fp16",)),
    ("sana-1.0", ("--flow-shift", 0), ("--flow-shift 0 must be a positive number", "the model's own, 3\n")),
    ("sana-1.0", ("--flow-shift", "nan"), ("--flow-shift nan",)),
    ("sana-1.0", ("--dtype", "float16"), ("--dtype", "float32, bfloat16")),
    ("sana-1.0", ("--lora-merge",), ("--lora-merge would not be used without --lora",)),
    ("sana-1.0", ("--prompt", "  "), ("is empty",)),
    ("sana-1.0", ("--max-sequence-length", 1), ("--max-sequence-length 1",)),
    ("sana-1.0", ("--output", "OUT/out.jpg"), ("out.jpg", ".png")),
]


@pytest.mark.parametrize(("kind", "words", "parts"), MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(published, tmp_path, photo, capsys, kind, words, parts):
    model, output = published(kind), tmp_path / "out"
    output.mkdir()
    names = {"PHOTO": photo, "MODEL": model, "MODEL/model_index.json": model / "model_index.json"}
    names["OUT/out.jpg"] = output / "out.jpg"
    options = {"--model": model, "--prompt": "a red panda", "--output": output / "out.png", "--binning": "off"}
    rest = [word for name, value in options.items() if name not in words for word in (name, value)]
    capsys.readouterr()  # of the library that wrote the model
    assert call(*(names.get(word, word) for word in words), *rest) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error
    assert not list(output.iterdir())


def test_a_training_run_does_not_take_what_it_cannot_use(run, tmp_path, capsys):
    for words in (("--instruction", "none"), ("--variant", "bf16")):
        assert call("--model", run.directory, "--prompt", "a zero", "--output", tmp_path / "out.png", *words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words[0].strip("-") in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["whole", "controlnet"])
def test_a_training_run_is_no_controlnet(run, published, tmp_path, photo, capsys, kind):
    directory = run.directory
    if kind == "controlnet":
        directory = tmp_path / "c"
        BaseModelFile("controlnet", "m", "/m", "0").write(directory)
    words = ("--controlnet", directory, "--control-image", photo, "--output", tmp_path / "out.png")
    assert call("--model", published("sana-1.0"), "--prompt", "a", *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert len(error) < 160 + len(str(directory))
    said = {"whole": "is a training run and no ControlNet; name the", "controlnet": "name it as the model, and leave"}
    assert f"error: {directory} is a training run" in error
    assert said[kind] in error


def test_a_directory_without_weights(published, tmp_path, capsys):
    model = shutil.copytree(published("sana-1.0"), tmp_path / "model")
    (model / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert call("--model", model, "--prompt", "a", "--output", tmp_path / "out.png") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "has no weights" in error


def test_help_lists_every_option(capsys):
    assert call("--help") == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(generate.GenerateConfig):
        assert f"--{field.name.replace('_', '-')}" in text
