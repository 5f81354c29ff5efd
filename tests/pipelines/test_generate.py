"""``python -m sana_jax.generate``."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from configs import published
from kernels import selection
from sana_jax import devices, generate
from sana_jax.contract import hub_name_of
from sana_jax.errors import UserError, run_command_line

PROMPT = "a handwritten seven"


def call(*words) -> int:
    with pytest.raises(SystemExit) as caught:
        run_command_line(lambda: generate.main([str(word) for word in words]))
    return caught.value.code


def test_picture_and_what_is_said(run, pipe, tmp_path, capsys):
    path = tmp_path / "seven.png"
    assert call("--model", run.directory, "--prompt", PROMPT, "--out", path, "--seed", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == ["model", "prompt", "sampling"]
    assert "ema weights of step 7" in lines[0]
    assert "CC-BY-4.0" in lines[0]
    assert PROMPT in lines[1]
    for part in ("1 x 8x8 pixels", "3 steps of FlowEuler", "guidance 2.5", "seed 3", "float32 on cpu"):
        assert part in lines[2]
    assert "in memory: transformer" in lines[3]
    assert lines[4] == "compiling the transformer for latents 1x8x8x1 ..."
    assert "memory per device" in lines[5]
    assert lines[6].startswith("guidance: prompt and negative prompt in one batch")
    assert "sampled in" in lines[7]
    assert str(path) in lines[8]
    assert "enlarged 16 times from 8x8 to 128x128" in lines[8]
    with Image.open(path) as image:
        assert (image.mode, image.size) == ("L", (128, 128))
        np.testing.assert_array_equal(np.asarray(image)[::16, ::16], np.asarray(pipe(PROMPT, seed=3).images[0]))
        expected = {"prompt": PROMPT, "seed": "3", "steps": "3", "guidance_scale": "2.5", "weights": "ema"}
        assert expected.items() <= image.text.items()
        assert image.text["sampler"].startswith("FlowEuler")
        assert image.text["model"] == str(run.directory)
        assert image.text["license"] == "CC-BY-4.0"


def test_kernels_are_chosen_for_all_that_is_computed(run, tmp_path, capsys, monkeypatch):
    """Depthwise convolutions are the table's pick on a CPU, and XLA's own where that is asked for."""
    seen = set()
    plain = selection.preferred
    monkeypatch.setattr(
        selection, "preferred", lambda op, *rest: seen.add((op, plain(op, *rest), rest[-1])) or plain(op, *rest)
    )
    words = ("--model", run.directory, "--prompt", PROMPT, "--out", tmp_path / "out.png", "--steps", 1)
    assert call(*words, "--kernels", "xla") == 0
    assert ("depthwise_conv", "xla", "cpu") in seen
    assert all(form == "xla" for _, form, _ in seen)
    assert call(*words, "--kernels", "pallas") == 2
    assert "--kernels pallas has programs for cuda alone, and this runs on cpu; choose auto" in capsys.readouterr().err


def test_a_relative_path_and_words_without_quotes(run, tmp_path, capsys, monkeypatch):
    """As the README writes it; Orbax itself takes absolute paths only."""
    monkeypatch.chdir(run.directory.parent)
    words = ("--prompt", "a", "--prompt", "handwritten", "--out", tmp_path / "out.png", "--steps", 1)
    assert call("--model", run.directory.name, *words) == 0
    assert (
        '2 prompts of one word each; put a text of several words in quotes: --prompt "..."' in capsys.readouterr().out
    )


def test_options_reach_the_pipeline(run, tmp_path, capsys):
    path = tmp_path / "out.png"
    words = ["--prompt", PROMPT, "--output", path, "--steps", 2, "--guidance_scale", "1", "--height", 4, "--width", 6]
    words += ["--weights", "params", "--checkpoint-step", 7, "--dtype", "bfloat16", "--device", "cpu", "--enlarge", 1]
    assert call("--model", run.directory, *words) == 0
    text = capsys.readouterr().out
    for part in ("1 x 4x6 pixels", "2 steps", "guidance 1,", "params weights", "bfloat16"):
        assert part in text
    assert "enlarged" not in text
    with Image.open(path) as image:
        assert image.size == (6, 4)


def test_several_pictures_become_a_sheet(run, tmp_path, capsys):
    path = tmp_path / "out.png"
    words = ("--prompt", PROMPT, "--prompt", "a zero", "--num-images", 3, "--output", path, "--steps", 1)
    assert call("--model", run.directory, *words) == 0
    assert "a sheet of 6" in capsys.readouterr().out
    with Image.open(path) as image:
        assert image.size[0] >= 3 * 128
        assert 2 * 128 <= image.size[1] < 3 * 128
        assert image.text["prompt"] == str([PROMPT, "a zero"])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--prompt", "a nine"), ("'nine'", "handwritten")),
        (("--prompt", ""), ("is empty",)),
        (("--prompt",), ("--prompt has no value",)),
        (("--lora",), ("--lora has no value", "each a text")),
        (("--quantization",), ("--quantization has no value",)),
        (("--num-images", "0"), ("--num-images 0",)),
        (("--num-image", "2"), ("unknown option --num-image", "--num-images", "--help")),
        (("--steps", "few"), ("--steps", "'few'", "an integer")),
        (("--steps", "0"), ("--steps 0 is not allowed",)),
        (("--enlarge", "-1"), ("--enlarge -1",)),
        (("--output", "out.mp4"), ("'out.mp4'", "out.png")),
        (("--model", "nowhere"), ("nowhere", "train.main")),
        (("--weights", "best"), ("'best'", "auto, ema, params")),
        (("--dtype", "float16"), ("'float16'", "float32, bfloat16")),
        (("--checkpoint-step", "8"), ("step 8", "7")),
        (
            ("--negative-prompt", "a", "--guidance-scale", "1"),
            ("--negative-prompt", "not be used", "raise --guidance-scale"),
        ),
        (("--guidance-interval", "0.5"), ("--guidance-interval", "2 values")),
        (("--height", "-8"), ("height -8",)),
        (("--seed", "-1"), ("--seed -1",)),
        (("seven",), ("unexpected 'seven'",)),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, words, parts):
    options = {"--model": str(run.directory), "--prompt": PROMPT, "--output": str(tmp_path / "out.png")}
    rest = [word for name, value in options.items() if name not in words for word in (name, value)]
    assert call(*words, *rest) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there():
    import jax

    if jax.default_backend() == "gpu":
        assert devices.choose_device("gpu").platform == "gpu"
    else:
        with pytest.raises(UserError, match=r"--device gpu.*only cpu"):
            devices.choose_device("gpu")


def test_as_a_program(run):
    """Exit status and one line without a traceback, from a process of its own; help lists every option."""
    command = [sys.executable, "-m", "sana_jax.generate"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    options = ["--model", str(run.directory), "--prompt", "a nine", "--output", "x.png"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "'nine'" in done.stderr
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0
    for option in ("--model", "--prompt", "--output", "--num-images", "--guidance-scale", "--device", "--enlarge"):
        assert option in done.stdout


def test_library_imports_without_what_it_uses_late():
    """A bare machine has jax, flax, numpy, einops and safetensors only."""
    blocked = [
        "PIL",
        "av",
        "tqdm",
        "tyro",
        "orbax",
        "jaxtyping",
        "optax",
        "tensorboardX",
        "torch",
        "transformers",
        "sklearn",
    ]
    code = (
        "import sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "import sana_jax, sana_jax.generate, sana_jax.images, sana_jax.command_line, kernels\n"
        "from sana_jax import SanaPipeline\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_options_of_speed(run, tmp_path, capsys):
    """All steps in one call, fewer of them computed: what was skipped is said, and stands in the picture."""
    path = tmp_path / "seven.png"
    words = ("--model", run.directory, "--prompt", PROMPT, "--out", path, "--steps", 6, "--no-progress")
    assert call(*words, "--step-cache", 100, "--step-cache-error", "--guidance-batching", "batched") == 0
    out = capsys.readouterr()
    assert "guidance: prompt and negative prompt in one batch, as asked for" in out.out
    assert "step cache 100: 2 of 6 steps were computed; error against computing all of them: " in out.out
    assert "sampling:" not in out.err  # no progress bar
    with Image.open(path) as image:
        assert image.text["step_cache"] == "100.0"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--seed", "-1"), "--seed -1 is not allowed"),
        (("--steps", "0"), "--steps 0 is not allowed"),
        (("--step-cache", "-1"), "--step-cache -1 is not allowed"),
        (("--step-cache", "nan"), "--step-cache nan is not allowed"),
        (("--step-cache-error",), "--step-cache-error would not be used without --step-cache"),
        (("--strength", "0.5"), "--strength would not be used without --image"),
        (("--mask", "x.png"), "--mask would not be used without --image"),
        (("--image", "x.png"), "--image x.png is not a file"),
        (("--image", "photo.png", "--mask", "x.png"), "--mask x.png is not a file"),
        (("--image", "text.png"), "--image text.png is not a picture"),
        (("--control-image", "text.png"), "--control-image text.png is not a picture"),
        (("--lora", "x.safetensors:0.5"), "no LoRA file x.safetensors"),
        (("--c2w", "x.npy"), "x.npy is missing"),
        (("--output", "text.png/x.png"), "cannot write text.png/x.png ("),
        (("--output", "text.png/a/b/x.mp4"), "is a file, not a folder"),
        (("--output", "/proc/x.png"), "cannot write /proc/x.png ("),
        (("--output", "/proc/x/"), "cannot write /proc/x/ ("),
    ],
)
def test_checks_before_the_model_is_looked_for(tmp_path, capsys, monkeypatch, words, part):
    if "/proc" in words[-1] and not sys.platform.startswith("linux"):
        pytest.skip("there is no /proc")

    def find_model(*arguments):
        raise AssertionError("the model was looked for")

    monkeypatch.setattr("sana_jax.pipelines.opening.find_model", find_model)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (16, 16)).save("photo.png")
    output = () if "--output" in words else ("--output", "out/seven.png")
    assert call("--model", "some/model", "--prompt", PROMPT, *output, *words) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photo.png", "text.png"]


def test_options_in_the_messages_of_pipelines():
    """Arguments become options; paths and words stay."""
    said = r"^--step-cache and --steps of runs/step_cache/image: no step_cache\.png$"
    with pytest.raises(UserError, match=said), generate._with_option_names():
        raise UserError("step_cache and num_inference_steps of runs/step_cache/image: no step_cache.png")


def test_every_published_name_is_known_without_its_organisation(tmp_path, capsys):
    names = [*published.PUBLISHED_TRANSFORMERS, *published.PUBLISHED_VIDEO_TRANSFORMERS, "SANA-WM_bidirectional"]
    for name in names:
        assert hub_name_of(name) == f"Efficient-Large-Model/{name}"
        assert hub_name_of(name.removesuffix("_diffusers").lower()) == f"Efficient-Large-Model/{name}"
    assert hub_name_of("Sana_1600M") is None
    name = "Sana_1600M_1024px_BF16_diffusers"
    assert call("--model", name, "--prompt", PROMPT, "--output", tmp_path / "x.png") == 2
    error = capsys.readouterr().err
    assert f"write --model Efficient-Large-Model/{name} to download it, or the path" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("names", "stream", "said"),
    [
        ({"pag_scale": 3.0}, False, "which is what m is for; leave it out, or choose another model"),
        ({"pag_scale": 3.0, "strength": 0.5}, False, "which is what m is for; leave them out, or choose another"),
        ({"pag_scale": 3.0}, True, "which --stream asks for; leave it out, or leave --stream out"),
    ],
)
def test_why_an_option_would_not_be_used(names, stream, said):
    image = "a.png" if "strength" in names else None
    config = generate.GenerateConfig("m", ("a",), "x.mp4", image=image, stream=stream, **names)
    pipeline = types.SimpleNamespace(argument_names=lambda: frozenset({"image"}), made="videos", class_name="")
    with pytest.raises(UserError, match=said):
        generate.call_arguments(config, pipeline)
