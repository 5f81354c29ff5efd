"""The command that follows a teacher: what it writes, what an interruption costs, and what it refuses."""

from __future__ import annotations

import dataclasses
import re
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import SanaVideoPipeline
from sana_jax.errors import CheckpointError, UserError
from sana_jax.pipelines.sampling_function import initial_latents
from tests.train.data.cache_cases import gray_model
from tests.train.run_training import cache_directory, in_this_process
from tests.train.tiny_teacher import (
    DATA,
    FLOW_SHIFT,
    GUIDANCE,
    NUM_STEPS,
    TIMESTEPS,
    save_teacher,
    trajectories_config,
)
from train import make_trajectories as command
from train.data.cache import LATENTS, PROMPTS, SAMPLES_FILE, CacheReader
from train.data.trajectories import TrajectoriesData
from train.data.video.moving_digits import MovingDigitsData
from train.make_trajectories import MakeTrajectoriesConfig, make_trajectories
from train.objectives.longsana.ode import teacher_trajectory

CAPTIONS = MovingDigitsData(DATA).captions


@pytest.fixture(scope="module", autouse=True)
def small_shards(tmp_path_factory):
    with in_this_process(cache_directory(tmp_path_factory)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "SHARD_BATCHES", 1)
        patch.setattr(command, "PROMPTS_IN_SHARD", 5)
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "run")


@pytest.fixture(scope="module")
def made(teacher, tmp_path_factory):
    lines = []
    config = trajectories_config(teacher, tmp_path_factory.mktemp("made") / "trajectories")
    assert make_trajectories(config, say=lines.append) == Path(config.out)
    return SimpleNamespace(config=config, directory=Path(config.out), lines=lines)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def quiet(line: str) -> None:
    del line


# -- what it writes ----------------------------------------------------------------------------------------------------


def followed(teacher: Path, captions: list[str], negative_prompt: str = ""):
    """Noise, encoded captions, and the trajectories that begin with the noise."""
    pipeline = SanaVideoPipeline.from_pretrained(teacher)
    shape = (1, DATA.frames, DATA.canvas, DATA.canvas)
    noise = jnp.moveaxis(initial_latents(5, len(captions), shape), 1, -1)
    embeds, mask = map(jnp.asarray, pipeline.text_encoder.encode(captions))
    null, null_mask = map(jnp.asarray, pipeline.text_encoder.encode([negative_prompt] * len(captions), negative=True))
    params = pipeline.params

    def velocity(latents, timestep):
        times = jnp.full(len(captions), timestep)

        def network(embeds, mask):
            return pipeline.transformer.apply({"params": params}, latents, embeds, times, mask)

        without = network(null, null_mask)
        return without + GUIDANCE * (network(embeds, mask) - without)

    follow = jax.jit(lambda noise: teacher_trajectory(velocity, noise, TIMESTEPS, NUM_STEPS, FLOW_SHIFT))
    return noise, embeds, follow(noise)


def test_it_is_the_teachers_ode(teacher, made):
    noise, embeds, expected = followed(teacher, CAPTIONS)
    data = TrajectoriesData(made.directory)
    batch = data.batch(np.arange(len(data)))
    assert batch.conditions["trajectory"].shape == (len(CAPTIONS), len(TIMESTEPS), *data.preview_shape)
    found = np.concatenate([batch.conditions["trajectory"], batch.latents[:, None]], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found[:, 0], noise)
    assert np.abs(found[:, 1:] - found[:, :-1]).mean() > 0.05
    assert [data.caption_of(index) for index in range(len(data))] == CAPTIONS
    np.testing.assert_array_equal(batch.prompt_embeds, embeds)


