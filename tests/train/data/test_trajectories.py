"""A directory of trajectories as training data: what batches hold, what is refused, and that the objective reads it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from configs.data import ImageDataConfig, VideoDataConfig
from configs.longsana import OdeInitializationConfig
from configs.longsana_data import PromptsDataConfig, TrajectoriesDataConfig
from configs.schema import PreviewConfig, RunConfig
from configs.serialization import from_dict, to_dict
from sana_jax.errors import CheckpointError, UserError
from sana_jax.pipelines.model_directory import read_model_directory
from tests.train.data.cache_cases import gray_model, gray_pictures, prepared, run_config
from tests.train.run_training import cache_directory, in_this_process
from tests.train.tiny_teacher import DATA, TIMESTEPS, save_teacher, trajectories_config
from train.data import trajectories
from train.data.cache import CacheWriter
from train.data.loader import Loader
from train.data.pinned import write_pins
from train.data.trajectories import TrajectoriesData
from train.data.video.moving_digits import MovingDigitsData
from train.longsana_data import open_trajectories
from train.make_trajectories import make_trajectories
from train.objectives.longsana.ode import OdeInitialization

CAPTIONS = MovingDigitsData(DATA).captions
SHAPE = (DATA.frames, DATA.canvas, DATA.canvas, 1)


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    with in_this_process(cache_directory(tmp_path_factory)):
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "run")


@pytest.fixture(scope="module")
def directory(teacher, tmp_path_factory):
    config = trajectories_config(teacher, tmp_path_factory.mktemp("data") / "trajectories")
    return make_trajectories(config, say=lambda line: None)


def run_of(path, prompts=(), timesteps=TIMESTEPS, run_dir="no run"):
    """The fields of a ``RunConfig`` that are read."""
    return SimpleNamespace(
        run_dir=str(run_dir),
        data=TrajectoriesDataConfig(None if path is None else str(path)),
        ode=OdeInitializationConfig(timesteps=timesteps, flow_shift=3.0, block_frames=1),
        preview=PreviewConfig(prompts=prompts),
    )


def test_what_training_asks_of_it(teacher, directory):
    data = open_trajectories(run_of(directory), read_model_directory(teacher, "SanaVideoPipeline"))
    assert len(data) == 8
    assert {shape: list(own) for shape, own in data.buckets.items()} == {SHAPE: list(range(8))}
    assert data.preview_shape == SHAPE
    assert data.condition_shapes(SHAPE) == {"trajectory": (3, *SHAPE)}
    assert sorted(data.captions) == sorted(CAPTIONS)
    assert data.validation is None
    assert (data.timesteps, data.fps) == (TIMESTEPS, 4.0)
    line = data.describe()
    assert line.startswith("8 trajectories of the teacher ")
    for part in ("4 steps at flow shift 3, guidance 2", "1000 900 500 and the end", "3x12x12x1: 8", "8 captions"):
        assert part in line
    encoder = MovingDigitsData(DATA).text_encoder
    for found, expected in zip(data.encode(CAPTIONS), encoder.encode(CAPTIONS)):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(data.null_encoding()[0], encoder.null_encoding()[0])


def test_further_prompts(teacher, directory):
    model = read_model_directory(teacher, "SanaVideoPipeline")
    further = "seven three moving"
    with pytest.raises(UserError, match="'seven three moving' is not in the cache"):
        open_trajectories(run_of(directory), model).encode([further])
    data = open_trajectories(run_of(directory, (CAPTIONS[1], further)), model)
    embeds, mask = data.encode([further, CAPTIONS[1]])
    expected = model.text_encoder.encode([further, CAPTIONS[1]])
    np.testing.assert_array_equal(embeds, expected[0])
    np.testing.assert_array_equal(mask, expected[1])
    assert further not in data.captions
    with pytest.raises(UserError, match="'dog', which this model has not been trained on"):
        open_trajectories(run_of(directory, ("a dog",)), model)


def test_the_objective_reads_its_batches(directory):
    data = TrajectoriesData(directory, timesteps=TIMESTEPS)
    batch = next(Loader(data, seed=3, batch_size=5, rows=(1, 5)))
    assert batch.latents.shape == (4, *SHAPE)
    config = run_of(directory).ode

    def network(params, noisy, timestep, captions):
        assert captions.embeds.shape == (4, *data.prompt_shape)
        return params * noisy + timestep[..., None, None, None] / 1000

    objective = OdeInitialization(network, config)
    batch = batch._replace(**{name: jnp.asarray(getattr(batch, name)) for name in ("latents", "prompt_embeds")})
    draws = objective.draw(0, 0, batch)
    losses = objective.losses(jnp.float32(0.3), None, batch, draws)
    assert np.isfinite(losses.loss).all()
    assert losses.loss.max() > 0
    other = OdeInitialization(network, dataclasses.replace(config, timesteps=(1000, 500)))
    with pytest.raises(UserError, match="make them again with the timesteps"):
        other.losses(jnp.float32(0.3), None, batch, draws)


def test_what_is_refused(teacher, directory, tmp_path):
    model = read_model_directory(teacher, "SanaVideoPipeline")
    message = "have states at the timesteps 1000 900 500, and --ode.timesteps are 1000 960; make them again with"
    with pytest.raises(UserError, match=re.escape(message)):
        open_trajectories(run_of(directory, timesteps=(1000, 960)), model)
    with pytest.raises(UserError, match=r"--data\.path is missing: name the directory"):
        open_trajectories(run_of(None), model)
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        TrajectoriesData(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="holds no trajectories"):
        TrajectoriesData(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    words = copy / "text_encoder" / "config.json"
    words.write_text(json.dumps(json.loads(words.read_text()) | {"seed": 1}))
    with pytest.raises(CheckpointError, match=re.escape("text_encoder.seed is 0 there, 1 here")):
        open_trajectories(run_of(directory), read_model_directory(copy, "SanaVideoPipeline"))
    unfinished = tmp_path / "unfinished"
    shutil.copytree(directory, unfinished)
    (unfinished / "samples.jsonl").unlink()
    with pytest.raises(UserError, match="are not finished; continue with"):
        TrajectoriesData(unfinished)


def test_a_run_goes_on_with_the_trajectories_that_it_began_with(teacher, directory, tmp_path):
    model, run = read_model_directory(teacher, "SanaVideoPipeline"), tmp_path / "run"
    begun = open_trajectories(run_of(directory), model)
    (run / "checkpoints" / "2").mkdir(parents=True)
    write_pins(begun, run)

    def made(name, **changes):
        config = trajectories_config(teacher, tmp_path / name, **changes)
        return make_trajectories(config, say=lambda line: None)

    everything = np.arange(len(begun))
    # moved, and more of them made since
    shutil.copytree(directory, tmp_path / "more")
    again = open_trajectories(run_of(made("more", per_caption=2), run_dir=run), model)
    assert len(TrajectoriesData(tmp_path / "more")) == 2 * len(begun) == 2 * len(again)
    for one, other in zip(begun.batch(everything)[:3], again.batch(everything)[:3]):
        np.testing.assert_array_equal(one, other)
    # as many, of the same prompts, and not the same
    other = made("other", seed=6)
    assert len(open_trajectories(run_of(other), model)) == len(begun)
    with pytest.raises(CheckpointError, match=r"the run began with other trajectories .* by another teacher, seed"):
        open_trajectories(run_of(other, run_dir=run), model)


def test_trajectories_that_are_being_made_of_other_prompts(teacher, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS[:3]))
    config = trajectories_config(teacher, tmp_path / "out", prompts=str(prompts))
    make_trajectories(config, say=lambda line: None)
    prompts.write_text("\n".join(CAPTIONS[1:4]))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write_samples", killed)
        with pytest.raises(KeyboardInterrupt):
            make_trajectories(config, say=lambda line: None)
    with pytest.raises(CheckpointError, match="lists 0000000, and no shard has it"):
        TrajectoriesData(tmp_path / "out")
    make_trajectories(config, say=lambda line: None)
    assert [TrajectoriesData(tmp_path / "out").caption_of(index) for index in range(3)] == CAPTIONS[1:4]


def test_a_cache_of_pictures_is_refused(tmp_path):
    config = run_config(gray_pictures(tmp_path / "pictures", 3), tmp_path / "cache")
    prepared(config, gray_model(tmp_path / "model"))
    with pytest.raises(UserError, match="is a cache of pictures, clips or prompts, not of trajectories"):
        TrajectoriesData(Path(config.data.cache))


def test_a_configuration_that_has_nothing_but_a_path_is_read_as_what_it_was():
    @dataclasses.dataclass(frozen=True)
    class Run:
        data: Any

    Run.__annotations__["data"] = typing.get_type_hints(RunConfig)["data"]
    everything = (TrajectoriesDataConfig("a"), PromptsDataConfig("a"), ImageDataConfig("a"), VideoDataConfig("a"))
    for data in everything:
        assert from_dict(Run, {"data": to_dict(data)}, "config.json").data == data


def test_a_converted_copy_of_the_text_encoder_is_said(teacher, directory, monkeypatch):
    lines = []
    own = trajectories.text_encoder_identity
    monkeypatch.setattr(
        trajectories, "text_encoder_identity", lambda model: own(model) | {"text_encoder.weights": "abc"}
    )
    open_trajectories(run_of(directory), read_model_directory(teacher, "SanaVideoPipeline"), lines.append)
    assert any("text_encoder.weights is None there, 'abc' here" in line for line in lines)
