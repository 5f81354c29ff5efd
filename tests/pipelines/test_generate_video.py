"""``python -m sana_jax.generate`` with a video model."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from sana_jax import SanaVideoPipeline, generate
from sana_jax.autoencoders import blockwise
from sana_jax.errors import run_command_line
from sana_jax.generate_video import next_step_when_interrupted, write_videos
from sana_jax.videos import as_bytes, read_video
from tests.parity.pipeline_oracle import picture
from tests.parity.wan_oracle import quick_compile
from tests.pipelines.tiny_model import write_video_run

QUICK = ("--prompt", "a red panda", "--max-sequence-length", 8, "--instruction", "none", "--enlarge", 1)
SIZE = ("--height", 32, "--width", 64, "--binning", "off", "--frames", 5, "--steps", 1)


@pytest.fixture(autouse=True)
def _quick_decoding(monkeypatch):
    monkeypatch.setattr(blockwise, "compile_ahead", quick_compile)


def call(*words) -> int:
    with pytest.raises(SystemExit) as caught:
        run_command_line(lambda: generate.main([str(word) for word in words]))
    return caught.value.code


def error_of(capsys, *words) -> str:
    assert call(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_a_film_and_what_is_said(video_model, tmp_path, capsys):
    import av

    path = tmp_path / "out.mp4"
    words = ("--model", video_model, "--output", path, "--seed", 3, "--motion-score", 30, "--sampler", "flow_euler")
    assert call(*QUICK, *SIZE, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, start in zip(lines, ["model: ", "prompt: ", "sampling: ", "in memory: text", "in memory: denoise"]):
        assert line.startswith(start)
    for part in ("1 x 5 frames of 32x64 pixels, 16 per second", "1 steps of FlowEuler(flow_shift=8.0", "guidance 6"):
        assert part in lines[2]
    assert any(
        "compiled the transformer for latents 1x2x4x8x4" in line and "memory per device" in line for line in lines
    )
    assert any(line.startswith("sampled in ") and "decode" in line for line in lines)
    assert lines[-1] == f"video: {path}, 5 frames, 0.31 seconds"
    frames, fps = read_video(path)
    assert frames.shape == (5, 32, 64, 3)
    assert fps == 16
    with av.open(str(path)) as container:
        notes = json.loads(container.metadata["comment"])
    expected = {"prompt": "a red panda", "seed": "3", "frames": "5", "motion_score": "30", "sampled_size": "32x64"}
    assert expected.items() <= notes.items()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.mp4"]


def test_several_films_from_an_image_in_folders(video_model, tmp_path, capsys):
    picture(32, 64).save(tmp_path / "first.png")
    words = (
        "--model",
        video_model,
        "--output",
        f"{tmp_path}/out/",
        "--image",
        tmp_path / "first.png",
        "--num-videos",
        2,
    )
    assert call(*QUICK, *SIZE, "--guidance-scale", 1, *words, "--fps", 8) == 0
    said = capsys.readouterr().out
    assert "2 x 5 frames of 32x64 pixels that begin with" in said
    for index in (0, 1):
        frames, fps = read_video(tmp_path / "out" / str(index))
        assert (frames.shape, fps) == ((5, 32, 64, 3), 8)
        assert f"video: {tmp_path}/out/{index}, 5 frames" in said


def test_the_same_frames_as_the_pipeline_and_enlarged(video_model, tmp_path, capsys):
    path = tmp_path / "out.npz"
    words = ("--model", video_model, "--output", path, "--seconds", 0.3, "--apg-norm-threshold", 2, "--apg-eta", 0.5)
    quick = (*QUICK[:-2], *SIZE[:6], "--steps", 1, "--enlarge", 2)
    assert call(*quick, *words) == 0
    said = capsys.readouterr().out
    assert "0.3 seconds at 16 frames per second: 5 frames (1 + 4 x 1)" in said
    assert "every frame enlarged 2 times from 32x64 to 64x128" in said
    from sana_jax.diffusion.guidance import ProjectedGuidance

    options = {"max_sequence_length": 8, "complex_human_instruction": (), "num_inference_steps": 1, "binning": "off"}
    expected = SanaVideoPipeline.from_pretrained(video_model)(
        "a red panda", **options, height=32, width=64, frames=5, projected_guidance=ProjectedGuidance(0.5, 2.0)
    )
    np.testing.assert_array_equal(read_video(path).frames[:, ::2, ::2], as_bytes(expected.frames[0]))


def test_a_training_run_of_gray_videos(tmp_path, capsys):
    """Its own sizes, numbers of frames and frames per second; frames enlarged so that they are seen."""
    model = tmp_path / "run"
    write_video_run(model)
    Image.new("L", (8, 8), 200).save(tmp_path / "first.png")
    words = ("--model", model, "--prompt", "a handwritten seven", "--seed", 1)
    assert call(*words, "--output", tmp_path / "out.gif") == 0
    said = capsys.readouterr().out
    assert "1 x 6 frames of 8x8 pixels, 8 per second, 2 steps of FlowEuler(flow_shift=3.0" in said
    assert "params weights of step 7" in said
    assert "6 frames, 0.75 seconds, every frame enlarged 16 times from 8x8 to 128x128" in said
    frames, fps = read_video(tmp_path / "out.gif")
    assert frames.shape == (6, 128, 128, 3)
    assert fps == pytest.approx(8, rel=0.01)
    assert call(*words, "--output", tmp_path / "out", "--image", tmp_path / "first.png", "--enlarge", 1) == 0
    frames = read_video(tmp_path / "out").frames
    np.testing.assert_allclose(frames[0], 200, atol=1)
    assert frames[1:].std() > 10


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--output", "out.png"), ("'out.png' is a picture's name", "makes videos", "out.mp4")),
        (("--output", "out.avi"), ("'out.avi'", ".mp4")),
        (("--frames", "80"), ("80 frames", "77 or 81")),
        (("--seconds", "5", "--frames", "81"), ("--seconds and --frames",)),
        (("--seconds", "nan"), ("seconds nan is not allowed",)),
        (("--seconds", "nan", "--memory", "8g"), ("seconds nan is not allowed",)),
        (("--seconds", "inf", "--memory", "8g"), ("seconds inf is not allowed",)),
        (("--fps", "0"), ("fps 0",)),
        (("--height", "100"), ("height 100", "96 or 112")),
        (("--guidance-scale", "1", "--apg-eta", "1"), ("projected", "would not be used")),
        (("--apg-momentum", "2"), ("momentum 2.0",)),
        (("--strength", "0.5"), ("--strength would not be used without --image",)),
        (("--pag-scale", "3"), ("--pag-scale would not be used",)),
        (("--sweep", "zoom=0:1:3"), ("--sweep",)),
        (("--image", "nowhere.png"), ("nowhere.png is not a file",)),
        (("--emulate-fp16-saturation",), ("--emulate-fp16-saturation",)),
    ],
)
def test_mistakes_are_one_line(video_model, tmp_path, capsys, monkeypatch, words, parts):
    monkeypatch.chdir(tmp_path)
    options = {"--output": "out.gif" if "--sweep" in words else "out.mp4", "--binning": "off"}
    rest = [word for name, value in options.items() if name not in words for word in (name, value)]
    error = error_of(capsys, "--model", video_model, *QUICK, *rest, *words)
    for part in parts:
        assert part in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--frames", 5), "--frames would not be used by SanaPipeline"),
        (("--fps", 8), "--fps would not be used by SanaPipeline"),
        (("--apg-eta", 1), "--apg-eta would not be used by SanaPipeline"),
        (("--output", "out.mp4"), "'out.mp4' is not allowed; a picture's name ends in .png"),
    ],
)
def test_an_image_model_makes_no_films(run, tmp_path, capsys, words, part):
    output = () if "--output" in words else ("--output", tmp_path / "out.png")
    assert part in error_of(capsys, "--model", run.directory, "--prompt", "a handwritten seven", *output, *words)


def test_times_in_a_prompt_are_refused_before_weights_are_looked_at(run, tmp_path, capsys):
    words = ("--model", run.directory, "--prompt", "0s: a seven", "2s: a one", "--output", tmp_path / "a.png")
    assert "prompts of SanaPipeline do not change on the way" in error_of(capsys, *words)


def test_without_pyav(video_model, tmp_path, capsys, monkeypatch):
    """It is asked for before anything is computed."""
    monkeypatch.setitem(sys.modules, "av", None)
    error = error_of(capsys, "--model", video_model, *QUICK, "--output", tmp_path / "out.mp4")
    assert "pip install 'sana-jax[video]'" in error
    assert "folder" in error


def test_numbers_are_checked_before_they_are_announced(video_model, tmp_path, capsys):
    for frames, said in ((0, "--frames 0 is not allowed"), (6, "6 frames; a video has 1 + 4")):
        words = ("--model", video_model, "--output", tmp_path / "a.mp4", *QUICK, "--frames", frames)
        assert call(*words) == 2
        out = capsys.readouterr()
        assert said in out.err
        assert "sampling:" not in out.out


def test_an_array_is_not_enlarged(tmp_path, capsys):
    frames = [np.zeros((1, 8, 8, 3), np.uint8)]
    result = types.SimpleNamespace(fps=16, frames=frames)
    config = types.SimpleNamespace(prompt=("a",), num_images=1, output=str(tmp_path / "a.npz"), fps=None, enlarge=0)
    write_videos(config, result, {})
    assert read_video(tmp_path / "a.npz").frames.shape == (1, 8, 8, 3)


def test_every_film_of_a_call_notes_its_prompt_and_number(tmp_path):
    for prompts, films in ((("a", "b"), 4), (("a",), 1)):
        count, path = films // len(prompts), tmp_path / f"{films}.npz"
        result = types.SimpleNamespace(fps=16, frames=[np.zeros((1, 8, 8, 3), np.uint8)] * films)
        config = types.SimpleNamespace(prompt=prompts, num_images=count, output=str(path), fps=None, enlarge=1)
        write_videos(config, result, {"prompt": list(prompts), "seed": 3})
        notes = [json.loads(str(np.load(file)["metadata"])) for file in sorted(tmp_path.glob(f"{films}*.npz"))]
        expected = [("a", "0"), ("a", "1"), ("b", "2"), ("b", "3")] if films > 1 else [("a", None)]
        assert [(note["prompt"], note.get("number")) for note in notes] == expected
        assert {note["seed"] for note in notes} == {"3"}


@pytest.mark.parametrize(
    ("made", "options", "said"),
    [
        (True, {"resume": False}, ["go on behind the last whole block with the same command, and --resume"]),
        (True, {"resume": True}, ["go on behind the last whole block with the same command"]),
        (False, {"resume": False}, []),
        (False, {"refiner_checkpoint": "blocks"}, ["the same command goes on behind the refiner's last whole block"]),
    ],
)
def test_what_an_interrupted_video_is_gone_on_with(tmp_path, made, options, said):
    config = types.SimpleNamespace(**{"output": f"{tmp_path}/out/", "refiner_checkpoint": None, **options})
    if made:
        (tmp_path / "out.resume").mkdir()
    with pytest.raises(KeyboardInterrupt) as caught, next_step_when_interrupted(config, grows=True):
        raise KeyboardInterrupt
    assert list(caught.value.args) == said