def test_a_negative_prompt_and_a_motion_score(teacher, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{CAPTIONS[0]}\n{CAPTIONS[1]}\n{CAPTIONS[2]}\n")
    options = {"prompts": str(tmp_path / "prompts.txt"), "negative_prompt": CAPTIONS[1]}
    config = trajectories_config(teacher, tmp_path / "out", **options)
    make_trajectories(config, say=quiet)
    data = TrajectoriesData(tmp_path / "out")
    batch = data.batch(np.arange(3))
    _, _, expected = followed(teacher, CAPTIONS[:3], CAPTIONS[1])
    found = np.concatenate([batch.conditions["trajectory"], batch.latents[:, None]], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert data.identity.fields["trajectories.negative_prompt"] == CAPTIONS[1]
    # a run on them still knows what no text is
    np.testing.assert_array_equal(data.null_encoding()[0], made_of_nothing(teacher))
    with pytest.raises(UserError, match=r"made in another way: trajectories\.negative_prompt"):
        make_trajectories(dataclasses.replace(config, negative_prompt=""), say=quiet)
    with pytest.raises(UserError, match=r"--negative-prompt .* is not allowed; allowed is none without guidance"):
        make_trajectories(dataclasses.replace(config, out=str(tmp_path / "b"), guidance_scale=1.0), say=quiet)
    told = command.captions_of(dataclasses.replace(config, motion_score=10), teacher)
    assert told == [f"{caption} motion score: 10." for caption in CAPTIONS[:3]]


def made_of_nothing(teacher: Path) -> np.ndarray:
    return SanaVideoPipeline.from_pretrained(teacher).text_encoder.null_encoding()[0]


def test_what_it_says_and_notes(made):
    reader = CacheReader(made.directory)
    fields = reader.identity.fields
    expected = {
        "trajectories.timesteps": list(TIMESTEPS),
        "trajectories.num_steps": NUM_STEPS,
        "trajectories.flow_shift": FLOW_SHIFT,
        "trajectories.guidance_scale": GUIDANCE,
        "trajectories.seed": 5,
        "latents.dtype": "float32",  # pixels
        "clips.size": [12, 12],
        "clips.frames": 3,
        "clips.fps": 4.0,
        "teacher.dtype": "float32",
    }
    assert {name: fields[name] for name in expected} == expected
    assert re.fullmatch("[0-9a-f]{12}", fields["teacher.weights"])
    assert {shard.kind: len(shard.names) for shard in reader.shards} == {LATENTS: 2, PROMPTS: 4}
    assert len(reader.places(LATENTS)) == 8
    assert sum("8 of 8 prompts, 0 of them there" in line for line in made.lines) == 1
    assert any(re.match(r"trajectories: 8 in .*trajectories/s", line) for line in made.lines)
    assert made.lines[-1].endswith(f"--data.path {made.directory}")


def test_bfloat16_and_prompts_of_a_file(teacher, made, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{CAPTIONS[2]}\n\n{CAPTIONS[0]}\n{CAPTIONS[2]}\n")
    changes = {"prompts": str(tmp_path / "prompts.txt"), "per_caption": 2, "latent_dtype": "bfloat16"}
    lines = []
    make_trajectories(trajectories_config(teacher, tmp_path / "out", **changes), say=lines.append)
    data = TrajectoriesData(tmp_path / "out")
    assert [data.caption_of(index) for index in range(len(data))] == [CAPTIONS[2], CAPTIONS[0]] * 2
    assert sum("1 empty lines" in line or "1 prompts that come more than once" in line for line in lines) == 2
    whole = TrajectoriesData(made.directory)
    latents = data.batch([0, 2]).latents
    assert latents.dtype == np.float32
    np.testing.assert_array_equal(latents, latents.astype(jnp.bfloat16))
    assert np.abs(latents[0] - latents[1]).max() > 0.1  # another noise
    # the same noise, whatever the prompt
    expected = whole.batch([2]).conditions["trajectory"][:, 0]
    np.testing.assert_array_equal(data.batch([2]).conditions["trajectory"][:, 0], expected.astype(jnp.bfloat16))


# -- going on ----------------------------------------------------------------------------------------------------------


def test_what_was_interrupted_ends_as_the_same_files(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made.directory, copy)
    for name in (SAMPLES_FILE, "latents-00002.json", "latents-00001.json", "latents-00001.arrayrecord"):
        (copy / name).unlink()
    (copy / ".latents-00001.arrayrecord.1.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match=r"are not finished; continue with python -m train\.make_trajectories"):
        TrajectoriesData(copy)
    lines = []
    make_trajectories(dataclasses.replace(made.config, out=str(copy)), say=lines.append)
    assert any("3 of them there" in line for line in lines)
    assert contents(copy) == contents(made.directory)


def test_a_request_to_stop_ends_after_a_shard(made, tmp_path):
    config = dataclasses.replace(made.config, out=str(tmp_path / "stopped"))
    stop = SimpleNamespace(signal=None, nothing_to_lose=True, writing=threading.Lock())

    def say(line: str) -> None:
        if line.startswith("prompts with the empty one: "):
            stop.signal = signal.SIGTERM

    assert make_trajectories(config, say=say, stop=stop) is None
    there = sorted(path.name for path in Path(config.out).glob("*.arrayrecord"))
    assert there == ["latents-00000.arrayrecord", "prompts-00000.arrayrecord", "prompts-00001.arrayrecord"]
    assert make_trajectories(config, say=quiet) is not None
    assert contents(Path(config.out)) == contents(made.directory)


def test_nothing_is_made_twice_and_more_can_be_added(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made.directory, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "teacher_trajectory", None)  # which would fail
        make_trajectories(dataclasses.replace(made.config, out=str(copy)), say=quiet)
    assert contents(copy) == contents(made.directory)
    make_trajectories(dataclasses.replace(made.config, out=str(copy), per_caption=2), say=quiet)
    before, after = TrajectoriesData(made.directory), TrajectoriesData(copy)
    assert len(after) == 16
    np.testing.assert_array_equal(after.batch(range(8)).latents, before.batch(range(8)).latents)
    assert np.abs(after.batch(range(8, 16)).latents - after.batch(range(8)).latents).max(axis=(1, 2, 3, 4)).min() > 0.1


# -- what it refuses ---------------------------------------------------------------------------------------------------


def test_another_identity(made):
    config = dataclasses.replace(made.config, seed=6, guidance_scale=1.0)
    before = contents(made.directory)
    message = "trajectories.guidance_scale is 2.0 there, 1.0 here; trajectories.seed is 5 there, 6 here"
    with pytest.raises(UserError, match=re.escape(message)):
        make_trajectories(config, say=quiet)
    assert contents(made.directory) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": (1000, 960)}, "4 steps at flow shift 3 do not pass the timesteps [960]"),
        ({"timesteps": (900, 1000)}, "--timesteps 900 1000 is not allowed; allowed is timesteps that fall"),
        ({"timesteps": ()}, "--timesteps (none) is not allowed"),
        ({"batch_size": 0}, "--batch-size 0 is not allowed; allowed is 1 or more"),
        ({"guidance_scale": -1.0}, "--guidance-scale -1.0 is not allowed"),
        ({"seed": -1}, "--seed -1 is not allowed"),
        ({"motion_score": 1001}, "--motion-score 1001 is not allowed; allowed is a whole number from 0 to 1000"),
        ({"field_of_view": 0.0}, "--field-of-view 0.0 is not allowed; allowed is above 0"),
    ],
)
def test_values(tmp_path, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        trajectories_config(tmp_path, tmp_path, **changes)


def test_teachers_and_places(teacher, tmp_path):
    gray_model(tmp_path / "pictures")
    with pytest.raises(UserError, match=r"looks like an image model.*choose a video model"):
        make_trajectories(trajectories_config(tmp_path / "pictures", tmp_path / "out"), say=quiet)
    with pytest.raises(FileNotFoundError, match="is not a directory here"):
        make_trajectories(trajectories_config(tmp_path / "nothing", tmp_path / "out"), say=quiet)
    with pytest.raises(UserError, match="--height 13 is not allowed; it must be a multiple of 2"):
        make_trajectories(trajectories_config(teacher, tmp_path / "out", height=13), say=quiet)
    with pytest.raises(UserError, match="--axes opengl would not be used; it is for zip files of latents"):
        make_trajectories(trajectories_config(teacher, tmp_path / "out", axes="opengl"), say=quiet)
    (tmp_path / "taken" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"--out .* holds checkpoints but no cache\.json"):
        make_trajectories(trajectories_config(teacher, tmp_path / "taken"), say=quiet)
    with pytest.raises(FileNotFoundError, match=r"--prompts .*none\.txt does not exist"):
        make_trajectories(trajectories_config(teacher, tmp_path / "out", prompts=str(tmp_path / "none.txt")), say=quiet)
    (tmp_path / "dog.txt").write_text("a dog\n")
    with pytest.raises(UserError, match="'dog', which this model has not been trained on"):
        make_trajectories(trajectories_config(teacher, tmp_path / "out", prompts=str(tmp_path / "dog.txt")), say=quiet)
    assert not list((tmp_path / "out").glob("*.arrayrecord"))
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    (other / "config.json").unlink()
    with pytest.raises(UserError, match=r"--prompts is missing: .* is no run on moving digits"):
        make_trajectories(trajectories_config(other, tmp_path / "new"), say=quiet)


def test_a_teacher_that_is_not_finite(teacher, tmp_path, monkeypatch):
    config = trajectories_config(teacher, tmp_path / "out")
    broken = lambda velocity, noise, *rest: jnp.full((3, 4, *noise.shape[1:]), jnp.nan)  # noqa: E731
    monkeypatch.setattr(command, "teacher_trajectory", broken)
    with pytest.raises(UserError, match=r"trajectory 0 \('a three moving right'\) is not finite"):
        make_trajectories(config, say=quiet)
    assert not list((tmp_path / "out").glob("*latents*"))


def test_damage_is_made_again(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made.directory, copy)
    path = copy / "latents-00001.arrayrecord"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"train\.make_trajectories\) with the same options"):
        TrajectoriesData(copy)
    make_trajectories(dataclasses.replace(made.config, out=str(copy)), say=quiet)
    assert contents(copy) == contents(made.directory)


def test_the_command(made, capsys, monkeypatch):
    read = []
    monkeypatch.setattr(command, "make_trajectories", lambda config, **_: read.append(config))
    words = ["--model=runs/a", "--out", "b", "--timesteps", "1000", "900", "750", "500", "--flow-shift", "3"]
    stop = SimpleNamespace(signal=signal.SIGINT, nothing_to_lose=True)
    assert command.main([*words, "--num-steps", "20"], stop) == 130
    assert read == [
        MakeTrajectoriesConfig("runs/a", "b", num_steps=20, flow_shift=3.0, timesteps=(1000, 900, 750, 500))
    ]
    with pytest.raises(UserError, match="--out is missing"):
        command.main(words[:1], stop)
    with pytest.raises(UserError, match="50 steps at flow shift 3 do not pass the timesteps"):
        command.main([*words, "--num-steps=50"], stop)
