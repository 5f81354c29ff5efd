"""A model with a LoRA in its weights: the same as diffusers' own fusing, and nothing else changed."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from diffusers import SanaPipeline

from convert.engine import import_model
from convert.lora import merge_model
from convert.main import main
from convert.sources import Choices
from sana_jax.errors import CheckpointError, UserError
from sana_jax.lora import init_lora, lora_tree, read_lora, scaled_lora
from sana_jax.models.sana import SanaTransformer
from sana_jax.pipelines.base_model_file import BaseModelFile
from sana_jax.pipelines.model_directory import read_model_directory, write_model_directory
from sana_jax.pipelines.opening import abstract_params, model_weights_id
from sana_jax.weights import save_params
from sana_jax.weights.manifest import write_manifest
from sana_jax.weights.rules import flatten
from sana_jax.weights.safetensors_files import SafetensorsSource
from sana_jax.weights.tables.sana import transformer_rules
from tests.convert.cases import files_of, tensors_of, transformer
from tests.lora import lora_oracle

LORA = {"r": 3, "lora_alpha": 5, "target_modules": [*lora_oracle.ALL_LINEAR, *lora_oracle.CONV]}


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def lora(published, tmp_path_factory):
    pipeline = SanaPipeline.from_pretrained(published("sana-1.0"))
    return lora_oracle.make_lora(pipeline, tmp_path_factory.mktemp("lora"), LORA)


@pytest.mark.parametrize("converted", [False, True])
def test_merge_is_diffusers_fuse(published, lora, tmp_path, converted):
    source = published("sana-1.0")
    if converted:
        import_model(source, tmp_path / "ours", report=silent)
    out = tmp_path / "out"
    status = main(["merge", str(tmp_path / "ours" if converted else source), f"{lora}:0.75", str(out)])
    assert status == 0
    theirs = SanaPipeline.from_pretrained(source)
    theirs.load_lora_weights(lora)
    theirs.fuse_lora(lora_scale=0.75)
    theirs.unload_lora_weights()
    expected = theirs.transformer.state_dict()
    found = SanaPipeline.from_pretrained(out).transformer.state_dict()
    base = SanaPipeline.from_pretrained(source).transformer.state_dict()
    changed = [name for name in base if not torch.equal(base[name], found[name])]
    assert changed == [name for name in base if not torch.equal(base[name], expected[name])]
    assert len(changed) == 3 * (8 + 2) + 7
    for name in changed:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    for folder, stem in {"vae": "diffusion_pytorch_model", "text_encoder": "model"}.items():
        assert tensors_of(source / folder, stem) == tensors_of(out / folder, stem)
    index = json.loads((out / "model_index.json").read_text())
    assert index == json.loads((source / "model_index.json").read_text())


def test_one_component_in_float16_and_bfloat16(lora, tmp_path, capsys):
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        transformer(dtype=dtype).save_pretrained(tmp_path / name)
        merge_model(tmp_path / name, lora, tmp_path / f"{name}-merged", max_shard_size="50KB")
        base = transformer(dtype=dtype).state_dict()
        found = type(transformer()).from_pretrained(tmp_path / f"{name}-merged", torch_dtype=dtype).state_dict()
        assert {tensor.dtype for tensor in found.values()} == {dtype}
        stem = "transformer_blocks.2.ff.conv_point"
        source = SafetensorsSource(lora / lora_oracle.FILE)
        a, b = (source.read(f"transformer.{stem}.lora_{part}.weight")[:, :, 0, 0] for part in "AB")
        expected = base[f"{stem}.weight"].float().numpy()[:, :, 0, 0] + 5 / 3 * (b @ a)
        np.testing.assert_allclose(found[f"{stem}.weight"].float().numpy()[:, :, 0, 0], expected, rtol=8e-3, atol=1e-3)
    assert "merged with weight 1" in capsys.readouterr().out


def test_changes_lost_in_rounding_are_said(lora, tmp_path, capsys):
    transformer(dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    merge_model(tmp_path / "model", lora, tmp_path / "out", weight=1e-9)
    out = capsys.readouterr().out
    assert "37 of 37 layers are as they were, since the LoRA's change is smaller than the rounding" in out
    stem = "diffusion_pytorch_model"
    assert tensors_of(tmp_path / "model", stem) == tensors_of(tmp_path / "out", stem)


def test_refused(published, lora, tmp_path):
    source = published("sana-1.0")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="weight 0 changes nothing"):
        main(["merge", str(source), f"{lora}:0", str(out)])
    with pytest.raises(UserError, match="has no transformer"):
        merge_model(source / "vae", lora, out, report=silent)
    with pytest.raises(FileNotFoundError, match="no LoRA file"):
        merge_model(source, tmp_path / "absent", out, report=silent)
    transformer(dtype=torch.float16).save_pretrained(tmp_path / "half")
    with pytest.raises(CheckpointError, match="too large for float16"):
        merge_model(tmp_path / "half", lora, out, weight=1e6, report=silent)
    transformer(num_layers=2).save_pretrained(tmp_path / "small")
    with pytest.raises(CheckpointError, match="this model has 2"):
        merge_model(tmp_path / "small", lora, out, report=silent)
    merge_model(source, lora, out, dry_run=True, report=silent)
    assert files_of(out) == {}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def make_run(
    directory,
    base,
    pipeline: str = "SanaPipeline",
    extra: dict | None = None,
    kind: str = "lora",
    variant: str | None = None,
):
    """A training run's directory with the checkpoint of a LoRA, and the LoRA."""
    model = read_model_directory(base, pipeline, variant=variant)
    config = model.transformer_config
    shapes = abstract_params(SanaTransformer(config))
    fresh = init_lora(shapes, ("all_linear_and_pointwise",), 3, jax.random.key(0))
    tree = jax.tree.map(lambda leaf: leaf + 0.1 * np.arange(leaf.size).reshape(leaf.shape) / leaf.size, fresh)
    settings = {"lora": {"rank": 3, "alpha": 4.5, "dropout": 0.1, "targets": ["all_linear_and_pointwise"]}}
    write_model_directory(
        directory,
        transformer_config=config,
        sampler=model.sampler,
        text_encoder=model.text_encoder,
        autoencoder=model.autoencoder,
        defaults=model.defaults,
        pipeline=pipeline,
        trained_from=BaseModelFile(kind, str(base), str(base), model_weights_id(model), settings),
    )
    step = directory / "checkpoints" / "5"
    save_params(step / "params", {"lora": tree, **(extra or {})})
    write_manifest(step, ["params"])
    (directory / "README.md").write_text("card")
    return tree, transformer_rules(config), shapes


