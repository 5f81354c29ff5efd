"""A LoRA in the weights of video and world models: every target is the base's weight + scale * B A, nothing else is."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from convert.lora import MergedSource, merge_model
from convert.main import main
from convert.sources import open_model
from sana_jax import LongSanaVideoPipeline, SanaVideoPipeline, SanaWMPipeline
from sana_jax.errors import CheckpointError, UserError
from sana_jax.lora import init_lora, read_lora
from sana_jax.lora.targets import match_targets
from sana_jax.pipelines.base_model_file import BaseModelFile
from sana_jax.pipelines.families import abstract_params, family_of, make_transformer, rules_of
from sana_jax.pipelines.model_directory import read_model_directory, write_model_directory
from sana_jax.pipelines.opening import model_weights_id
from sana_jax.weights import save_params
from sana_jax.weights.components import open_component
from sana_jax.weights.manifest import write_manifest
from sana_jax.weights.rules import flatten
from sana_jax.weights.safetensors_files import SafetensorsSource, find_weights_file
from tests.parity import video_pipeline_oracle, world_pipeline_oracle
from tests.pipelines.tiny_long_model import as_longsana

PIPELINES = {"SANA-Video": SanaVideoPipeline, "LongSANA": LongSanaVideoPipeline, "SANA-WM": SanaWMPipeline}
RANK, ALPHA = 3, 4.5
STEM = "diffusion_pytorch_model"


class Trained(NamedTuple):
    """A base model, a run of a LoRA of all its layers that a LoRA can change, and that LoRA as a file."""

    base: Path
    run: Path
    lora: Path
    config: Any
    shapes: Any


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """family -> its tiny random models."""
    root = tmp_path_factory.mktemp("families")
    video_pipeline_oracle.save("video", root / "SANA-Video")
    as_longsana(root / "SANA-Video", root / "LongSANA")
    world_pipeline_oracle.save(root / "SANA-WM")
    return functools.cache(lambda family: make_run(root / family, family, root / f"{family} run"))


def make_run(base: Path, family: str, run: Path) -> Trained:
    """Everything of one family."""
    pipeline = PIPELINES[family].__name__
    model = read_model_directory(base, pipeline)
    config = model.transformer_config
    shapes = abstract_params(make_transformer(config))
    fresh, draw = init_lora(shapes, (".*",), RANK, jax.random.key(0)), np.random.default_rng(0)
    tree = jax.tree.map(lambda leaf: 0.3 * draw.standard_normal(leaf.shape, np.float32), fresh)
    write_model_directory(
        run,
        transformer_config=config,
        sampler=model.sampler,
        text_encoder=model.text_encoder,
        autoencoder=model.autoencoder,
        defaults=model.defaults,
        pipeline=pipeline,
        trained_from=BaseModelFile(
            "lora", str(base), str(base), model_weights_id(model), {"lora": {"rank": RANK, "alpha": ALPHA}}
        ),
    )
    step = run / "checkpoints" / "5"
    save_params(step / "params", {"lora": tree})
    write_manifest(step, ["params"])
    lora = run.parent / f"{family} lora"
    assert main(["export", str(run), str(lora), "--lora", "only"]) == 0
    return Trained(base, run, lora, config, shapes)


def tensors(directory) -> dict[str, np.ndarray]:
    source = SafetensorsSource(find_weights_file(directory, STEM))
    return {name: source.read(name) for name in source.tensors}


@pytest.mark.parametrize("family", PIPELINES)
def test_every_target(trained, family, tmp_path, capsys):
    """``export --lora merged`` and ``merge`` by the published tensors; the pipeline's own merging gives the same."""
    base, run, file, config, shapes = trained(family)
    assert main(["export", str(run), str(tmp_path / "merged"), "--lora", "merged"]) == 0
    assert main(["merge", str(base), str(file), str(tmp_path / "again")]) == 0
    assert "as they were" not in capsys.readouterr().out
    before, merged = tensors(base / "transformer"), tensors(tmp_path / "merged" / "transformer")
    again = tensors(tmp_path / "again" / "transformer")
    lora = SafetensorsSource(file / "pytorch_lora_weights.safetensors")
    suffix = ".lora_A.weight"
    modules = [name.removesuffix(suffix) for name in lora.tensors if name.endswith(suffix)]
    targets = {f"{module.removeprefix('transformer.')}.weight": module for module in modules}
    assert len(targets) == sum(layer.layers or 1 for layer in match_targets(shapes, (".*",)))
    assert before.keys() == merged.keys() == again.keys()
    for name, weight in before.items():
        assert merged[name].tobytes() == again[name].tobytes(), name
        if name not in targets:
            assert merged[name].tobytes() == weight.tobytes(), name
            continue
        a, b = (lora.read(f"{targets[name]}.lora_{part}.weight").astype(np.float64) for part in "AB")
        change = ALPHA / RANK * (b.reshape(-1, RANK) @ a.reshape(RANK, -1)).reshape(weight.shape)
        assert np.abs(change).max() > 0.1, name
        np.testing.assert_allclose(merged[name], weight + change, rtol=1e-6, atol=1e-6, err_msg=name)

    pipe = PIPELINES[family].from_pretrained(base)
    with jax.disable_jit():
        pipe.load_lora_weights(file, merge=True)
        found = flatten(pipe.transformer_weights.params)
    merged_here, ignored = tmp_path / "merged" / "transformer", family_of(config).ignored
    exported = open_component(merged_here, rules_of(config), shapes, ignored=ignored).params
    for path, leaf in flatten(exported).items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-6, atol=1e-6, err_msg="/".join(path))


