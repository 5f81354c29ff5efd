"""A Gemma-3 with an image tower through ``convert``: in and out again with the tower that is not ours, and verified."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma3ForConditionalGeneration

from convert import main
from sana_jax.text_encoders.gemma3 import Gemma3TextEncoder
from tests.parity.test_gemma3 import save_with_images
from tests.text_encoders import tiny_gemma


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp("refiner")
    tokenizer = tiny_gemma.gemma_like_tokenizer(begin_token=True)
    tiny_gemma.save_tokenizer(tokenizer, directory / "tokenizer", published_as_gemma=True)
    save_with_images(directory / "text_encoder", tokenizer.get_vocab_size())
    return directory


def run(*words) -> int:
    return main.main([str(word) for word in words])


def test_inspect(published, capsys):
    assert run("inspect", published / "text_encoder") == 0
    text = capsys.readouterr().out
    assert "Gemma-3 of 4 layers, width 24" in text
    assert "everything fits" in text


def test_import_and_export(published, tmp_path):
    ours = tmp_path / "ours"
    assert run("import", published / "text_encoder", ours / "text_encoder") == 0
    (ours / "tokenizer").symlink_to(published / "tokenizer")
    found, mask = Gemma3TextEncoder.from_directory(ours).encode(["a red panda"])
    expected, _ = Gemma3TextEncoder.from_directory(published).encode(["a red panda"])
    np.testing.assert_array_equal(np.asarray(found)[mask == 1], np.asarray(expected)[mask == 1])
    assert run("export", ours / "text_encoder", tmp_path / "theirs") == 0
    before, after = (
        load_file(folder / "model.safetensors") for folder in (published / "text_encoder", tmp_path / "theirs")
    )
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] == "gemma3"
    _, report = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_verify(published, capsys):
    assert run("verify", published / "text_encoder") == 0
    text = capsys.readouterr().out
    assert "layers.3.self_attn" in text
    assert "prompt 2: encoding" in text
