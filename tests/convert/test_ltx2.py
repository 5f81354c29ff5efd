"""LTX-2's transformer and connectors: the video half is read, what is left out is said, and nothing else is lost."""

from __future__ import annotations

import json
import re

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel

from convert.engine import export_model, import_model
from convert.sources import open_model
from sana_jax.errors import CheckpointError
from sana_jax.weights.safetensors_files import TensorInfo, write_safetensors
from sana_jax.weights.tables.ltx2 import AUDIO
from tests.convert.cases import tensors_of
from tests.parity import ltx2_oracle as oracle

NAMES = {
    "transformer": ("the audio half", "video half of LTX-2 of 2 blocks, width 28"),
    "connectors": ("the audio connector", "LTX-2's video connector of 2 blocks, width 16"),
}


def silent(_: str) -> None:
    pass


def model(kind: str):
    return oracle.torch_model("split, gates") if kind == "transformer" else oracle.torch_connectors("split")


@pytest.mark.parametrize("kind", NAMES)
def test_there_and_back(kind, tmp_path):
    part, family = NAMES[kind]
    model(kind).save_pretrained(tmp_path / "published")
    published = tensors_of(tmp_path / "published")
    audio = {name for name in published if any(re.fullmatch(pattern, name) for pattern in AUDIO)}
    lines: list[str] = []
    import_model(tmp_path / "published", tmp_path / "ours", report=lines.append)
    assert any(family in line for line in lines)
    count = sum(parameter.numel() for name, parameter in model(kind).named_parameters() if name in audio)
    (line,) = (line for line in lines if "are left out" in line)
    assert f"{len(audio)} tensors ({count:,} parameters) of {part}" in line

    lines.clear()
    export_model(tmp_path / "ours", tmp_path / "back", report=lines.append)
    assert any(f"exported without {part}" in line for line in lines)
    assert tensors_of(tmp_path / "back") == {name: t for name, t in published.items() if name not in audio}
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("back", "published")]
    assert configs[0] == configs[1]

    lines.clear()
    export_model(tmp_path / "published", tmp_path / "whole", report=lines.append)
    assert tensors_of(tmp_path / "whole") == published
    assert not any("without" in line for line in lines)


def test_a_model_of_both_is_opened(tmp_path):
    """Also under LTX-2's own class name."""
    model("transformer").save_pretrained(tmp_path / "transformer")
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    config["_class_name"] = LTX2VideoTransformer3DModel.__name__
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    model("connectors").save_pretrained(tmp_path / "connectors")
    index = {"_class_name": "SanaWMLTX2Refiner"} | {name: ["diffusers", "?"] for name in NAMES}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    opened = open_model(tmp_path)
    assert {part.folder for part in opened.components} == set(NAMES)
    assert not opened.failures
    assert opened.contract.family == "SANA-WM's refiner, LTX-2 of 2 blocks, width 28"


def test_a_damaged_file_is_refused(tmp_path):
    model("transformer").save_pretrained(tmp_path / "a")
    tensors = {name: tensor.numpy() for name, tensor in model("transformer").state_dict().items()}
    del tensors["transformer_blocks.1.attn2.to_gate_logits.weight"]
    tensors["transformer_blocks.1.attn3.weight"] = torch.zeros(2).numpy()
    infos = {name: TensorInfo(array.dtype, array.shape) for name, array in tensors.items()}
    write_safetensors(tmp_path / "a" / "diffusion_pytorch_model.safetensors", infos, tensors.items())
    with pytest.raises(CheckpointError, match=r"to_gate_logits.weight \[2, 28\].*attn3.weight"):
        import_model(tmp_path / "a", tmp_path / "ours", report=silent)
