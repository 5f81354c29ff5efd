"""NVlabs' own checkpoints: names, joined tensors, the inferred configuration."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import SanaTransformer2DModel
from safetensors.torch import save_file

from configs.published import PUBLISHED_TRANSFORMERS
from convert import original as original_files
from convert.engine import export_model, import_model
from convert.original import infer_config
from convert.renames import RenamedSource
from convert.sources import Choices, open_model
from convert.tables import sana_original
from sana_jax.errors import CheckpointError, UserError
from sana_jax.models.sana import SanaConfig
from sana_jax.weights.safetensors_files import TensorInfo
from tests.convert.cases import as_original, as_original_controlnet, controlnet, tensors_of, transformer

pytestmark = pytest.mark.usefixtures("tiny_widths")


class Shapes:
    """A source of names and shapes."""

    location = "reference"

    def __init__(self, shapes: dict[str, list[int]]) -> None:
        self.tensors = {name: TensorInfo(np.dtype(np.float32), tuple(shape)) for name, shape in shapes.items()}


def silent(_: str) -> None:
    pass


@pytest.mark.parametrize("variant", ["sana-1.0", "sana-1.5", "sprint"])
@pytest.mark.parametrize("end", ["pth", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_transformer(variant, end, dtype, tmp_path):
    model = transformer(variant, dtype)
    state = as_original(model.state_dict())
    if end == "pth":
        torch.save({"state_dict": state, "epoch": 1}, tmp_path / "a.pth")
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "a.safetensors")
    file = tmp_path / f"a.{end}"
    lines: list[str] = []
    import_model(file, tmp_path / "ours", report=lines.append)
    assert any("y_embedder.y_embedding" in line and "pos_embed" in line for line in lines)
    export_model(tmp_path / "ours", tmp_path / "back", report=silent)
    export_model(file, tmp_path / "at once", report=silent)
    for directory in ("back", "at once"):
        loaded, info = SanaTransformer2DModel.from_pretrained(
            tmp_path / directory / "transformer", torch_dtype=dtype, output_loading_info=True
        )
        assert not any(info.values())
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
        ignored = ("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values")
        assert {k: v for k, v in loaded.config.items() if k not in ignored} == {
            k: v for k, v in model.config.items() if k not in ignored
        }
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    scheduler = json.loads((tmp_path / "ours" / "scheduler" / "scheduler_config.json").read_text())
    if variant == "sprint":
        assert index["_class_name"] == "SanaSprintPipeline"
        assert scheduler["_class_name"] == "SCMScheduler"
    else:
        assert index["_class_name"] == "SanaPipeline"
        assert scheduler["flow_shift"] == 3.0
        assert any("flow shift 3" in line for line in lines)


def test_a_controlnet(tmp_path):
    model, base = controlnet(), transformer()
    torch.save({"state_dict": as_original_controlnet(model.state_dict(), base.state_dict())}, tmp_path / "a.pth")
    lines: list[str] = []
    import_model(tmp_path / "a.pth", tmp_path / "ours", report=lines.append)
    assert any("tensors of the transformer beside the ControlNet" in line for line in lines)
    export_model(tmp_path / "ours", tmp_path / "back", report=silent)
    model.save_pretrained(tmp_path / "published")
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "published")
    type(model).from_pretrained(tmp_path / "back")


def test_every_original_name_of_the_reference_is_in_the_table():
    """The names and shapes that published 1.6B files have, width 2240, joined tensors included."""
    names = {
        "x_embedder.proj.weight": [2240, 32, 1, 1],
        "y_embedder.y_proj.fc1.weight": [2240, 2304],
        "y_embedder.y_proj.fc2.bias": [2240],
        "attention_y_norm.weight": [2240],
        "t_embedder.mlp.0.weight": [2240, 256],
        "t_embedder.mlp.2.bias": [2240],
        "t_block.1.weight": [13440, 2240],
        "blocks.7.scale_shift_table": [6, 2240],
        "blocks.7.attn.qkv.weight": [6720, 2240],
        "blocks.7.attn.proj.bias": [2240],
        "blocks.7.cross_attn.kv_linear.weight": [4480, 2240],
        "blocks.7.mlp.inverted_conv.conv.weight": [11200, 2240, 1, 1],
        "blocks.7.mlp.depth_conv.conv.weight": [11200, 1, 3, 3],
        "blocks.7.mlp.point_conv.conv.weight": [2240, 5600, 1, 1],
        "final_layer.linear.weight": [32, 2240],
        "final_layer.scale_shift_table": [2, 2240],
    }
    renamed = RenamedSource(Shapes(names), sana_original.transformer_table(guidance=False), sana_original.DROPPED)
    with torch.device("meta"):
        published = SanaTransformer2DModel().state_dict()
    assert renamed.tensors
    for name, info in renamed.tensors.items():
        assert info.shape == tuple(published[name].shape), name
    assert "transformer_blocks.7.attn1.to_v.weight" in renamed.tensors
    assert "transformer_blocks.7.attn2.to_v.weight" in renamed.tensors


def test_feed_forwards_saved_as_matrices(tmp_path):
    model = transformer()
    state = as_original(model.state_dict())
    for name in list(state):
        if ".inverted_conv.conv." in name or ".point_conv.conv." in name:
            tensor = state.pop(name)
            state[name.replace(".conv.", ".linear.")] = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
    torch.save(state, tmp_path / "a.pth")
    export_model(tmp_path / "a.pth", tmp_path / "back", report=silent)
    model.save_pretrained(tmp_path / "published")
    assert tensors_of(tmp_path / "back" / "transformer") == tensors_of(tmp_path / "published")


@pytest.mark.parametrize(("size", "interpolation", "shift"), [(512, None, 3), (2048, 1.0, 3), (4096, 2.0, 6)])
def test_image_sizes(size, interpolation, shift, tmp_path):
    torch.save(as_original(transformer().state_dict(), size), tmp_path / "a.pth")
    model = open_model(tmp_path / "a.pth")
    config = model.components[0].config
    assert config["sample_size"] == size // 32
    assert config["interpolation_scale"] == interpolation
    assert model.written["scheduler/scheduler_config.json"]["flow_shift"] == shift
    assert model.contract.flow_shift == shift
    chosen = open_model(tmp_path / "a.pth", Choices(image_size=1024, flow_shift=1.5))
    assert chosen.components[0].config["sample_size"] == 32
    assert chosen.contract.flow_shift == 1.5


def test_what_cannot_be_inferred_is_asked_for(tmp_path):
    state = as_original(transformer().state_dict())
    del state["pos_embed"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match="--image-size with one of 512, 1024, 2048, 4096"):
        import_model(tmp_path / "a.pth", tmp_path / "ours", report=silent)
    with pytest.raises(UserError, match="768 is not a published size"):
        import_model(tmp_path / "a.pth", tmp_path / "ours", Choices(image_size=768), report=silent)
    import_model(tmp_path / "a.pth", tmp_path / "ours", Choices(image_size=1024), report=silent)
    with pytest.raises(UserError, match="--variant"):
        import_model(tmp_path / "a.pth", tmp_path / "other", Choices(variant="bf16"), report=silent)


def test_an_unknown_width_is_named(tmp_path):
    config = {"num_attention_heads": 8, "cross_attention_dim": 64, "num_cross_attention_heads": 4}
    torch.save(as_original(transformer(**config).state_dict()), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="width 64"):
        import_model(tmp_path / "a.pth", tmp_path / "ours", report=silent)


def test_raw_and_averaged_weights(tmp_path):
    raw, average = transformer().state_dict(), transformer("sana-1.5").state_dict()
    torch.save({"state_dict": as_original(raw), "state_dict_ema": as_original(average)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="--weights params or --weights ema"):
        open_model(tmp_path / "a.pth")
    assert open_model(tmp_path / "a.pth", Choices(weights="params")).components[0].config["qk_norm"] is None
    model = open_model(tmp_path / "a.pth", Choices(weights="ema"))
    assert model.components[0].config["qk_norm"] is not None
    assert any("state_dict_ema is read" in note for note in model.notes)


def test_the_other_components_come_from_a_published_model(tmp_path, published):
    torch.save(as_original(transformer().state_dict()), tmp_path / "a.pth")
    import_model(tmp_path / "a.pth", tmp_path / "ours", components_from=published("sana-1.0"), report=silent)
    export_model(tmp_path / "ours", tmp_path / "back", report=silent)
    import diffusers

    pipeline = diffusers.SanaPipeline.from_pretrained(tmp_path / "back")
    wanted = transformer().state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in pipeline.transformer.state_dict().items())
    assert pipeline.scheduler.config.flow_shift == 3.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.attn.qkv.weight"), r"transformer_blocks.1.attn1.to_[kqv].weight \[32, 32\]"),
        (lambda s: s.update({"blocks.1.extra": torch.zeros(2)}), r"unexpected: blocks.1.extra float32\[2\]"),
        (lambda s: s.update({"blocks.1.attn.qkv.weight": torch.zeros(95, 32)}), "is not 3 tensors of one size"),
        (lambda s: s.update({"blocks.1.attn.qkv.weight": torch.zeros(93, 32)}), "of another shape"),
        (lambda s: s.pop("y_embedder.y_proj.fc1.weight"), "caption_projection.linear_1.weight is missing"),
        (lambda s: s.pop("x_embedder.proj.weight"), "looks like an original SANA"),
        (lambda s: s.update({"x_embedder.proj.weight": torch.zeros(32, 8, 1, 2, 2)}), "looks like"),
        (lambda s: s.update({"transformer_blocks.0.scale_shift_table": torch.zeros(6, 32)}), "name the directory"),
        (lambda s: (s.clear(), s.update({"blocks.0.mlp.t_conv.weight": torch.zeros(2)})), "looks like SANA-Video"),
        (lambda s: (s.clear(), s.update({"transformer.x.lora_A.weight": torch.zeros(2)})), "looks like a LoRA"),
        (lambda s: (s.clear(), s.update({"zebra": torch.zeros(2)})), "holds no network that is known"),
    ],
)
def test_files_that_do_not_fit(change, message, tmp_path):
    state = as_original(transformer().state_dict())
    change(state)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=message):
        import_model(tmp_path / "a.pth", tmp_path / "ours", report=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_published_sizes_are_inferred(monkeypatch):
    """Full-size names and shapes of every published transformer, on no memory at all."""
    monkeypatch.setattr(original_files, "_HEAD_SIZE", 32)
    for name, published in PUBLISHED_TRANSFORMERS.items():
        wanted = published.config
        fields = {k: v for k, v in wanted.to_dict().items() if not k.startswith("_")}
        with torch.device("meta"):
            state = SanaTransformer2DModel(**fields).state_dict()
        size = 32 * wanted.sample_size
        original = {
            k: TensorInfo(torch.zeros(1).numpy().dtype, tuple(v.shape)) for k, v in as_original(state, size).items()
        }

        class Source:
            location = name
            tensors = original

        import convert.original as module

        table = sana_original.transformer_table(guidance=wanted.guidance_embeds)
        renamed = RenamedSource(Source(), table, sana_original.DROPPED)
        module._HEAD_SIZE, before = 32, module._HEAD_SIZE
        try:
            assert SanaConfig.from_dict(infer_config(renamed, None)) == wanted, name
        finally:
            module._HEAD_SIZE = before
        assert set(renamed.tensors) == set(state)
