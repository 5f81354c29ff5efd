"""A SigLIP through ``convert``: said what it is, in and out again with the tower that is not ours."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig, SiglipModel, SiglipTextConfig, SiglipVisionModel

from convert import main
from sana_jax.errors import UserError
from sana_jax.image_encoders import SiglipImageEncoder
from tests.parity.test_siglip import PREPROCESSOR, TINY, photographs, randomise


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp("published")
    text = SiglipTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    model = randomise(SiglipModel(SiglipConfig(vision_config=TINY, text_config=text.to_dict())), 7)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, directory / "model.safetensors")
    model.config.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return directory


def run(*words) -> int:
    return main.main([str(word) for word in words])


def test_inspect(published, capsys):
    assert run("inspect", published) == 0
    text = capsys.readouterr().out
    assert "SigLIP vision of 3 layers, width 48, 29 px in patches of 8" in text
    assert "everything fits" in text


def test_import_and_export(published, tmp_path, capsys):
    assert run("import", published, tmp_path / "ours") == 0
    pictures = photographs()
    expected = SiglipImageEncoder.from_directory(published).encode(pictures)
    np.testing.assert_array_equal(SiglipImageEncoder.from_directory(tmp_path / "ours").encode(pictures), expected)
    assert run("export", tmp_path / "ours", tmp_path / "theirs") == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (published, tmp_path / "theirs"))
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert json.loads((tmp_path / "theirs" / "preprocessor_config.json").read_text()) == PREPROCESSOR
    assert SiglipModel.from_pretrained(tmp_path / "theirs").config.vision_config.image_size == 29


def test_a_tower_alone(published, tmp_path, capsys):
    SiglipModel.from_pretrained(published).vision_model.save_pretrained(tmp_path / "alone")
    assert run("import", tmp_path / "alone", tmp_path / "ours") == 0
    assert run("export", tmp_path / "ours", tmp_path / "theirs") == 0
    before, after = (SiglipVisionModel.from_pretrained(tmp_path / name).state_dict() for name in ("alone", "theirs"))
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def test_verify_says_that_it_has_nothing_to_compare_with(published):
    with pytest.raises(UserError, match="SigLIP vision of 3 layers"):
        run("verify", published)


def test_damage_is_named(published, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((published / name).read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["vision_model.head.probe"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert run("inspect", tmp_path) == 1
    assert "missing: vision_model.head.probe [1, 1, 48]" in capsys.readouterr().out
