"""Folders that a world is gone on from: not with other networks, and another run's folder stays as it is."""

from __future__ import annotations

import copy
import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import LongSanaVideoPipeline, SanaWMPipeline, SanaWMRefiner
from sana_jax.diffusion.samplers import FlowEuler
from sana_jax.errors import UserError
from sana_jax.lora import init_lora, lora_from_tree, write_lora
from sana_jax.lora.reading import FILE_NAME
from sana_jax.pipelines.families import abstract_params, rules_of
from sana_jax.pipelines.resumed_folder import told_differences
from sana_jax.pipelines.video_base import VideoRequest
from sana_jax.pipelines.weights_settings import weights_settings
from sana_jax.pipelines.world_refiner_checkpoint import RefinerCheckpoint
from sana_jax.quantization.choice import Quantization
from sana_jax.quantization.weights import quantized_weights
from tests.pipelines.tiny_long_model import PROMPT, tiny_pipeline
from tests.pipelines.tiny_refiner import tiny_refiner
from tests.pipelines.tiny_world import REFINER, arguments, tiny_autoencoder, tiny_world

INT8 = r"transformer stored in 'float32' there and 'float32, int8 \(\d+ kernels, \w{6}\)' here"


class Ended(BaseException):
    """Stands for the end of a process."""


@pytest.fixture(scope="module")
def pipe() -> SanaWMPipeline:
    parts = tiny_world()
    networks = (parts.text_encoder, parts.autoencoder, parts.defaults)
    return SanaWMPipeline(parts.transformer, parts.transformer_weights, FlowEuler(3.0), *networks)


@pytest.fixture
def sampled(monkeypatch) -> list:
    """Every first stage that is sampled; the refiner begins, and ends there."""
    seen = []

    def first_stage(self, watch, asked):
        seen.append(asked)
        return jnp.ones((1, asked.start.shape[1] + 1, *asked.start.shape[2:]))

    @functools.wraps(SanaWMRefiner.__call__)
    def refine(self, *inputs, **options):
        raise Ended

    monkeypatch.setattr(SanaWMPipeline, "_first_stage", first_stage)
    monkeypatch.setattr(SanaWMRefiner, "__call__", refine)
    return seen


def make(pipe, folder, **options):
    pipe(**arguments(5), refine=tiny_refiner(), refiner_options={**REFINER, "checkpoint_dir": folder, **options})


def in_int8(pipe):
    """The same pipeline with its transformer quantised."""
    quantised = copy.copy(pipe)
    quantised.transformer_weights = quantized_weights(pipe.transformer_weights, Quantization("int8"), "transformer")
    return quantised


def test_a_first_stage_is_of_these_networks(pipe, sampled, tmp_path, capsys):
    lines = []
    for _ in range(2):
        with pytest.raises(Ended):
            make(pipe, tmp_path, say=lines.append)
    assert len(sampled) == 1
    taken = f"first stage: taken from {tmp_path / 'first-stage.npz'}"
    assert [line.startswith(taken) for line in lines] == [True]
    assert "first stage" not in capsys.readouterr().out
    tiled = copy.copy(pipe)
    tiled.autoencoder = tiny_autoencoder(tiling=True)
    for other, said in ((in_int8(pipe), INT8), (tiled, "autoencoder tiling None there and True here")):
        with pytest.raises(UserError, match=f"another first stage: {said};") as caught:
            make(other, tmp_path)
        assert "\n" not in str(caught.value)
    assert len(sampled) == 1


def test_nothing_is_sampled_for_the_folder_of_a_refiner_alone(pipe, sampled, tmp_path):
    RefinerCheckpoint(tmp_path, {"seed": 1}).open([])
    with pytest.raises(UserError, match="is of a refinement without its first stage"):
        make(pipe, tmp_path)
    assert not sampled
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("network", ["stage 1", "autoencoder", "refiner"])
def test_a_stream_is_of_these_networks(network, tmp_path, monkeypatch):
    """The manifest is written before anything is computed."""
    from sana_jax.pipelines import world_stream

    class Run:
        def __init__(self, *inputs) -> None:
            raise Ended

    monkeypatch.setattr(world_stream, "WorldStreamRun", Run)
    pipe, refiner, options = tiny_world(), tiny_refiner(), {"output_path": tmp_path / "a.mp4", "say": lambda line: None}

    def stream(pipe, refiner, **more):
        pipe(**arguments(5), refine=refiner, refiner_options=REFINER, **options, **more)

    with pytest.raises(Ended):
        stream(pipe, refiner)
    with pytest.raises(Ended):
        stream(tiny_world(), tiny_refiner(), resume=True)
    said = INT8
    if network == "stage 1":
        pipe = in_int8(pipe)
    elif network == "autoencoder":
        pipe = copy.copy(pipe)
        pipe.autoencoder = tiny_autoencoder(causal=False, streaming_context=1)
        said = "autoencoder streaming_context 0 there and 1 here"
    else:
        refiner, said = in_int8(refiner), f"refiner {INT8.replace('float32', 'bfloat16')}"
    with pytest.raises(UserError, match=f"other settings: {said};") as caught:
        stream(pipe, refiner, resume=True)
    assert "\n" not in str(caught.value)