def test_names_of_the_original_file(trained, tmp_path):
    """A world model whose tensors are spelt as in the original file takes a LoRA in diffusers' spelling."""
    base, _, file, _, _ = trained("SANA-WM")
    spelt = {
        name.replace(".linear_1.", ".mlp.0.").replace(".linear_2.", ".mlp.2."): tensor
        for name, tensor in tensors(base / "transformer").items()
    }
    (tmp_path / "spelt").mkdir()
    shutil.copy(base / "transformer" / "config.json", tmp_path / "spelt")
    save_file(spelt, tmp_path / "spelt" / f"{STEM}.safetensors")
    for source, out in ((base / "transformer", "plain"), (tmp_path / "spelt", "out")):
        merge_model(source, file, tmp_path / out, report=lambda line: None)
    plain, out = tensors(tmp_path / "plain"), tensors(tmp_path / "out")
    assert out.keys() == spelt.keys() != plain.keys()
    assert not np.array_equal(out["t_embedder.mlp.0.weight"], spelt["t_embedder.mlp.0.weight"])
    assert sorted(tensor.tobytes() for tensor in out.values()) == sorted(tensor.tobytes() for tensor in plain.values())


def test_the_original_layout(trained, tmp_path):
    """A lone transformer does not say that it is LongSANA's; the option does, and a run's base by itself."""
    base, run, file, _, _ = trained("LongSANA")
    paths = [str(tmp_path / f"{name}.pth") for name in "ab"]
    layout = ["--layout", "original"]
    assert (
        main(["merge", str(base / "transformer"), str(file), paths[0], *layout, "--pipeline", "LongSanaVideoPipeline"])
        == 0
    )
    assert main(["export", str(run), paths[1], "--lora", "merged", *layout]) == 0
    first, second = (torch.load(path, weights_only=True)["generator"] for path in paths)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_nothing_can_be_merged_into(trained, tmp_path):
    base, _, file, config, shapes = trained("SANA-Video")
    with pytest.raises(UserError, match=r"has no transformer \(AutoencoderKLWan\), which a LoRA is for"):
        merge_model(base / "vae", file, tmp_path / "out")
    (video,) = open_model(base / "transformer").components
    lora = read_lora(file, rules_of(config), shapes)
    stray = dataclasses.replace(lora.layers[0], module="elsewhere", path=("elsewhere",))
    with pytest.raises(CheckpointError, match=r"changes elsewhere, which .* does not have; choose a LoRA"):
        MergedSource(video, dataclasses.replace(lora, layers=(*lora.layers, stray)), 1.0)
    assert not (tmp_path / "out").exists()
