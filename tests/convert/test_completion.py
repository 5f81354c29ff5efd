"""What stands alone becomes a whole model directory with another model's components, and diffusers draws with it."""

from __future__ import annotations

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.families import network_of
from convert.main import main
from sana_jax import SanaPipeline
from sana_jax.diffusion.samplers import make_sampler
from sana_jax.errors import UserError
from sana_jax.models.controlnet import SanaControlNetConfig
from sana_jax.pipelines.base_model_file import BaseModelFile
from sana_jax.pipelines.families import abstract_params, make_transformer
from sana_jax.pipelines.model_directory import read_model_directory, write_model_directory
from sana_jax.pipelines.opening import model_weights_id
from sana_jax.weights import save_params
from sana_jax.weights.components import open_component
from sana_jax.weights.manifest import write_manifest
from sana_jax.weights.rules import flatten
from tests.convert.cases import as_original, transformer
from tests.convert.test_merge import make_run
from tests.pipelines.tiny_long_model import random_like

PROMPT = "a red fox"


def write_run(run, base, kind: str = "whole", settings=None, tree=None):
    """A finetuning run beside a published model, with a sampler of its own; gives its weights."""
    model = read_model_directory(base, "SanaPipeline")
    weights = random_like(abstract_params(make_transformer(model.transformer_config)), 3) if tree is None else tree
    write_model_directory(
        run,
        transformer_config=model.transformer_config,
        sampler=make_sampler("flow_euler", flow_shift=2.5),
        text_encoder=model.text_encoder,
        autoencoder=model.autoencoder,
        defaults=model.defaults,
        pipeline="SanaControlNetPipeline" if kind == "controlnet" else "SanaPipeline",
        trained_from=BaseModelFile(kind, str(base), str(base), model_weights_id(model), settings or {}),
    )
    save_params(run / "checkpoints" / "5" / "params", weights)
    write_manifest(run / "checkpoints" / "5", ["params"])
    return weights


def drawn(pipeline, **options) -> np.ndarray:
    """Latents after two steps from given noise."""
    noise = np.random.default_rng(0).standard_normal((1, 8, 2, 3), np.float32)
    size = {"height": 2 * 32, "width": 3 * 32} | options
    if isinstance(pipeline, diffusers.DiffusionPipeline):
        pipeline.set_progress_bar_config(disable=True)
        given = {"latents": torch.from_numpy(noise), "use_resolution_binning": False}
        out = pipeline(PROMPT, num_inference_steps=2, output_type="latent", **given, **size)
        return out.images.numpy()
    given = {"latents": noise, "binning": "off"}
    return np.asarray(pipeline(PROMPT, num_inference_steps=2, output_type="latent", **given, **size).images)


