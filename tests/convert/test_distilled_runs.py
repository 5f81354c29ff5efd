"""Runs of distillation are converted as the whole transformer that they hold, and LongSANA is known as such."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from diffusers import SanaVideoTransformer3DModel

from convert.inspection import inspect_model
from convert.main import main
from convert.verify import verify_model
from sana_jax.pipelines.base_model_file import BaseModelFile
from sana_jax.pipelines.families import abstract_params, make_transformer, rules_of
from sana_jax.pipelines.model_directory import read_model_directory, write_model_directory
from sana_jax.pipelines.opening import model_weights_id
from sana_jax.weights import save_params
from sana_jax.weights.components import open_component
from sana_jax.weights.manifest import write_manifest
from sana_jax.weights.rules import flatten
from tests.parity import pipeline_oracle, video_pipeline_oracle
from tests.pipelines.tiny_long_model import as_longsana, random_like

LONGSANA = "LongSanaVideoPipeline"
# kind of run -> its pipeline
RUNS = {"self_forcing": LONGSANA, "chunk_causal": "SanaVideoPipeline"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base") / "video"
    video_pipeline_oracle.save("video", directory)
    return directory


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """kind -> a run's directory, and the transformer's raw and averaged weights there."""
    root = tmp_path_factory.mktemp("runs")
    as_longsana(base, root / "long")
    made = {}
    for kind, pipeline in RUNS.items():
        model = read_model_directory(root / "long" if pipeline == LONGSANA else base, pipeline)
        shapes = abstract_params(make_transformer(model.transformer_config))
        weights = {which: random_like(shapes, seed) for seed, which in enumerate(("params", "ema"))}
        saved = dict(weights)
        if kind == "self_forcing":
            stream = {"history": np.zeros((1, 2), np.float32)}
            saved["params"] = {"transformer": weights["params"], "fake": random_like(shapes, 2), "stream": stream}
            saved["ema"] = {"transformer": weights["ema"]}
        write_model_directory(
            root / kind,
            transformer_config=model.transformer_config,
            sampler=model.sampler,
            text_encoder=model.text_encoder,
            autoencoder=model.autoencoder,
            defaults=model.defaults,
            pipeline=pipeline,
            trained_from=BaseModelFile(kind, str(base), str(base), model_weights_id(model)),
        )
        for which, tree in saved.items():
            save_params(root / kind / "checkpoints" / "5" / which, tree)
        write_manifest(root / kind / "checkpoints" / "5", list(saved))
        made[kind] = root / kind, weights, model.transformer_config, shapes
    return made


@pytest.mark.parametrize("kind", RUNS)
def test_export(runs, kind, tmp_path, capsys):
    """Averaged by default; diffusers loads all of it and nothing else."""
    run, weights, config, shapes = runs[kind]
    for options, which in (((), "ema"), (("--weights", "params"), "params")):
        out = tmp_path / which
        assert main(["export", str(run), str(out), *options]) == 0
        said = capsys.readouterr().out
        assert f"the {which} weights of step 5" in said
        assert ("left out: fake, stream, which the run trains beside it" in said) == (
            (kind, which) == ("self_forcing", "params")
        )
        loads = f'it loads the transformer: SanaVideoTransformer3DModel.from_pretrained("{out}")'
        assert (f"diffusers has no {LONGSANA}" in said and loads in said) == (kind == "self_forcing")
        assert ("causal blocks of frames; diffusers' network takes all frames at once" in said) == (
            kind == "chunk_causal"
        )
        found = flatten(open_component(out, rules_of(config), shapes).params)
        wanted = flatten(weights[which])
        assert found.keys() == wanted.keys()
        for path, leaf in wanted.items():
            np.testing.assert_array_equal(found[path], leaf, err_msg="/".join(path))
    _, info = SanaVideoTransformer3DModel.from_pretrained(tmp_path / "ema", output_loading_info=True)
    assert not any(info.values())


def test_a_longsana_file_of_a_run(runs, tmp_path):
    """NVlabs' layout has the generator under LongSANA's section, without an option."""
    run = runs["self_forcing"][0]
    assert main(["export", str(run), str(tmp_path / "a.pth"), "--layout", "original"]) == 0
    assert set(torch.load(tmp_path / "a.pth", weights_only=True)) == {"generator"}


@pytest.mark.parametrize("kind", RUNS)
def test_inspect_and_verify(runs, kind):
    run, _, _, shapes = runs[kind]
    lines: list[str] = []
    assert inspect_model(run, report=lines.append), lines
    assert f"one component (training run of {RUNS[kind]})" in lines[0]
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert f"{count:,} parameters" in lines[1]
    lines = []
    assert verify_model(run, components=("transformer",), report=lines.append), "\n".join(lines)
    assert any("the ema weights of step 5" in line for line in lines)


def test_what_loads_of_a_longsana_directory(base, tmp_path, capsys):
    as_longsana(base, tmp_path / "long")
    out = tmp_path / "out"
    for more in (["--dry-run"], []):
        assert main(["export", str(tmp_path / "long"), str(out), *more]) == 0
        said = capsys.readouterr().out
        assert (
            said.count(f"diffusers has no {LONGSANA} and loads no pipeline from {out}; it loads the transformer") == 1
        )
        assert f'SanaVideoTransformer3DModel.from_pretrained("{out}", subfolder="transformer")' in said
    SanaVideoTransformer3DModel.from_pretrained(out, subfolder="transformer")
    assert main(["export", str(base), str(tmp_path / "video")]) == 0
    assert "diffusers has no" not in capsys.readouterr().out


def test_a_sprint_run(tmp_path, capsys):
    """The student, without the discriminator that it was trained against."""
    pipeline_oracle.save("sprint", tmp_path / "base")
    model = read_model_directory(tmp_path / "base", "SanaSprintPipeline")
    shapes = abstract_params(make_transformer(model.transformer_config))
    student, run = random_like(shapes, 0), tmp_path / "run"
    write_model_directory(
        run,
        transformer_config=model.transformer_config,
        sampler=model.sampler,
        text_encoder=model.text_encoder,
        autoencoder=model.autoencoder,
        defaults=model.defaults,
        pipeline="SanaSprintPipeline",
        trained_from=BaseModelFile("sprint", "base", str(tmp_path / "base"), model_weights_id(model)),
    )
    save_params(run / "checkpoints" / "5" / "params", {"transformer": student, "heads": {"bias": np.zeros(2)}})
    write_manifest(run / "checkpoints" / "5", ["params"])
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "left out: heads, which the run trains beside it" in capsys.readouterr().out
    found = flatten(open_component(tmp_path / "out", rules_of(model.transformer_config), shapes).params)
    for path, leaf in flatten(student).items():
        np.testing.assert_array_equal(found[path], leaf, err_msg="/".join(path))
