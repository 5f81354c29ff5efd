"""Prompts without videos: how they are read, encoded ahead of training, and what batches hold."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from configs.longsana_data import PromptsDataConfig
from configs.schema import PreviewConfig
from sana_jax.autoencoders import PixelVideoAutoencoder
from sana_jax.diffusion.samplers import FlowEuler
from sana_jax.errors import CheckpointError, UserError
from sana_jax.pipelines.model_directory import SamplingDefaults, read_model_directory, write_model_directory
from sana_jax.text_encoders import WordEncoder
from tests.train.data.cache_cases import stop_request
from tests.train.tiny_teacher import NETWORK
from train.data import encoding, prompt_records
from train.data.cache import PROMPTS, CacheReader
from train.data.loader import Loader
from train.data.pinned import write_pins
from train.data.prompt_lists import read_prompts
from train.data.prompts import PromptsData
from train.longsana_data import open_prompts_data

WORDS = ("a", "red", "blue", "panda", "bird", "motion", "score:", "10.", "30.")
PANDA, BIRD = "a red panda", "a blue bird"
SHAPE = (9, 8, 12, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A video model without a transformer's weights, whose latents are pixels and whose captions are words."""
    directory = tmp_path_factory.mktemp("model")
    write_model_directory(
        directory,
        transformer_config=NETWORK,
        sampler=FlowEuler(flow_shift=3.0),
        text_encoder=WordEncoder(WORDS, embedding_dim=NETWORK.caption_channels, max_length=8),
        autoencoder=PixelVideoAutoencoder(1),
        defaults=SamplingDefaults(2.0, 2, 8, 12, frames=9, fps=4.0),
        pipeline="SanaVideoPipeline",
    )
    return read_model_directory(directory, "SanaVideoPipeline")


def run_of(tmp_path, text=f"{PANDA}\n{BIRD}\n", prompts=(), **fields):
    """The fields of a ``RunConfig`` that are read; the prompts are in a file."""
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    data = PromptsDataConfig(**{"path": str(path), "clip_frames": 9, "clip_size": (8, 12), **fields})
    return SimpleNamespace(data=data, run_dir=str(tmp_path / "runs" / "run"), preview=PreviewConfig(prompts=prompts))


def quiet(line: str) -> None:
    del line


# -- what training asks of it ------------------------------------------------------------------------------------------


def test_batches(model, tmp_path):
    lines = []
    data = open_prompts_data(run_of(tmp_path, prompts=("a bird",)), model, lines.append)
    assert (len(data), data.captions, data.caption_of(1)) == (2, [PANDA, BIRD], BIRD)
    assert {shape: list(own) for shape, own in data.buckets.items()} == {SHAPE: [0, 1]}
    assert (data.preview_shape, data.fps, data.validation) == (SHAPE, 16.0, None)
    assert data.condition_shapes(SHAPE) == {}
    batch = data.batch(np.array([1, 0, 1]))
    assert batch.latents.shape == (3, *SHAPE)
    assert not batch.latents.any()
    assert batch.conditions == {}
    embeds, mask = model.text_encoder.encode([BIRD, PANDA, BIRD])
    np.testing.assert_array_equal(batch.prompt_embeds, embeds)
    np.testing.assert_array_equal(batch.prompt_attention_mask, mask)
    np.testing.assert_array_equal(data.encode(["a bird"])[0], model.text_encoder.encode(["a bird"])[0])
    np.testing.assert_array_equal(data.null_encoding()[0], model.text_encoder.null_encoding()[0])
    with pytest.raises(UserError, match=r"'a panda' is not in the cache .* name it in --preview\.prompts"):
        data.encode(["a panda"])
    assert any("3 distinct prompts, 0 of them there" in line for line in lines)
    assert data.directory.parent == tmp_path / "runs" / "cache"
    line = data.describe()
    for part in ("2 prompts such as 'a red panda'", "9 frames of 8x12 px (latents 9x8x12x1)"):
        assert part in line
    assert next(Loader(data, seed=0, batch_size=4, rows=(0, 4))).prompt_embeds.shape == (4, 8, NETWORK.caption_channels)


