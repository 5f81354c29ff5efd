"""SANA-WM's transformer: published -> ours -> published bit for bit, in both spellings of its names."""

from __future__ import annotations

import json
import types

import jax
import numpy as np
import pytest
import torch
from diffusers import SanaWMTransformer3DModel
from safetensors.torch import save_file

from convert import original_world_model
from convert.engine import export_model, import_model
from convert.families import network_of
from convert.original_world_model import infer_world_model_config, renamed_world_model
from convert.sources import Choices
from sana_jax.errors import CheckpointError, UserError
from sana_jax.models.sana_wm import SanaWMConfig
from sana_jax.weights.rules import flatten, read_params
from sana_jax.weights.safetensors_files import SafetensorsSource, TensorInfo
from tests.convert.cases import tensors_of
from tests.parity.sana_wm_oracle import jax_config, our_params, torch_model


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wm") / "published"
    torch_model("convolved patches").save_pretrained(directory)
    return directory


def test_published_weights_come_back_bit_for_bit(published, tmp_path):
    lines: list[str] = []
    import_model(published, tmp_path / "ours", report=lines.append)
    assert any("SANA-WM of 3 blocks, width 48" in line and "parameters" in line for line in lines)
    export_model(tmp_path / "ours", tmp_path / "back", report=silent)
    assert tensors_of(tmp_path / "back") == tensors_of(published)
    assert len([name for name in tensors_of(published) if name.endswith("recall_gate")]) == 3
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (published / "config.json").read_text()
    )
    _, info = SanaWMTransformer3DModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())


def original(state: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """A published state dict under the original file's names, with what that has besides."""
    spelt = {name.replace(".linear_1.", ".mlp.0.").replace(".linear_2.", ".mlp.2."): t for name, t in state.items()}
    assert spelt.keys() != state.keys()
    spelt |= {"pos_embed": torch.zeros(1, 4, 48), "y_embedder.y_embedding": torch.zeros(7, 8)}
    return {prefix + name: tensor.contiguous() for name, tensor in spelt.items()}


@pytest.mark.parametrize("prefix", ["", "_inner."])
def test_an_original_file(prefix, tmp_path, monkeypatch):
    """Weights alone, of which the configuration is inferred; it becomes what diffusers loads."""
    monkeypatch.setitem(original_world_model.CROSS_HEADS, 48, 4)
    model = torch_model("convolved patches")
    state = model.state_dict()
    if prefix:
        state = {name: tensor for name, tensor in state.items() if not name.endswith("recall_gate")}
    save_file(original(state, prefix), tmp_path / "a.safetensors")
    lines: list[str] = []
    import_model(tmp_path / "a.safetensors", tmp_path / "ours", report=lines.append)
    for said in ("y_embedder.y_embedding", "flow shift 9.8", "revision legacy; --revision current"):
        assert any(said in line for line in lines), said
    export_model(tmp_path / "ours", tmp_path / "back", report=silent)
    loaded = SanaWMTransformer3DModel.from_pretrained(tmp_path / "back" / "transformer")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    fields = ({k: v for k, v in m.config.items() if not k.startswith("_")} for m in (loaded, model))
    found, wanted = ({**values, "patch_size": tuple(values["patch_size"])} for values in fields)
    assert {k: v for k, v in found.items() if k != "mlp_acts"} == {k: v for k, v in wanted.items() if k != "mlp_acts"}
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["_class_name"] == "SanaWMPipeline"
    assert index["contract"]["family"].startswith("SANA-WM of 3 blocks")
    assert index["contract"]["sampler"] == "flow_euler"


def test_original_files_that_do_not_fit(tmp_path):
    state = original(torch_model("one of each").state_dict())
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="width 48 is not a published one"):
        import_model(tmp_path / "a.safetensors", tmp_path / "ours", report=silent)
    del state["x_embedder.proj.weight"]
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"x_embedder\.proj\.weight is missing"):
        import_model(tmp_path / "a.safetensors", tmp_path / "ours", report=silent)


def test_the_published_size_is_inferred():
    """Full-size names and shapes, on no memory at all."""
    with torch.device("meta"):
        state = SanaWMTransformer3DModel().state_dict()
    source = types.SimpleNamespace(
        location="published",
        tensors={name: TensorInfo(np.dtype(np.float32), tuple(t.shape)) for name, t in original(state).items()},
    )
    renamed = renamed_world_model(source)
    assert SanaWMConfig.from_dict(infer_world_model_config(renamed)) == SanaWMConfig()
    assert set(renamed.tensors) == set(state)


@pytest.mark.parametrize("prefix", ["", "_inner."])
def test_original_names(prefix, tmp_path):
    """Those of the original file, and of early versions of it, give the same parameters."""
    variant = "one of each"
    state = torch_model(variant).state_dict()
    save_file(original(state, prefix), tmp_path / "a.safetensors")
    source = SafetensorsSource(tmp_path / "a.safetensors")
    network = network_of(jax_config(variant).to_dict(), "config.json", source.tensors)
    found = read_params(source, network.rules, network.abstract, ignored=network.ignored)
    expected = our_params(state, jax_config(variant))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for path, leaf in flatten(expected).items():
        np.testing.assert_array_equal(flatten(found)[path], leaf, err_msg="/".join(path))


def test_the_revision_travels_with_the_checkpoint(published, tmp_path):
    config = published / "config.json"
    values = json.loads(config.read_text())
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps({**values, "revision": "current"}))
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / "source" / weights).write_bytes((published / weights).read_bytes())
    lines: list[str] = []
    import_model(tmp_path / "source", tmp_path / "ours", report=lines.append)
    assert any("current revision" in line for line in lines)
    kept = SanaWMConfig.from_dict(json.loads((tmp_path / "ours" / "config.json").read_text()))
    assert kept.revision == "current"
    assert SanaWMConfig.from_dict(values).revision == "legacy"
    # diffusers would not say that it computes another revision, so an export does
    export_model(tmp_path / "ours", tmp_path / "back", report=lines.append)
    assert any("the revision is current" in line and "as legacy" in line for line in lines)


def test_the_revision_of_an_original_file_can_be_named(published, tmp_path, monkeypatch):
    monkeypatch.setitem(original_world_model.CROSS_HEADS, 48, 4)
    save_file(original(torch_model("convolved patches").state_dict()), tmp_path / "a.safetensors")
    for revision in ("legacy", "current"):
        lines: list[str] = []
        choices = Choices(revision=revision)
        import_model(tmp_path / "a.safetensors", tmp_path / revision, choices, report=lines.append)
        assert not any("--revision" in line for line in lines)
        config = json.loads((tmp_path / revision / "transformer" / "config.json").read_text())
        assert SanaWMConfig.from_dict(config).revision == revision
    with pytest.raises(UserError, match="--revision current is for an original file"):
        import_model(published, tmp_path / "ours", Choices(revision="current"), report=silent)
    with pytest.raises(UserError, match="revision='newest' is not known"):
        import_model(tmp_path / "a.safetensors", tmp_path / "ours", Choices(revision="newest"), report=silent)


def test_weights_of_another_pattern_of_layers_are_refused(published, tmp_path):
    (tmp_path / "source").mkdir()
    values = json.loads((published / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**values, "softmax_every_n": 3}))
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / "source" / weights).write_bytes((published / weights).read_bytes())
    with pytest.raises(CheckpointError, match=r"missing: .*blocks.1.attn.conv_.*unexpected: .*blocks.2.attn.conv_"):
        import_model(tmp_path / "source", tmp_path / "ours", report=silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