def test_a_refinement_is_of_these_networks(tmp_path):
    refiner = tiny_refiner(weights={"transformer": "0123", "connectors": "4567"})
    sampler, _ = refiner.check((1, 5, 2, 3, 4), **REFINER)

    def settings(refiner, prompt=None):
        return refiner.settings(sampler, 16.0, 42, prompt, None, None)

    differ = told_differences(settings(refiner), settings(in_int8(refiner)))
    assert differ.startswith("transformer stored in 'bfloat16' there and 'bfloat16, int8 (")
    other = tiny_refiner(weights={"transformer": "0123", "connectors": "89ab"})
    # connectors have no part in it where the encoded prompt is given
    assert told_differences(settings(refiner), settings(other)) == ""
    differ = told_differences(settings(refiner, "a cat"), settings(other, "a cat"))
    assert differ == "text connectors weights '4567' there and '89ab' here"


def settings_of_long(pipe: LongSanaVideoPipeline):
    plan = pipe._plan(None, None, 9, (None, None), None, None, None, None, lambda line: None)
    return pipe._settings(plan, 0, VideoRequest(prompt=PROMPT), None, 1)


def test_a_long_video_is_of_these_networks():
    pipe = tiny_pipeline()
    assert told_differences(settings_of_long(pipe), settings_of_long(tiny_pipeline())) == ""
    differ = told_differences(settings_of_long(pipe), settings_of_long(in_int8(pipe)))
    assert differ.startswith("transformer stored in 'float32' there and 'float32, int8 (")
    assert ";" not in differ
    assert "autoencoder dtype" in settings_of_long(tiny_pipeline(wan=True))


@pytest.mark.parametrize("merge", [False, True])
def test_a_run_is_of_this_lora_whatever_its_file_is_called(merge, pipe, sampled, tmp_path):
    """Trainings call their files alike."""
    long = tiny_pipeline()

    def with_lora(pipe, seed):
        other, shapes = copy.copy(pipe), abstract_params(pipe.transformer)
        tree = jax.tree.map(lambda leaf: leaf + seed, init_lora(shapes, ["attention"], 2, jax.random.key(seed)))
        rules, folder = rules_of(pipe.transformer.config), tmp_path / f"{type(pipe).__name__}-{seed}"
        folder.mkdir(exist_ok=True)
        write_lora(folder / FILE_NAME, lora_from_tree(tree, rules, shapes, alpha=2), rules, shapes)
        other.load_lora_weights(folder, merge=merge)
        return other

    first, same, second = (settings_of_long(with_lora(long, seed)) for seed in (1, 1, 2))
    assert told_differences(first, same) == ""
    said = r"lora weights '\w{12}' there and '\w{12}' here"
    assert re.fullmatch(said, told_differences(first, second))
    assert "lora weights None there and " in told_differences(settings_of_long(long), first)
    for _ in range(2):
        with pytest.raises(Ended):
            make(with_lora(pipe, 1), tmp_path / "made")
    assert len(sampled) == 1
    with pytest.raises(UserError, match=f"another first stage: {said};"):
        make(with_lora(pipe, 2), tmp_path / "made")


def test_weights_are_known_by_their_directory(world_model, tmp_path):
    other = shutil.copytree(world_model, tmp_path / "other")
    for folder in ("vae", "text_encoder"):
        (file,) = (other / folder).glob("*.safetensors")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    def settings(path, **options):
        pipe = SanaWMPipeline.from_pretrained(path, **options)
        parts = {"text encoder": pipe.text_encoder, "autoencoder": pipe.autoencoder}
        return weights_settings(parts, pipe.networks, {})

    here = settings(world_model)
    assert told_differences(here, settings(world_model)) == ""
    differ = told_differences(here, settings(other))
    assert [part.split("'")[0] for part in differ.split("; ")] == ["text encoder weights ", "autoencoder weights "]
    differ = told_differences(here, settings(world_model, quantization={"text_encoder": "int8"}))
    assert differ.startswith("text encoder stored in ")
    assert "int8 (" in differ
    assert ";" not in differ


def test_which_kernels_are_quantised_counts():
    params = {name: {"kernel": np.ones((32, 32), np.float32)} for name in "ab"}
    resident = tiny_refiner().transformer_weights.of("transformer", params)
    stored = []
    for left_out in "ab":
        weights = quantized_weights(resident, Quantization("int8", (left_out,)), "transformer")
        stored.append(weights_settings({"transformer": None}, {"transformer": weights}, {})["transformer stored in"])
    assert stored[0] != stored[1]
    assert all(one.startswith("float32, int8 (1 kernels, ") for one in stored)


def test_of_configurations_the_fields_that_differ_are_told():
    there = {"transformer": "Config(layers=2, sizes=(1, 2), width=8)", "refiner sampler": "Euler()", "seed": 0}
    here = {"transformer": "Config(layers=3, sizes=(1, 2), width=8)", "refiner sampler": "DPMSolver()", "seed": 0}
    assert told_differences(there, here) == (
        "transformer with layers=2 there and layers=3 here; refiner sampler 'Euler()' there and 'DPMSolver()' here"
    )
