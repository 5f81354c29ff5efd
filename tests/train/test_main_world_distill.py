"""The distillation of a world model through the trainer: trajectories, ODE initialisation, self-forcing."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import load_preset
from configs.moving_camera import MovingCameraDataConfig
from configs.serialization import to_dict
from configs.world_data import WorldDataConfig
from sana_jax import SanaWMPipeline, SanaWMStreamingPipeline
from sana_jax.autoencoders import PixelVideoAutoencoder
from sana_jax.camera import camera_inputs
from sana_jax.diffusion.samplers import FlowEuler, WorldStreamSampler
from sana_jax.errors import UserError
from sana_jax.files import write_json
from sana_jax.models.sana_wm import SanaWMConfig, SanaWMTransformer, init_params
from sana_jax.pipelines.families import abstract_params
from sana_jax.pipelines.model_directory import WORLD_PIPELINE, SamplingDefaults, read_model_directory
from sana_jax.text_encoders import WordEncoder
from sana_jax.weights import load_checkpoint_params
from sana_jax.weights.checkpoints import checkpoint_structure
from tests.train.data.test_world_data import path_of, save_videos
from tests.train.run_training import assert_same_run, cache_directory, call, in_this_process, left_behind, rows
from tests.train.test_main_video import words
from train.data.trajectories import TrajectoriesData
from train.data.video.moving_camera import MovingCameraData
from train.main import main as train
from train.make_trajectories import MakeTrajectoriesConfig
from train.make_trajectories import main as make_trajectories
from train.world_clips import open_world_clips
from train.world_data import open_world_data

DATA = MovingCameraDataConfig(photographs=("china",), frames=4, canvas=8, rotation_speed=4.0)
NETWORK = SanaWMConfig(
    in_channels=3,
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    patch_size=(1, 4, 4),
    softmax_every_n=2,
    linear_head_dim=8,
    conv_kernel_size=2,
    chunk_plucker_channels=6,
    chunk_plucker_post_attn_blocks=-1,
    caption_channels=DATA.embedding_dim,
    mlp_ratio=2.0,
    revision="current",
)
TIMESTEPS = (1000, 968, 909, 768)
STAGE = {
    "batch-size": 2,
    "compute.scan-blocks": False,
    "checkpoint.every": 2,
    "preview.every": 4,
    "preview.captions": 1,
    "preview.num-inference-steps": 4,
    "preview.guidance-scale": 1.0,
}
FORCING = {
    **STAGE,
    "data.photographs": "china",
    "data.frames": DATA.frames,
    "data.canvas": DATA.canvas,
    "data.rotation-speed": DATA.rotation_speed,
    "preview.every": 0,
    "preview.captions": None,
    "self-forcing.blocks": "uniform",
    "self-forcing.critic-steps": 1,
    "ema.start": 1,
}


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    with in_this_process(cache_directory(tmp_path_factory)):
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("world_distill")


@pytest.fixture(scope="module")
def teacher(directory) -> Path:
    """A model as a run on the moving camera leaves it, with weights of which none are zeros."""
    transformer = SanaWMTransformer(NETWORK, scan_blocks=False)
    shapes = jax.eval_shape(lambda: init_params(transformer, jax.random.key(0)))
    draw = np.random.default_rng(0).standard_normal
    params = jax.tree.map(lambda leaf: (0.2 * draw(leaf.shape)).astype(np.float32), shapes)
    data, path = MovingCameraData(DATA), directory / "teacher"
    defaults = SamplingDefaults(1.0, 4, DATA.canvas, DATA.canvas, frames=DATA.frames, fps=4.0)
    parts = (FlowEuler(9.95), data.text_encoder, data.autoencoder, defaults)
    SanaWMPipeline(transformer, params, *parts).save_pretrained(path)
    preset = to_dict(load_preset("moving_camera"))
    write_json(path / "config.json", preset | {"data": to_dict(DATA), "transformer": to_dict(NETWORK)})
    return path


@pytest.fixture(scope="module")
def trajectories(directory, teacher) -> Path:
    options = ["--num-steps=4", "--flow-shift=9.95", "--snap", "--num-clips=5", "--timesteps", *map(str, TIMESTEPS)]
    make_trajectories([f"--model={teacher}", f"--out={directory / 'trajectories'}", "--batch-size=2", *options])
    return directory / "trajectories"


@pytest.fixture(scope="module")
def ode(directory, teacher, trajectories) -> Path:
    more = {"model": teacher, "data.path": trajectories, "ode.blocks": "uniform"}
    assert train(words("moving_camera_ode", directory / "ode", STAGE, more)) == 0
    return directory / "ode"


@pytest.fixture(scope="module")
def self_forcing(directory, teacher, ode) -> Path:
    more = {"model": teacher, "self-forcing.generator": ode}
    assert train(words("moving_camera_self_forcing", directory / "forcing", FORCING, more)) == 0
    return directory / "forcing"


def trained(run, which: str, step: int):
    structure = checkpoint_structure(run / "checkpoints", which=which, step=step)
    return load_checkpoint_params(run / "checkpoints", structure, which=which, step=step)[0]


def distance(one, other) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_trajectories_begin_with_the_clips_frames_and_have_their_cameras(teacher, trajectories, capsys):
    data, clips = TrajectoriesData(trajectories), MovingCameraData(DATA)
    taken = np.linspace(0, len(clips) - 1, 5).round().astype(int)
    found, expected = data.batch(np.arange(5)), clips.batch(taken)
    states = np.concatenate([found.conditions["trajectory"], found.latents[:, None]], axis=1)
    assert states.shape == (5, len(TIMESTEPS) + 1, *clips.preview_shape)
    for state in range(len(TIMESTEPS) + 1):  # the given frame is clean everywhere
        np.testing.assert_array_equal(states[:, state, 0], expected.latents[:, 0])
    for name in ("camera_conditions", "chunk_plucker"):
        np.testing.assert_array_equal(found.conditions[name], expected.conditions[name])
    assert np.isfinite(states).all()
    assert np.abs(states[:, 1:, 1:] - states[:, :-1, 1:]).mean() > 1e-3
    np.testing.assert_array_equal(found.prompt_embeds, expected.prompt_embeds)
    # what goes on is what was begun; other clips are not
    options = ["--num-steps=4", "--flow-shift=9.95", "--snap", "--timesteps", *map(str, TIMESTEPS), "--batch-size=2"]
    make_trajectories([f"--model={teacher}", f"--out={trajectories}", "--num-clips=5", *options])
    assert "5 of them there" in capsys.readouterr().out
    with pytest.raises(UserError, match="made in another way"):
        make_trajectories([f"--model={teacher}", f"--out={trajectories}", "--num-clips=4", *options])


MISTAKES = {
    "prompts": (["--prompts=list.txt"], "--prompts list.txt is not allowed"),
    "a size": (["--height=16"], "--height 16 is not allowed"),
    "too many frames": (["--frames=9"], "--frames 9 is not allowed; the clips have 4"),
    "no cache": (["--data=nowhere"], "nowhere"),
    "an option of zip files": (["--axes=opengl"], "--axes opengl would not be used; it is for zip files of latents"),
    "an angle": (["--field-of-view=180"], "--field-of-view 180.0 is not allowed; allowed is above 0"),
    "a share": (["--max-bad-share=2"], "--max-bad-share 2.0 is not allowed; allowed is 0 to 1"),
    "a filter": (["--filters", "dover"], "--filters dover is not allowed; allowed is name=low:high"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_a_world_has_no_use_for(mistake, teacher, tmp_path):
    options, said = MISTAKES[mistake]
    with pytest.raises((UserError, FileNotFoundError), match=said):
        make_trajectories([f"--model={teacher}", f"--out={tmp_path / 'out'}", *options])


def test_clips_must_be_named_unless_the_teacher_has_its_own(teacher, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match="--data is missing"):
        make_trajectories([f"--model={copy}", f"--out={tmp_path / 'out'}"])


def test_fewer_frames_than_the_clips_have(teacher):
    model = SanaWMPipeline.from_pretrained(teacher)
    lines = []
    parts = type("Parts", (), {"transformer_config": NETWORK, "autoencoder": model.autoencoder})
    clips = open_world_clips(None, 3, None, teacher, parts, lines.append)
    assert clips.latent_shape == (3, 3, 8, 8)
    given = clips.given(np.array([0, len(clips.captions)]))  # begins anew
    assert given.camera_conditions.shape == (2, 3, 20)
    np.testing.assert_array_equal(given.frames[0], given.frames[1])
    assert lines == ["data: the first 3 of 4 latent frames of each clip are taken"]


def test_first_frames_and_cameras_of_a_cache(tmp_path):
    encoder = WordEncoder(("a", "street", "0", "1", "2"), embedding_dim=DATA.embedding_dim, max_length=6)
    transformer = SanaWMTransformer(NETWORK)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(transformer))
    defaults = SamplingDefaults(1.0, 4, 8, 8, frames=5, fps=10.0)
    parts = (FlowEuler(9.95), encoder, PixelVideoAutoencoder(channels=3), defaults)
    SanaWMPipeline(transformer, params, *parts).save_pretrained(tmp_path / "base")
    save_videos(tmp_path / "videos", 3)
    model, videos, cache = (
        read_model_directory(tmp_path / "base", WORLD_PIPELINE),
        tmp_path / "videos",
        tmp_path / "cache",
    )
    data = WorldDataConfig(path=str(videos), clip_frames=5, clip_fps=10.0, clip_size=(8, 8), cache=str(cache))
    config = dataclasses.replace(load_preset("finetune_world"), model=str(tmp_path / "base"), data=data)
    opened = open_world_data(config, model, lambda line: None, None)
    lines = []
    clips = open_world_clips(str(cache), 3, None, tmp_path, model, lines.append)
    assert lines == ["data: the first 3 of 5 latent frames of each clip are taken"]
    assert clips.captions == [opened.caption_of(index) for index in range(len(opened))]
    given, expected = clips.given(np.array([1])), opened.batch(np.array([1]))
    np.testing.assert_array_equal(given.frames, expected.latents[:, :1])
    np.testing.assert_array_equal(given.camera_conditions, expected.conditions["camera_conditions"][:, :3])
    np.testing.assert_array_equal(given.chunk_plucker, expected.conditions["chunk_plucker"][:, :3])
    with pytest.raises(UserError, match="--num-clips 99 is not allowed"):
        open_world_clips(str(cache), None, 99, tmp_path, model)


def test_first_frames_and_cameras_of_zip_files(teacher, tmp_path):
    """Without a cache between: the same latents and the same camera as in the files, another identity for others."""
    rng, model = np.random.default_rng(0), SanaWMPipeline.from_pretrained(teacher)
    camera = {"intrinsics": [8.0, 8.0, 4.0, 4.0]}
    latents = rng.standard_normal((2, 3, 5, 8, 8)).astype(np.float32)

    def save(latents):
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            for name, own in zip("ab", latents):
                with archive.open(f"{name}.npz", "w") as member:
                    np.savez(member, z=own, c2w=path_of(5))
        (tmp_path / "all.json").write_text(json.dumps({name: {"prompt": f"a {name}", **camera} for name in "ab"}))

    parts, lines = type("Parts", (), {"transformer_config": NETWORK, "autoencoder": model.autoencoder}), []
    save(latents)
    clips = open_world_clips(str(tmp_path), 3, None, teacher, parts, lines.append)
    assert clips.latent_shape == (3, 3, 8, 8)
    assert clips.captions == ["a a", "a b"]
    given = clips.given(np.array([1, 2]))
    np.testing.assert_array_equal(given.frames, np.moveaxis(latents[[1, 0], :, :1], 1, -1))
    expected = camera_inputs(
        path_of(5), np.tile(camera["intrinsics"], (5, 1)), height=8, width=8, temporal_factor=1, spatial_factor=1
    )
    np.testing.assert_allclose(given.camera_conditions[0], expected.conditions[:3], atol=1e-6)
    assert any("nothing says whether this model's autoencoder" in line for line in lines)
    save(latents + 1)
    assert open_world_clips(str(tmp_path), 3, None, teacher, parts, lines.append).identity != clips.identity
    with pytest.raises(UserError, match=r"--frames is missing: the samples of the zip files .* are of any length"):
        open_world_clips(str(tmp_path), None, None, teacher, parts)


def test_options_of_zip_files(teacher, tmp_path):
    """Cameras of other axes without intrinsics, one of two samples damaged, another left out by its score."""
    poses, latents = path_of(5), np.zeros((3, 5, 8, 8), np.float32)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in "abc":
            with archive.open(f"{name}.npz", "w") as member:
                np.savez(member, z=latents, c2w=poses * (1.1 if name == "b" else 1) * [1, -1, -1, 1])
    metadata = {name: {"prompt": name, "dover": 0.1 if name == "c" else 0.9} for name in "abc"}
    (tmp_path / "all.json").write_text(json.dumps(metadata))
    autoencoder = SanaWMPipeline.from_pretrained(teacher).autoencoder
    parts, lines = type("Parts", (), {"transformer_config": NETWORK, "autoencoder": autoencoder}), []

    def opened(**options):
        config = MakeTrajectoriesConfig(str(teacher), "out", data=str(tmp_path), **options)
        return open_world_clips(str(tmp_path), 3, None, teacher, parts, lines.append, config.zip_options)

    with pytest.raises(
        UserError, match=r"3 of 3 files are unusable, --max-bad-share allows .* or give --field-of-view"
    ):
        opened()
    options = {"field_of_view": 90.0, "max_bad_share": 0.5, "filters": ("dover=0.5:",)}
    clips = opened(**options, axes="opengl")
    assert clips.captions == ["a"]
    expected = camera_inputs(
        poses, np.tile([4.0, 4.0, 4.0, 4.0], (5, 1)), height=8, width=8, temporal_factor=1, spatial_factor=1
    )
    camera = clips.given(np.array([0])).camera_conditions[0]
    np.testing.assert_allclose(camera, expected.conditions[:3], atol=1e-6)
    other = opened(**options)
    assert np.abs(other.given(np.array([0])).camera_conditions[0] - camera).max() > 1e-3
    wider = opened(**options | {"field_of_view": 91.0}, axes="opengl")
    assert clips.identity != other.identity
    assert clips.identity != wider.identity
    metadata["a"].pop("prompt")
    (tmp_path / "all.json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="a has no caption; write one into the metadata; all"):
        opened(**options | {"max_bad_share": 0.0})
    assert any("do not pass --filters" in line for line in lines)
    assert not any("--data." in line for line in lines)


# What compiles steps and previews takes minutes: `make prove` runs it.
STAGES = [pytest.param(name, marks=pytest.mark.prove) for name in ("ode", "self_forcing")]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_leaves_a_model_that_is_streamed(stage, request):
    run = request.getfixturevalue(stage)
    assert json.loads((run / "model_index.json").read_text())["_class_name"] == "SanaWMStreamingPipeline"
    assert np.isfinite([row["loss"] for row in rows(run)]).all()
    pipeline = SanaWMStreamingPipeline.from_pretrained(run)
    window = {} if stage == "ode" else {"num_cached_blocks": 2, "sink": True}
    options = {"num_cached_blocks": None, "sink": False, **window}
    assert pipeline.sampler == WorldStreamSampler(TIMESTEPS, block_frames=2, blocks="uniform", **options)
    assert pipeline.checkpoint_step == 4


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_resumes_exactly(stage, request, capfd, monkeypatch):
    run = request.getfixturevalue(stage)
    monkeypatch.delattr("train.main.open_start")  # where the generator began is no longer needed
    copy = run.with_name(f"{run.name}-copy")
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    for path in copy.glob("samples/step_000004.*"):
        path.unlink()
    status, out, err = call(capfd, "--resume", str(copy))
    assert status == 0, err
    assert "resumed at step 2 of 4" in out
    assert_same_run(copy, run, 4)
    assert not left_behind(copy)


@pytest.mark.prove
def test_steps_of_both_kinds_move_their_own_network(self_forcing, ode):
    kinds = [{name.partition("/")[0] for name in row if "/" in name} for row in rows(self_forcing)]
    assert kinds == [{"generator"}, {"critic"}] * 2
    two, four = (trained(self_forcing, "params", step) for step in (2, 4))
    assert set(four) == {"transformer", "fake"}
    assert distance(two["transformer"], four["transformer"]) > 0
    assert distance(two["fake"], four["fake"]) > 0


@pytest.mark.prove
def test_a_fake_score_goes_on(directory, teacher, self_forcing, capfd, monkeypatch):
    """As the stage on longer clips begins: with both networks of the one before."""
    more = {"model": teacher, "self-forcing.generator": self_forcing, "self-forcing.fake-score": self_forcing}
    more |= {"steps": 1, "optimizer.learning-rate": 1e-9, "self-forcing.critic-learning-rate": 1e-9}
    assert train(words("moving_camera_self_forcing", directory / "longer", FORCING, more)) == 0
    assert f"the fake score begins as that of {self_forcing}" in capfd.readouterr().out
    before, after = trained(self_forcing, "params", 4), trained(directory / "longer", "params", 1)
    assert distance(before["fake"], after["fake"]) == 0
    assert distance(before["fake"], after["transformer"]) > 1e-4


NO_START = {
    "no run": ("nowhere", "nowhere"),
    "another kind": ("ode", "is no run of self-forcing"),
}


@pytest.mark.parametrize("mistake", NO_START)
def test_a_fake_score_is_that_of_self_forcing(mistake, directory, teacher, tmp_path):
    name, said = NO_START[mistake]
    if name == "ode":
        name = teacher  # a run on clips
    more = {"model": teacher, "self-forcing.fake-score": name}
    with pytest.raises((UserError, FileNotFoundError), match=said):
        train(words("moving_camera_self_forcing", tmp_path / "run", FORCING, more))


PRESET_MISTAKES = {
    "LongSANA's sampler": (["sana_wm_ode", "--preview.sampler=longsana"], "allowed is world_stream"),
    "LongSANA with a world's sampler": (["longsana_ode", "--preview.sampler=world_stream"], "allowed is longsana"),
    "a table": (["sana_wm_ode", "--ode.flow-shift=7"], "--ode.blocks first_plus_one is not allowed"),
    "windows": (["sana_wm_self_forcing", "--self-forcing.sink"], "--self-forcing.sink"),
}


@pytest.mark.parametrize("mistake", PRESET_MISTAKES)
def test_mistakes_are_one_line(mistake, tmp_path):
    command, said = PRESET_MISTAKES[mistake]
    with pytest.raises(UserError, match=said):
        train([*command, f"--run-dir={tmp_path / 'run'}"])