def test_the_real_score_is_told_another_motion_score(model, tmp_path):
    lines = []
    data = open_prompts_data(run_of(tmp_path, motion_score=10, real_motion_score=30), model, lines.append)
    batch = data.batch(np.array([0]))
    assert data.captions == [f"{PANDA} motion score: 10.", f"{BIRD} motion score: 10."]
    own, real = (model.text_encoder.encode([f"{PANDA} motion score: {score}."]) for score in (10, 30))
    np.testing.assert_array_equal(batch.prompt_embeds, own[0])
    assert set(batch.conditions) == {"real_prompt_embeds", "real_prompt_attention_mask"}
    np.testing.assert_array_equal(batch.conditions["real_prompt_embeds"], real[0])
    np.testing.assert_array_equal(batch.conditions["real_prompt_attention_mask"], real[1])
    shapes = {name: array.shape[1:] for name, array in batch.conditions.items()}
    assert data.condition_shapes(SHAPE) == shapes
    assert "the real score is told motion score 30" in data.describe()
    alone = open_prompts_data(run_of(tmp_path, real_motion_score=30), model, lines.append)
    np.testing.assert_array_equal(alone.batch(np.array([0])).prompt_embeds, model.text_encoder.encode([PANDA])[0])
    assert any("4 distinct prompts, 2 of them there" in line for line in lines)  # both share one cache


class Instructed(WordEncoder):
    """Reads prompts otherwise than negative prompts, as an encoder does that puts an instruction before them."""

    def encode(self, prompts, *, negative=False):
        embeds, mask = super().encode(prompts, negative=negative)
        return (embeds if negative else -embeds), mask


def test_the_unconditional_branch_is_told_the_negative_prompt(model, tmp_path):
    encoder = Instructed(WORDS, embedding_dim=NETWORK.caption_channels, max_length=8)
    model = SimpleNamespace(**vars(model) | {"text_encoder": encoder})
    lines, cache = [], str(tmp_path / "cache")
    plain = open_prompts_data(run_of(tmp_path, cache=cache), model, quiet)
    np.testing.assert_array_equal(plain.null_encoding()[0], encoder.null_encoding()[0])
    data = open_prompts_data(run_of(tmp_path, cache=cache, negative_prompt=BIRD), model, lines.append)
    for found, wanted in zip(data.null_encoding(), encoder.encode([BIRD], negative=True)):
        np.testing.assert_array_equal(found, wanted)
    # the same words as a prompt are another record, and no motion score is added
    np.testing.assert_array_equal(data.batch(np.array([1])).prompt_embeds, encoder.encode([BIRD])[0])
    assert f"its unconditional branch is told {BIRD!r}" in data.describe()
    assert any("2 distinct prompts, 2 of them there" in line for line in lines)  # one cache for both
    assert len(CacheReader(tmp_path / "cache").places(PROMPTS)) == 4
    again = open_prompts_data(run_of(tmp_path, cache=cache, negative_prompt=BIRD), model, quiet)
    assert len(CacheReader(again.directory).places(PROMPTS)) == 4
    with pytest.raises(UserError, match="lacks 1 prompts, such as 'a panda'"):
        PromptsData(data.directory, [PANDA], dataclasses.replace(data.config, negative_prompt="a panda"), SHAPE)


def test_what_is_there_is_not_encoded_again(model, tmp_path, monkeypatch):
    first = open_prompts_data(run_of(tmp_path, cache=str(tmp_path / "cache")), model, quiet)
    assert first.directory == tmp_path / "cache"
    encoded = []
    encode_prompts = encoding.encode_prompts
    monkeypatch.setattr(
        prompt_records,
        "encode_prompts",
        lambda encoder, texts, say: encoded.extend(texts) or encode_prompts(encoder, texts, say),
    )
    open_prompts_data(run_of(tmp_path, f"{PANDA}\na bird\n", cache=str(tmp_path / "cache")), model, quiet)
    assert encoded == ["a bird"]
    assert len(CacheReader(tmp_path / "cache").places(PROMPTS)) == 4  # and no text


def test_a_run_goes_on_with_the_prompts_that_it_began_with(model, tmp_path):
    run = run_of(tmp_path)
    directory, lines = Path(run.run_dir), []
    directory.mkdir(parents=True)
    write_pins(open_prompts_data(run, model, quiet), directory)
    edited = run_of(tmp_path, f"{PANDA}\na red bird\n")
    assert open_prompts_data(edited, model, quiet).captions == [PANDA, "a red bird"]  # it has not begun
    (directory / "checkpoints" / "2").mkdir(parents=True)
    assert open_prompts_data(edited, model, lines.append).captions == [PANDA, BIRD]
    assert lines[0] == f"data: the 2 prompts that the run began with ({directory / 'prompts.jsonl'})"
    Path(run.data.path).unlink()
    again = open_prompts_data(run, model, quiet)
    assert again.batch(np.array([1])).prompt_embeds.any()
    write_pins(again, directory)
    assert open_prompts_data(run, model, quiet).prompts == (PANDA, BIRD)
    (directory / "prompts.jsonl").write_text("[]\n")
    with pytest.raises(CheckpointError, match=r"prompts\.jsonl is damaged"):
        open_prompts_data(run, model, quiet)