def test_a_run_gives_its_lora(published, tmp_path, capsys):
    base = published("sana-1.0")
    tree, rules, shapes = make_run(tmp_path / "run", base, extra={"tokens": {"bias": np.zeros(3, np.float32)}})
    with pytest.raises(UserError, match="give --lora only or --lora merged"):
        main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--lora", "only"]) == 0
    out = capsys.readouterr().out
    assert "the params weights of step 5" in out
    assert "left out: tokens, which the run has trained too and diffusers cannot load" in out
    assert sorted(files_of(tmp_path / "out")) == ["README.md", "pytorch_lora_weights.safetensors"]
    found = flatten(lora_tree([(read_lora(tmp_path / "out", rules, shapes), 1.0)], shapes))
    for path, leaf in flatten(scaled_lora(tree, 1.5)).items():
        np.testing.assert_array_equal(found[path], leaf)
    metadata = SafetensorsSource(tmp_path / "out" / "pytorch_lora_weights.safetensors").metadata
    assert json.loads(metadata["lora_adapter_metadata"])["transformer.lora_dropout"] == 0.0
    notes = json.loads(metadata["sana_jax"])
    assert (notes["step"], notes["dropout"]) == (5, 0.1)
    # and merged: the same as merging that file
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "merged"), "--lora", "merged"]) == 0
    merge_model(base, tmp_path / "out", tmp_path / "expected", report=silent)
    stem = "diffusion_pytorch_model"
    merged = tensors_of(tmp_path / "merged" / "transformer", stem)
    assert merged == tensors_of(tmp_path / "expected" / "transformer", stem)
    assert merged != tensors_of(base / "transformer", stem)
    SanaPipeline.from_pretrained(tmp_path / "merged")


def test_a_run_whose_base_model_has_several_variants(published, tmp_path):
    """The variant that is chosen is that of all parts of the base model."""
    base, stem = shutil.copytree(published("sana-1.0"), tmp_path / "base"), "diffusion_pytorch_model"
    for folder in ("transformer", "vae"):
        file = base / folder / f"{stem}.safetensors"
        shutil.copy(file, file.with_name(f"{stem}.fp16.safetensors"))
        file.rename(file.with_name(f"{stem}.bf16.safetensors"))
    make_run(tmp_path / "run", base, variant="bf16")
    words = ["export", str(tmp_path / "run"), str(tmp_path / "merged"), "--lora", "merged"]
    with pytest.raises(FileNotFoundError, match="variants that are there: bf16, fp16: choose one of them"):
        main(words)
    assert main([*words, "--variant", "bf16"]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "lora"), "--lora", "only"]) == 0
    merge_model(base, tmp_path / "lora", tmp_path / "expected", Choices(variant="bf16"), report=silent)
    assert tensors_of(tmp_path / "merged" / "transformer", stem) == tensors_of(
        tmp_path / "expected" / "transformer", stem
    )


def test_a_run_is_refused(published, tmp_path):
    base = published("sana-1.0")
    with pytest.raises(UserError, match="is no training run of a LoRA"):
        main(["export", str(base), str(tmp_path / "out"), "--lora", "only"])
    moved = tmp_path / "base"
    shutil.copytree(base, moved)
    make_run(tmp_path / "run", moved)
    with pytest.raises(UserError, match="no variants"):
        main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--lora", "only", "--variant", "bf16"])
    weights = moved / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="put the old ones back"):
        main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--lora", "merged"])
    make_run(tmp_path / "sprint run", base, kind="sprint")
    with pytest.raises(UserError, match="a training run of kind sprint"):
        main(["export", str(tmp_path / "sprint run"), str(tmp_path / "out"), "--lora", "only"])
    assert not (tmp_path / "out").exists()
