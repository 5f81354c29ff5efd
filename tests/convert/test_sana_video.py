"""SANA-Video's transformer: published -> ours -> published bit for bit, and NVlabs' own files of it and of LongSANA."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
import torch
from diffusers import SanaVideoTransformer3DModel

from convert import original as original_files
from convert.engine import export_model, import_model
from convert.original import infer_video_config
from convert.renames import RenamedSource
from convert.sources import Choices, open_model
from convert.tables import sana_video_original
from convert.verify import verify_model
from sana_jax.diffusion.samplers import LongSanaSampler, from_scheduler_config
from sana_jax.errors import CheckpointError, UserError
from sana_jax.models.sana_video import SanaVideoConfig
from sana_jax.weights.safetensors_files import TensorInfo
from tests.convert.cases import as_original, tensors_of
from tests.parity.sana_video_oracle import TINY, torch_model

# width -> heads of self-attention and of cross-attention
HEAD_SIZES = {TINY["cross_attention_dim"]: (TINY["attention_head_dim"], TINY["cross_attention_head_dim"])}
IGNORED = ("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values")


@pytest.fixture(autouse=True)
def tiny_heads(monkeypatch):
    """The tiny network's width among those whose heads are known."""
    for width, sizes in HEAD_SIZES.items():
        monkeypatch.setitem(original_files._VIDEO_HEAD_SIZES, width, sizes)


def silent(_: str) -> None:
    pass


def model(dtype: torch.dtype = torch.float32, variant: str = "patch-2") -> SanaVideoTransformer3DModel:
    return torch_model(variant, dtype)


@pytest.mark.parametrize(("variant", "dtype"), [("patch-2", torch.float32), ("plain", torch.bfloat16)], ids=str)
def test_published_weights_come_back_bit_for_bit(variant, dtype, tmp_path):
    model(dtype, variant).save_pretrained(tmp_path / "published")
    lines: list[str] = []
    import_model(tmp_path / "published", tmp_path / "ours", report=lines.append)
    assert any("SANA-Video of " in line and "parameters" in line for line in lines)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", "params"]
    export_model(tmp_path / "ours", tmp_path / "back", report=silent)
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "published")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (tmp_path / "published" / "config.json").read_text()
    )
    _, info = SanaVideoTransformer3DModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("kind", ["SANA-Video", "LongSANA"])
def test_original_files(kind, tmp_path):
    """A file of weights, and a training file with generator, critic and averaged generator."""
    published = model()
    original = as_original(published.state_dict())
    assert original["blocks.0.mlp.t_conv.weight"].shape == (32, 32, 3, 1)
    if kind == "SANA-Video":
        saved, choices = {"state_dict": original, "epoch": 1}, Choices()
    else:
        named = {f"model.{name}": tensor for name, tensor in original.items()}
        others = {name: torch.zeros_like(tensor) for name, tensor in named.items()}
        saved = {"generator": others, "critic": others, "generator_ema": named}
        choices = Choices(weights="ema", flow_shift=7.0)
    torch.save(saved, tmp_path / "a.pth")
    lines: list[str] = []
    import_model(tmp_path / "a.pth", tmp_path / "ours", choices, report=lines.append)
    assert any("y_embedder.y_embedding" in line for line in lines)
    export_model(tmp_path / "ours", tmp_path / "back", report=silent)
    loaded, info = SanaVideoTransformer3DModel.from_pretrained(
        tmp_path / "back" / "transformer", output_loading_info=True
    )
    assert not any(info.values())
    assert all(torch.equal(tensor, published.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    fields = ({k: v for k, v in m.config.items() if k not in IGNORED} for m in (loaded, published))
    found, wanted = ({**values, "patch_size": list(values["patch_size"])} for values in fields)
    assert found == wanted
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["_class_name"] == ("SanaVideoPipeline" if kind == "SANA-Video" else "LongSanaVideoPipeline")
    assert index["contract"]["family"].startswith(kind)
    assert index["contract"]["frame_rule"].startswith("as the autoencoder has it")  # five channels are no autoencoder's
    scheduler = json.loads((tmp_path / "ours" / "scheduler" / "scheduler_config.json").read_text())
    if kind == "LongSANA":
        assert from_scheduler_config(scheduler) == LongSanaSampler(flow_shift=7.0)
    else:
        assert scheduler["flow_shift"] == 8.0
    assert any("flow shift 8" in line for line in lines) == (kind == "SANA-Video")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.mlp.t_conv.weight"), r"transformer_blocks.1.ff.conv_temp.weight \[32, 32, 3, 1\]"),
        (lambda s: s.update({"blocks.1.extra": torch.zeros(2)}), r"unexpected: blocks.1.extra float32\[2\]"),
        (lambda s: s.update({"blocks.1.mlp.t_conv.weight": torch.zeros(32, 32, 5, 1)}), "of another shape"),
        (lambda s: s.update({"x_embedder.proj.weight": torch.zeros(48, 5, 1, 2, 2)}), "width 48 is not a published"),
        (lambda s: s.pop("final_layer.linear.weight"), "proj_out.weight is missing"),
    ],
)
def test_files_that_do_not_fit(change, message, tmp_path):
    original = as_original(model().state_dict())
    change(original)
    torch.save(original, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        import_model(tmp_path / "a.pth", tmp_path / "ours", report=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_an_option_of_pictures_is_refused(tmp_path):
    torch.save(as_original(model().state_dict()), tmp_path / "a.pth")
    with pytest.raises(UserError, match="--image-size 1024 has no meaning"):
        open_model(tmp_path / "a.pth", Choices(image_size=1024))


@pytest.mark.parametrize(
    "wanted", [SanaVideoConfig.sana_video_2b_480p(), SanaVideoConfig.sana_video_2b_720p()], ids=["480p", "720p"]
)
def test_published_sizes_are_inferred(wanted):
    """Full-size names and shapes, on no memory at all."""
    fields = {name: value for name, value in wanted.to_dict().items() if not name.startswith("_")}
    with torch.device("meta"):
        state = SanaVideoTransformer3DModel(**fields).state_dict()

    source = types.SimpleNamespace(
        location="published",
        tensors={name: TensorInfo(np.dtype(np.float32), tuple(t.shape)) for name, t in as_original(state).items()},
    )
    renamed = RenamedSource(source, sana_video_original.video_transformer_table(), sana_video_original.DROPPED)
    assert SanaVideoConfig.from_dict(infer_video_config(renamed)) == wanted
    assert set(renamed.tensors) == set(state)


def test_verify_compares_it_module_by_module(tmp_path):
    model().save_pretrained(tmp_path / "published")
    lines: list[str] = []
    fine = verify_model(
        tmp_path / "published", height=128, width=192, json_file=tmp_path / "out.json", report=lines.append
    )
    assert fine, lines[-1]
    (found,) = json.loads((tmp_path / "out.json").read_text())["components"]
    rows = {row["module"]: row for row in found["rows"]}
    for name in ("patch_embedding: tokens", "transformer_blocks.1.attn1", "transformer_blocks.2.ff", "output"):
        assert name in rows
    for layer in ("patch_embedding", "transformer_blocks.0.ff.conv_temp", "transformer_blocks.2.attn1.to_q"):
        assert rows[layer]["detail"]
    assert all(row["relative"] < 5e-6 for row in rows.values())
    assert any(row["in_place_relative"] > 0 for row in rows.values() if row["detail"])
