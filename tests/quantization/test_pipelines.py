"""Quantised pipelines: from a published directory, saved and opened again, with LoRA, from the command line."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from convert.engine import export_model
from convert.inspection import inspect_model
from sana_jax import generate
from sana_jax.errors import CheckpointError, UserError
from sana_jax.lora import init_lora, lora_from_tree, write_lora
from sana_jax.pipelines.families import rules_of
from sana_jax.pipelines.text_to_image import SanaPipeline
from sana_jax.quantization import FORMATS
from sana_jax.quantization.tables import relative_error
from sana_jax.quantization.trees import stored_formats
from sana_jax.weights.converted import load_params
from sana_jax.weights.rules import flatten
from tests.parity import pipeline_oracle
from tests.pipelines.tiny_model import random_params, tiny_config, write_run

CALL = {"height": 8, "width": 8, "num_inference_steps": 2, "output_type": "np", "seed": 3}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp("published")
    pipeline_oracle.save("sana-1.5", directory)
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "digits"
    config = tiny_config()
    write_run(directory, random_params(config, 1), None, config)
    return directory


def _bits(params) -> dict:
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    return {path: (leaf.dtype.name, leaf.shape, leaf.tobytes()) for path, leaf in leaves.items()}


@pytest.mark.parametrize(
    "format_name",
    [pytest.param(name, marks=[] if name in ("fp8", "nvfp4") else [pytest.mark.prove]) for name in FORMATS],
)
def test_weights_of_a_published_model_are_saved_and_read_back_to_the_bit(published, tmp_path, format_name):
    choice = {"transformer": format_name, "text_encoder": format_name, "autoencoder": format_name}
    pipe = SanaPipeline.from_pretrained(published, quantization=choice)
    stored = pipe.transformer_weights.num_bytes
    assert stored == sum(leaf.nbytes for leaf in jax.tree.leaves(pipe.params))
    pipe.save_pretrained(tmp_path / "saved")
    again = SanaPipeline.from_pretrained(tmp_path / "saved")
    for name in ("transformer", "text encoder", "autoencoder"):
        weights, read = pipe.networks[name], again.networks[name]
        assert set(stored_formats(weights.abstract).values()) == {format_name}
        assert read.num_bytes == weights.num_bytes
        assert _bits(read.params) == _bits(weights.params)
    other = "int8" if format_name != "int8" else "int4"
    with pytest.raises(UserError, match="stored in " + format_name):
        SanaPipeline.from_pretrained(tmp_path / "saved", quantization=other)
    # Who reads it as plain weights is told.
    plain = SanaPipeline.from_pretrained(published).transformer_weights.abstract
    with pytest.raises(CheckpointError, match=f"quantised.*{format_name}"):
        load_params(tmp_path / "saved" / "transformer" / "params", plain)


def test_a_quantised_pipeline_draws_nearly_the_same_picture(published, capsys):
    options = {"seed": 0, "height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np", "binning": "off"}
    pictures = []
    for choice in (None, {"transformer": "int8", "text_encoder": "int8", "autoencoder": "int8"}):
        pipe = SanaPipeline.from_pretrained(published, quantization=choice)
        shape = (1, pipe.autoencoder.latent_channels, *(64 // pipe.autoencoder.spatial_factor,) * 2)
        options["latents"] = np.random.default_rng(0).standard_normal(shape)
        pictures.append(pipe("a red panda", **options).images)
    assert 0 < relative_error(pictures[1], pictures[0]) < 0.05
    out = capsys.readouterr().out
    assert "the transformer in int8: " in out
    assert "the text_encoder in int8: " in out


def test_a_training_run_is_quantised_and_its_words_are_not(run):
    pipe = SanaPipeline.from_pretrained(run, quantization="nvfp4")
    assert np.isfinite(pipe("seven", **CALL).images).all()
    with pytest.raises(UserError, match=r"text_encoder=int8: .* has no such network"):
        SanaPipeline.from_pretrained(run, quantization={"text_encoder": "int8"})


def test_merging_a_lora_into_quantised_weights_is_refused_by_name(run, tmp_path):
    pipe = SanaPipeline.from_pretrained(run, quantization="int8")
    plain = SanaPipeline.from_pretrained(run)
    abstract = plain.transformer_weights.abstract
    lora = init_lora(abstract, ["attention"], 2, jax.random.key(0))
    lora = jax.tree.map(lambda leaf: leaf + 0.1, lora)
    file = tmp_path / "lora.safetensors"
    rules = rules_of(pipe.transformer.config)
    write_lora(file, lora_from_tree(lora, rules, abstract, alpha=2), rules, abstract)
    before = pipe("seven", **CALL).images
    with pytest.raises(UserError, match="cannot be merged into weights in int8"):
        pipe.load_lora_weights(file, merge=True)
    assert pipe.get_active_adapters() == []
    pipe.load_lora_weights(file)
    assert np.abs(pipe("seven", **CALL).images - before).max() > 1e-3
    with pytest.raises(UserError, match="cannot be merged into weights in int8"):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(pipe("seven", **CALL).images, before)


def test_the_command_line_prints_the_plan_and_checks_it(run, tmp_path, capsys):
    words = ["--model", str(run), "--prompt", "seven", "--output", str(tmp_path / "a.png"), "--steps", "2"]
    assert generate.main([*words, "--quantization", "int8", "--memory", "12g"]) == 0
    out = capsys.readouterr().out
    assert "the transformer in int8: 10 kernels" in out
    assert "memory plan for 12.00 GB" in out
    assert "memory plan: denoise: weights" in out
    assert "memory check: " in out
    with pytest.raises(UserError, match="quantization transformer=int3 is not allowed"):
        generate.main([*words, "--quantization", "int3"])


def test_quantised_weights_are_not_converted_and_that_is_the_reason(run, tmp_path, capsys):
    saved = tmp_path / "saved"
    SanaPipeline.from_pretrained(run, quantization="int8").save_pretrained(saved)
    reason = r"the weights in .*params are quantised, \d+ kernels in int8; plain ones .* that they were made of"
    for destination, layout in (("exported", "diffusers"), ("exported.safetensors", "original")):
        with pytest.raises(CheckpointError, match=reason):
            export_model(saved, tmp_path / destination, layout=layout)
        assert not (tmp_path / destination).exists()
    capsys.readouterr()
    assert not inspect_model(saved)
    said = capsys.readouterr().out
    assert re.search(f"transformer: DOES NOT FIT: {reason}", said)
    assert "unexpected" not in said
