"""A model with a LoRA in its weights: the same as diffusers' own fusing, and nothing else changed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline

from convert.engine import import_model
from convert.lora import merge_model
from convert.main import main
from sana_jax.errors import CheckpointError, UserError
from sana_jax.weights.safetensors_files import SafetensorsSource
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