def test_a_request_to_stop(model, tmp_path):
    stop = stop_request()
    stop.signal = signal.SIGTERM
    lines = []
    assert open_prompts_data(run_of(tmp_path), model, lines.append, stop) is None
    assert any(line.startswith("stopped by SIGTERM; what was finished is kept in") for line in lines)
    assert len(open_prompts_data(run_of(tmp_path), model, quiet)) == 2


# -- how they are read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.txt", f"\ufeff{PANDA}\r\n\r\n  {BIRD}  \r\n{PANDA}", [PANDA, BIRD]),
        ("p.prompts", PANDA, [PANDA]),
        ("p.jsonl", f'{{"prompt": "{PANDA}"}}\n{{"video": "b.mp4", "captions": ["{BIRD}", "a bird"]}}\n', None),
        ("p.json", json.dumps([{"text": PANDA}, {"text": [BIRD, "a bird"]}]), None),
        ("p.csv", f"file,caption\nx.mp4,{PANDA}\ny.mp4,{BIRD}\nz.mp4,a bird\n", None),
    ],
)
def test_files(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, newline="")
    lines = []
    assert read_prompts(str(tmp_path / name), "--data.path", lines.append) == (expected or [PANDA, BIRD, "a bird"])
    said = ["1 empty lines are left out", "1 prompts that come more than once are taken once"]
    assert [line.partition(f"{name}: ")[2] for line in lines] == (said if name == "p.txt" else [])


def test_captions_of_a_directory(model, tmp_path):
    (tmp_path / "samples.jsonl").write_text(json.dumps({"captions": [[PANDA, "prompt", None], ["", "x", None]]}) + "\n")
    (tmp_path / "cache.json").write_text(json.dumps({"format": 1, "identity": {}}))
    assert read_prompts(str(tmp_path), "--data.path", quiet) == [PANDA]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "has no prompts; write one per line"),
        ("p.txt", b"\0\1", "is no text; name a text file"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b"\n', "p.jsonl line 2 is not JSON"),
        (
            "p.csv",
            b"file,width\na,3\n",
            "p.csv line 2 has no caption; mend these rows",
        ),
        ("p.json", b"{}", "allowed is a list of objects"),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        read_prompts(str(tmp_path / name), "--data.path", quiet)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"clip_frames": 10},
            "--data.clip-frames 10 is not allowed; allowed is 4k + 1 frames; the nearest are 9",
        ),
        ({"clip_size": (0, 8)}, "--data.clip-size 0 8 is not allowed"),
        ({"clip_fps": 0.0}, "--data.clip-fps 0.0 is not allowed"),
        ({"motion_score": -1}, "--data.motion-score -1 is not allowed"),
        ({"real_motion_score": 1001}, "--data.real-motion-score 1001 is not allowed"),
    ],
)
def test_values(fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        PromptsDataConfig(**fields)


def test_what_does_not_fit(model, tmp_path):
    with pytest.raises(UserError, match=r"--data\.path is missing: name a text file"):
        open_prompts_data(run_of(tmp_path, path=None), model, quiet)
    with pytest.raises(FileNotFoundError, match=r"--data\.path .*none\.txt does not exist"):
        open_prompts_data(run_of(tmp_path, path=str(tmp_path / "none.txt")), model, quiet)
    with pytest.raises(UserError, match="is a directory without prompts"):
        open_prompts_data(run_of(tmp_path, path=str(tmp_path)), model, quiet)
    with pytest.raises(UserError, match=r"--data\.clip-size: width 13 is not allowed; it must be a multiple of 2"):
        open_prompts_data(run_of(tmp_path, clip_size=(8, 13)), model, quiet)
    with pytest.raises(UserError, match="'dog', which this model has not been trained on"):
        open_prompts_data(run_of(tmp_path, "a dog\n"), model, quiet)
    open_prompts_data(run_of(tmp_path, cache=str(tmp_path / "cache")), model, quiet)
    other = SimpleNamespace(**vars(model) | {"text_encoder": WordEncoder(WORDS, NETWORK.caption_channels, 9)})
    with pytest.raises(CheckpointError, match=r"text_encoder\.max_length is 8 there, 9 here"):
        open_prompts_data(run_of(tmp_path, cache=str(tmp_path / "cache")), other, quiet)
