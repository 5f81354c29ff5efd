"""``python -m sana_jax.generate`` with a world model and its refiner."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest

from convert.engine import import_model
from sana_jax import SanaWMPipeline, SanaWMRefiner, generate, generate_world
from sana_jax.errors import run_command_line
from sana_jax.quantization.trees import stored_formats
from sana_jax.videos import read_video
from tests.parity import refiner_oracle
from tests.parity.pipeline_oracle import picture

QUICK = ("--prompt", "a red panda", "--max-sequence-length", 7, "--instruction", "none", "--enlarge", 1)
SIZE = ("--height", 16, "--width", 24, "--steps", 1, "--guidance-scale", 1)


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


@pytest.fixture(scope="module")
def refiner(tmp_path_factory):
    directory = tmp_path_factory.mktemp("refiner")
    refiner_oracle.save(directory)
    return directory


def test_a_refined_film_and_what_is_said(quick_programs, world_model, refiner, tmp_path, capsys):
    import av

    picture(30, 50).save(tmp_path / "first.png")
    path = tmp_path / "out.mp4"
    words = ("--model", world_model, "--image", tmp_path / "first.png", "--action", "w-4,jw-4", "--frames", 9)
    words += ("--intrinsics", "40", "41", "26", "14", "--seed", 3, "--output", path)
    words += (
        "--refiner",
        refiner,
        "--refiner-checkpoint",
        tmp_path / "blocks",
        "--low-memory",
        "--refiner-stream-blocks",
    )
    assert call(*QUICK, *SIZE, *words) == 0
    said = capsys.readouterr().out
    for part in (
        "model: ",
        "SANA-WM of 2 blocks, width 48",
        "camera: 9 frames, path 0.400 units, yaw -4.8°, pitch +0.0°, keys as in scheme v1",
        "the refiner leaves the first frame out",
        "sampling: 1 x 9 frames of 16x24 pixels that begin with",
        "16 per second, 1 steps of FlowEuler(flow_shift=9.8",
        "in memory: encode: autoencoder",
        "in memory for the refiner: text",
        "in memory for the refiner: connect: text connectors",
        "in memory for the refiner: denoise: transformer",
        " in host memory",
        "image of 30x50 pixels for a video of 16x24: 11.1% of its width is cropped",
        "block 2 of 2 refined",
        f"video: {path}, 8 frames, 0.50 seconds",
    ):
        assert part in said
    frames, fps = read_video(path)
    assert frames.shape == (8, 16, 24, 3)
    assert fps == 16
    with av.open(str(path)) as container:
        notes = json.loads(container.metadata["comment"])
    expected = {"action": "w-4,jw-4", "action_scheme": "v1", "intrinsics": "40, 41, 26, 14", "frames": "8"}
    assert expected.items() <= notes.items()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["blocks", "first.png", "out.mp4"]
    # gone on with: neither stage is computed again, and another run is not taken for this one
    (tmp_path / "blocks" / "block-00001.npy").unlink()
    assert call(*QUICK, *SIZE, *words) == 0
    said = capsys.readouterr().out
    assert f"first stage: taken from {tmp_path / 'blocks' / 'first-stage.npz'}" in said
    assert "going on behind block 1 of 2" in said
    np.testing.assert_array_equal(read_video(path).frames, frames)
    place = words.index("--seed") + 1
    error = error_of(capsys, *QUICK, *SIZE, *words[:place], 4, *words[place + 1 :])
    assert f"error: --refiner-checkpoint {tmp_path / 'blocks'} is of a video with another first stage" in error
    assert "another first stage: seed 3 there and 4 here" in error


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ("--action and --c2w: neither is given", "w-80")),
        (("--action", "w-8", "--c2w", "poses.npy"), ("both are given",)),
        (("--action", "w-8", "--frames", 17), ("makes 9 frames", "not the 17")),
        (("--action", "x-8"), ("'x'", "scheme v1")),
        (("--action", "x-8", "--action-scheme", "v2"), ("scheme v2",)),
        (("--c2w", "poses.npy"), ("poses.npy is missing", "--c2w takes")),
        (("--c2w", "broken.npy"), ("broken.npy is no .npy file of numbers",)),
        (("--c2w", "empty.npy"), ("empty.npy is no .npy file of numbers",)),
        (("--c2w", "several.npz"), ("several.npz holds arrays by name (c2w, intrinsics)", "numpy.save")),
        (("--c2w", "few.npy", "--frames", 11), ("--frames 11 with a c2w of 9 poses",)),
        (("--c2w", "few.npy", "--action-scheme", "v1"), ("would not be used with c2w",)),
        (("--action", "w-8", "--intrinsics", 1, 2, 3), ("--intrinsics 1 2 3 is not allowed", "fx fy cx cy")),
        (("--action", "w-8", "--refiner-checkpoint", "blocks"), ("without --refiner",)),
        (("--action", "w-8", "--refiner-stream-blocks"), ("--refiner-stream-blocks would not be used without",)),
        (("--action", "w-8", "--refiner-quantization", "int8"), ("--refiner-quantization would not be used without",)),
        (
            ("--action", "w-8", "--refiner", "r", "--refiner-quantization", "int2"),
            ("--refiner-quantization transformer=int2", "of transformer, text_encoder, connectors: choose"),
        ),
        (("--action", "w-3", "--frames", 4), ("--frames 4 is not allowed; ", "1 + 2k", "none-1")),
        (("--action", "w-8", "--refiner", "r", "--refiner-checkpoint", "few.npy"), ("few.npy is a file",)),
        (("--action", "w-8", "--refiner", "nowhere/at/all"), ("nowhere/at/all",)),
        (("--action", "w-8", "--num-videos", 2), ("--num-videos 2", "one video at a time")),
        (("--action", "w-8", "--motion-score", 30), ("--motion-score would not be used by SanaWMPipeline",)),
        (("--action", "w-8", "--sampler", "dpm_solver"), ("sampler DPMSolver",)),
    ],
)
def test_mistakes_are_one_line(world_model, tmp_path, capsys, monkeypatch, words, parts):
    monkeypatch.chdir(tmp_path)
    picture(30, 50).save("first.png")
    np.save("few.npy", np.tile(np.eye(4), (9, 1, 1)))
    np.savez("several.npz", c2w=np.eye(4)[None], intrinsics=np.ones(4))
    (tmp_path / "broken.npy").write_text("no")
    (tmp_path / "empty.npy").touch()
    kept = sorted(entry.name for entry in tmp_path.iterdir())
    common = ("--model", world_model, "--output", "out.mp4", "--image", "first.png")
    error = error_of(capsys, *common, *QUICK, *SIZE, *words)
    for part in parts:
        assert part in error
    assert sorted(entry.name for entry in tmp_path.iterdir()) == kept


def test_other_mistakes(world_model, video_model, tmp_path, capsys):
    rest = (*QUICK, "--output", tmp_path / "out.mp4")
    assert "--image is missing" in error_of(capsys, "--model", world_model, "--action", "w-8", *rest)
    error = error_of(capsys, "--model", video_model, "--action", "w-8", *rest)
    assert "--action would not be used by SanaVideoPipeline" in error
    assert "--stream would not be used by SanaVideoPipeline" in error_of(
        capsys, "--model", video_model, "--stream", *rest
    )


def test_the_refiner_s_networks_are_quantised_and_budgeted_by_name(refiner, monkeypatch):
    given = {}

    def from_pretrained(path, **options):
        given.update(options)
        return SanaWMRefiner.from_pretrained(path, quantization=options["quantization"])

    weights = [types.SimpleNamespace(num_bytes=size, stays=size > 10) for size in (7, 11, 13)]
    pipeline = types.SimpleNamespace(networks=dict(enumerate(weights)), residency="all", autoencoder=None)
    monkeypatch.setattr(
        "sana_jax.pipelines.world_refiner.SanaWMRefiner", types.SimpleNamespace(from_pretrained=from_pretrained)
    )
    options = {
        "model": "m",
        "prompt": ("a",),
        "output": "out.mp4",
        "refiner": str(refiner),
        "quantization": ("nvfp4",),
        "refiner_quantization": ("int8", "text_encoder=int8"),
    }
    made = generate_world._open_refiner(generate.GenerateConfig(**options), pipeline, (16, 24))
    assert given["residency"] == "all"
    for resident in (made.transformer_weights, made.text_encoder.weights):
        assert set(stored_formats(resident.abstract).values()) == {"int8"}
    given.clear()
    generate_world._open_refiner(generate.GenerateConfig(**options, memory="24g"), pipeline, (16, 24))
    assert "residency" not in given
    assert (given["memory"], given["frame_size"], given["held_bytes"]) == ("24g", (16, 24), 24)


def test_the_first_stage_leaves_before_a_refiner_with_a_budget(world_model, refiner, monkeypatch):
    class Reached(Exception):
        pass

    def first_stage(pipeline, watch, asked):
        assert all(weights.params is not None for weights in pipeline.networks.values() if weights is not None)
        return np.zeros((1, asked.start.shape[1] + 1, *asked.start.shape[2:]), np.float32)

    def encode_prompt(self, prompt):
        raise Reached

    monkeypatch.setattr(SanaWMPipeline, "_first_stage", first_stage)
    monkeypatch.setattr(SanaWMRefiner, "encode_prompt", encode_prompt)
    pipeline = SanaWMPipeline.from_pretrained(world_model, residency="all")
    second = SanaWMRefiner.from_pretrained(refiner, memory="24g", autoencoder=pipeline.autoencoder)
    view = {"action": "w-8", "intrinsics": [40.0, 41.0, 26.0, 14.0], "height": 16, "width": 24}
    with pytest.raises(Reached):
        pipeline(picture(30, 50), "a red panda", **view, refine=second)
    assert not any(weights.loaded for weights in pipeline.networks.values() if weights is not None)


def test_a_refiner_s_directory_says_what_it_needs(refiner, tmp_path, capsys):
    contract = SanaWMRefiner.from_pretrained(refiner).contract
    assert contract.family == "SANA-WM's refiner, LTX-2 of 2 blocks, width 28"
    assert (contract.dtypes, contract.flow_shift, contract.sampler) == (("float32", "bfloat16"), 1.0, "flow_euler")
    assert (contract.size_multiple, contract.frame_rule) == (32, "1 + 8k, 16 per second")
    import_model(refiner, tmp_path / "converted")
    assert "contract: compute in float32 or bfloat16" in capsys.readouterr().out
    assert SanaWMRefiner.from_pretrained(tmp_path / "converted").contract == contract
