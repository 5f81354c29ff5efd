"""Which models a run may start from."""

from __future__ import annotations

import dataclasses
import types

import pytest

from configs import load_preset
from configs.longsana_data import PromptsDataConfig
from sana_jax.autoencoders import PixelVideoAutoencoder
from sana_jax.diffusion.samplers import FlowEuler, LongSanaSampler
from sana_jax.errors import UserError
from sana_jax.pipelines.base_model_file import BaseModelFile
from sana_jax.pipelines.model_directory import SamplingDefaults, write_model_directory
from sana_jax.text_encoders import WordEncoder
from tests.train.tiny_teacher import NETWORK
from train import base_model
from train.assembly import RunParts, open_base, open_start
from train.plan import settled


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A SANA-Video and a LongSANA of one shape, without weights."""
    directory = tmp_path_factory.mktemp("models")
    samplers = {"SanaVideoPipeline": FlowEuler(flow_shift=3.0), "LongSanaVideoPipeline": LongSanaSampler()}
    for pipeline, sampler in samplers.items():
        write_model_directory(
            directory / pipeline,
            transformer_config=NETWORK,
            sampler=sampler,
            text_encoder=WordEncoder(("a",), embedding_dim=NETWORK.caption_channels, max_length=8),
            autoencoder=PixelVideoAutoencoder(1),
            defaults=SamplingDefaults(1.0, 4, 8, 12, frames=9, fps=4.0),
            pipeline=pipeline,
        )
    return {"whole": str(directory / "SanaVideoPipeline"), "few steps": str(directory / "LongSanaVideoPipeline")}


@pytest.fixture(autouse=True)
def without_weights(monkeypatch):
    monkeypatch.setattr(base_model, "model_weights_id", lambda parts: "0" * 12)


@pytest.mark.parametrize("preset", ["lora_video", "finetune_video", "longsana_chunk_causal", "longsana_self_forcing"])
def test_a_few_step_generator_is_no_base_model(models, preset):
    config = dataclasses.replace(load_preset(preset), model=models["few steps"])
    instead = "name the SANA-Video that it was distilled from"
    with pytest.raises(UserError, match=f"is a generator of a few steps .LongSanaVideoPipeline., .* {instead}") as told:
        open_base(config)
    assert ("--self-forcing.generator" in str(told.value)) == (preset == "longsana_self_forcing")
    with pytest.raises(UserError, match=instead):
        settled(config)  # as --plan does


def test_it_may_be_where_the_generator_begins_or_ode_initialisation_goes_on(models):
    preset = load_preset("longsana_self_forcing")
    start = dataclasses.replace(preset.self_forcing, generator=models["few steps"])
    config = dataclasses.replace(preset, model=models["whole"], self_forcing=start, data=PromptsDataConfig("a"))
    config, base = open_base(config)
    assert base.pipeline == "SanaVideoPipeline"
    assert open_start(config).pipeline == "LongSanaVideoPipeline"
    _, base = open_base(dataclasses.replace(load_preset("longsana_ode"), model=models["few steps"]))
    assert base.pipeline == "LongSanaVideoPipeline"


@pytest.mark.parametrize("named", ["base", "encoders"])
def test_a_run_records_the_variant_that_it_was_given(named, tmp_path):
    model = base_model.BaseModel("published", "SanaPipeline", None, "0", "bf16")
    parts = types.SimpleNamespace(base=None, encoders=None, recipe=types.SimpleNamespace(kind="whole", settings=dict))
    setattr(parts, named, model)
    RunParts.trained_from.fget(parts).write(tmp_path)
    assert BaseModelFile.read(tmp_path).variant == "bf16"