@pytest.fixture
def run(published, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(published("sana-1.0"), base)
    (base / "LICENSE").write_text("terms")
    write_run(tmp_path / "run", base)
    return tmp_path / "run"


def test_a_finetuning_run(run, tmp_path, capsys):
    """All that the pipeline needs is there; diffusers draws from it what the run draws here."""
    base, out = tmp_path / "base", tmp_path / "out"
    assert main(["export", str(run), str(tmp_path / "alone")]) == 0
    assert f"export with --components-from {base} writes a whole model directory of it" in capsys.readouterr().out
    assert main(["export", str(run), str(out), "--components-from", str(base)]) == 0
    said = capsys.readouterr().out
    assert "left out" not in said
    assert f"text_encoder, tokenizer, vae come from {base}" in said
    assert "sampler flow_euler with flow shift 2.5" in said
    assert (out / "LICENSE").read_text() == "terms"
    theirs = diffusers.SanaPipeline.from_pretrained(out)
    assert type(theirs.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    latents = drawn(SanaPipeline.from_pretrained(run, dtype="float32"))
    np.testing.assert_array_equal(drawn(SanaPipeline.from_pretrained(out, dtype="float32")), latents)
    assert np.abs(drawn(theirs) - latents).max() < 1e-5 * np.abs(latents).max()


@pytest.fixture
def in_variants(run, tmp_path):
    """The run's base model in two variants, without plain files; their text encoders differ."""
    for part in ("text_encoder", "transformer", "vae"):
        (file,) = (tmp_path / "base" / part).glob("*.safetensors")
        for scale, variant in enumerate(("fp16", "bf16"), 1):
            state = load_file(file)
            state = {name: tensor * scale for name, tensor in state.items()} if part == "text_encoder" else state
            save_file(state, file.with_name(f"{file.stem}.{variant}.safetensors"), {"format": "pt"})
        file.unlink()
    return run


def text_weights(directory) -> torch.Tensor:
    return diffusers.SanaPipeline.from_pretrained(directory).text_encoder.layers[0].mlp.up_proj.weight


def test_the_variant_is_of_the_other_models_weights(in_variants, tmp_path):
    words = ["export", str(in_variants), str(tmp_path / "out"), "--components-from", str(tmp_path / "base")]
    with pytest.raises(UserError, match="variants that are there: bf16, fp16: choose one"):
        main(words)
    assert main([*words, "--variant", "fp16"]) == 0
    assert text_weights(tmp_path / "out") is not None


def test_a_run_knows_the_variant_that_it_was_given(in_variants, tmp_path):
    """Sampling and exporting it take the same; another can still be asked for."""
    file = in_variants / "base_model.json"
    values = json.loads(file.read_text())
    with pytest.raises(FileNotFoundError, match="variants that are there: bf16, fp16: choose one"):
        SanaPipeline.from_pretrained(in_variants)
    drawings = {kind: drawn(SanaPipeline.from_pretrained(in_variants, variant=kind)) for kind in ("bf16", "fp16")}
    assert np.abs(drawings["bf16"] - drawings["fp16"]).max() > 1e-3
    file.write_text(json.dumps(values | {"variant": "bf16"}))
    np.testing.assert_array_equal(drawn(SanaPipeline.from_pretrained(in_variants)), drawings["bf16"])
    np.testing.assert_array_equal(drawn(SanaPipeline.from_pretrained(in_variants, variant="fp16")), drawings["fp16"])
    assert main(["export", str(in_variants), str(tmp_path / "out"), "--components-from", str(in_variants)]) == 0
    assert (
        main(
            [
                "export",
                str(in_variants),
                str(tmp_path / "fp16"),
                "--components-from",
                str(in_variants),
                "--variant",
                "fp16",
            ]
        )
        == 0
    )
    assert torch.equal(text_weights(tmp_path / "out"), 2 * text_weights(tmp_path / "fp16"))
    make_run(tmp_path / "lora", in_variants)
    assert main(["export", str(tmp_path / "lora"), str(tmp_path / "merged"), "--lora", "merged"]) == 0
    assert torch.equal(text_weights(tmp_path / "merged"), text_weights(tmp_path / "out"))
    del values["variant"]  # as earlier versions wrote it
    file.write_text(json.dumps(values))
    assert SanaPipeline.from_pretrained(in_variants, variant="bf16").params


def test_what_a_run_trains_beside_its_transformer_is_named(tmp_path, published, capsys):
    base, run = published("sana-1.0"), tmp_path / "sprint"
    student = write_run(tmp_path / "one", base)
    write_run(run, base, "sprint", tree={"transformer": student, "heads": {"bias": np.zeros(2)}})
    assert main(["export", str(run), str(tmp_path / "out"), "--components-from", str(base)]) == 0
    said = capsys.readouterr().out
    assert "left out: heads, which the run trains beside it" in said
    assert "no model directory" not in said


def test_a_controlnet_run(run, tmp_path, capsys):
    """Its ControlNet with all of the base model, the transformer too."""
    base, out = tmp_path / "base", tmp_path / "out"
    config = SanaControlNetConfig.beside(read_model_directory(base, "SanaPipeline").transformer_config, 2).to_dict()
    network = network_of(config, "a test")
    settings = {name: value for name, value in config.items() if name != "_class_name"}
    controlnet = random_like(network.abstract, 4)
    write_run(tmp_path / "edges", base, "controlnet", {"controlnet": settings}, controlnet)
    assert main(["export", str(tmp_path / "edges"), str(out), "--components-from", str(base)]) == 0
    said = capsys.readouterr().out
    assert "left out" not in said
    assert f"text_encoder, tokenizer, transformer, vae come from {base}" in said
    theirs = diffusers.SanaControlNetPipeline.from_pretrained(out)
    wanted = diffusers.SanaTransformer2DModel.from_pretrained(base / "transformer").state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in theirs.transformer.state_dict().items())
    found = flatten(open_component(out / "controlnet", network.rules, network.abstract).params)
    assert all(np.array_equal(found[path], leaf) for path, leaf in flatten(controlnet).items())


def test_the_run_itself_and_a_run_upon_it_name_the_same_components(run, tmp_path):
    write_run(tmp_path / "second", tmp_path / "base")
    trained_from = json.loads((tmp_path / "second" / "base_model.json").read_text())
    BaseModelFile(**trained_from | {"model": str(run), "path": str(run)}).write(tmp_path / "second")
    for where in (run, tmp_path / "second"):
        out = tmp_path / f"out_{where.name}"
        assert main(["export", str(run), str(out), "--components-from", str(where)]) == 0
        assert diffusers.SanaPipeline.from_pretrained(out).text_encoder is not None


def test_a_lora_merged_with_a_run(run, tmp_path):
    make_run(tmp_path / "lora", run)
    assert main(["export", str(tmp_path / "lora"), str(tmp_path / "out"), "--lora", "merged"]) == 0
    latents = drawn(SanaPipeline.from_pretrained(tmp_path / "lora", dtype="float32"))
    theirs = drawn(diffusers.SanaPipeline.from_pretrained(tmp_path / "out"))
    assert np.abs(theirs - latents).max() < 1e-5 * np.abs(latents).max()
    assert np.abs(drawn(SanaPipeline.from_pretrained(run, dtype="float32")) - latents).max() > 1e-3


@pytest.mark.usefixtures("tiny_widths")
def test_an_original_file(published, tmp_path):
    torch.save(as_original(transformer().state_dict()), tmp_path / "a.pth")
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "a.pth"), str(out), "--components-from", str(published("sana-1.0"))]) == 0
    wanted = transformer().state_dict()
    found = diffusers.SanaPipeline.from_pretrained(out).transformer.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def test_what_cannot_be_completed(run, published, tmp_path):
    out, base = str(tmp_path / "out"), str(tmp_path / "base")
    with pytest.raises(UserError, match=r"it completes an original .* or a training run, .* leave it out"):
        main(["export", base, out, "--components-from", base])
    with pytest.raises(UserError, match=r"--layout original writes one network; leave it out"):
        main(["export", str(run), f"{out}.pth", "--layout", "original", "--components-from", base])
    with pytest.raises(UserError, match=r"takes the others from the run's base"):
        main(["export", str(run), out, "--lora", "merged", "--components-from", base])
    with pytest.raises(UserError, match=r"which .* are not; leave it out"):
        main(["export", str(run), out, "--components-from", str(tmp_path / "base" / "transformer")])
    config = tmp_path / "run" / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"caption_channels": 40}))
    with pytest.raises(UserError, match=r"caption_channels 24, and this one 40; name a model with the same text enc"):
        main(["export", str(run), out, "--components-from", base])
    assert not (tmp_path / "out").exists()
