"""Where a run starts: with every bit of its base model's weights; a LoRA beside a SANA-Sprint."""

from __future__ import annotations

import importlib
import types

import numpy as np
import pytest

from sana_jax.autoencoders import PixelAutoencoder
from sana_jax.diffusion.samplers import SCM
from sana_jax.models.sana import SanaTransformer
from sana_jax.pipelines.model_directory import SamplingDefaults
from sana_jax.pipelines.sprint import SanaSprintPipeline
from sana_jax.text_encoders import WordEncoder
from tests.pipelines.tiny_model import WORDS, random_params, tiny_config, write_run
from tests.train.run_training import (
    cache_directory,
    call,
    in_this_process,
    pixels,
    rows,
    saved_state,
)
from train.example_pictures import main as write_pictures
from train.sharding import parameter_paths

CAPTION = "a handwritten seven"


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    with in_this_process(cache_directory(tmp_path_factory)):
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pictures")
    write_pictures([str(directory), "--digits", "7", "--count", "4"])
    return directory


def options(preset: str, model, run_dir, pictures, *more: str) -> list[str]:
    return [
        *(preset, "--model", str(model), "--run-dir", str(run_dir), "--data.path", str(pictures)),
        *("--data.caption", CAPTION, "--batch-size", "2", "--compute.remat", "none", "--optimizer.warmup-steps", "0"),
        *more,
    ]


def test_training_in_bfloat16_begins_with_all_bits_of_a_float32_model(tmp_path, pictures, capfd):
    config = tiny_config(patch_size=2, qk_norm="rms_norm_across_heads")
    params = random_params(config, 1)
    write_run(tmp_path / "base", params, None, config)
    # a rate at which no parameter moves
    still = ("--steps", "1", "--optimizer.learning-rate", "1e-30", "--preview.every", "0", "--ema.no-enabled")
    status, out, err = call(capfd, *options("finetune", tmp_path / "base", tmp_path / "run", pictures, *still))
    assert status == 0, err
    assert "computed in bfloat16" in out
    state = saved_state(tmp_path / "run", 1)
    for path, leaf in parameter_paths(params).items():
        np.testing.assert_array_equal(state[f"params/{path}"], leaf, err_msg=path)


@pytest.fixture(scope="module")
def sprint(tmp_path_factory):
    """A model of a few steps, every parameter of which acts."""
    directory = tmp_path_factory.mktemp("models") / "sprint"
    transformer = SanaTransformer(tiny_config(guidance_embeds=True, qk_norm="rms_norm_across_heads"))
    defaults = SamplingDefaults(guidance_scale=4.5, num_inference_steps=2, height=8, width=8)
    encoder, autoencoder = WordEncoder(WORDS, embedding_dim=12, max_length=5), PixelAutoencoder(1)
    params = random_params(transformer.config, 1)
    SanaSprintPipeline(transformer, params, SCM(), encoder, autoencoder, defaults).save_pretrained(directory)
    return directory


def test_a_lora_beside_a_sprint(sprint, tmp_path, pictures, capfd):
    """It trains, the first preview is what the base model's pipeline begins with, and the run draws by itself."""
    words = ("--steps", "2", "--compute.dtype", "float32", "--lora.rank", "2", "--optimizer.learning-rate", "1e-2")
    previews = ("--preview.every", "2", "--preview.per-caption", "1", "--logging.every", "1")
    run = tmp_path / "run"
    status, out, err = call(capfd, *options("lora", sprint, run, pictures, *words, *previews))
    assert status == 0, err
    assert "diffusion loss on a distilled model is experimental" in out
    assert np.isfinite([row["loss"] for row in rows(run)]).all()
    assert (pixels(run, 0) != pixels(run, 2)).any()
    drawn, before = (
        SanaSprintPipeline.from_pretrained(model)(CAPTION, output_type="np").images for model in (run, sprint)
    )
    assert np.isfinite(drawn).all()
    assert np.abs(drawn - before).max() > 1e-3


def test_the_class_of_dreambooth_is_prepared_beforehand_as_well(monkeypatch, capsys, tmp_path):
    from train import base_model, precompute, prior_data
    from train.data import cached

    asked = []

    def with_prior(config, base, subject, say, stop):
        asked.append((config.prior.caption, base, subject))
        return types.SimpleNamespace(prior=types.SimpleNamespace(directory="class"))

    monkeypatch.setattr(base_model, "open_encoders", lambda config: types.SimpleNamespace(parts=None))
    monkeypatch.setattr(base_model, "open_base_model", lambda name, variant: name)
    importlib.import_module("train.main")  # whose data sets are made from the real one
    monkeypatch.setattr(cached, "CachedData", lambda directory, data: directory)
    monkeypatch.setattr(prior_data, "open_with_prior", with_prior)
    monkeypatch.setattr(precompute, "precompute", lambda *parts, **options: tmp_path)
    words = ["dreambooth", "--model", "model", "--data.path", str(tmp_path)]
    assert precompute.main(words) == 0
    assert asked == []
    assert precompute.main([*words, "--prior.caption", "a dog"]) == 0
    assert asked == [("a dog", "model", tmp_path)]
    assert "the class is ready: class" in capsys.readouterr().out
