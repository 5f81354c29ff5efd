"""Gemma-3's encoder beside the refiner's own way of tokenising and running it in diffusers; files and mistakes."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Gemma3ForConditionalGeneration
from transformers import Gemma3Config as TorchConfig

from sana_jax.errors import CheckpointError, UserError
from sana_jax.text_encoders import gemma3, load_text_encoder
from sana_jax.text_encoders.gemma3 import Gemma3TextEncoder
from tests.parity.gemma_oracle import relative_error
from tests.text_encoders import tiny_gemma

TOLERANCE = 2e-6
LENGTH = 96
PROMPTS = ["  A red panda Reading\n", "a street at dusk, 雨の夜 with  two  spaces " * 3]
TEXT = {
    "head_dim": 8, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 3, "query_pre_attn_scalar": 8, "sliding_window": 7, "max_position_embeddings": 512,
    "sliding_window_pattern": 2, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}  # fmt: skip
VISION = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("refiner")
    tokenizer = tiny_gemma.gemma_like_tokenizer(begin_token=True)
    tiny_gemma.save_tokenizer(tokenizer, path / "tokenizer", published_as_gemma=True)
    text = {**TEXT, "vocab_size": tokenizer.get_vocab_size()}
    model = Gemma3ForConditionalGeneration(TorchConfig(text_config=text, vision_config=VISION))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "embed" in name else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path / "text_encoder")
    return path


@pytest.fixture(scope="module")
def encoder(directory):
    return dataclasses.replace(Gemma3TextEncoder.from_directory(directory), max_length=LENGTH)


@pytest.fixture(scope="module")
def reference(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    model = Gemma3ForConditionalGeneration.from_pretrained(
        directory / "text_encoder", attn_implementation="eager", dtype=torch.float32
    ).eval()

    def encode(prompts, length=LENGTH):
        inputs = tokenizer(
            [prompt.strip() for prompt in prompts], padding="max_length", padding_side="left", max_length=length,
            truncation=True, add_special_tokens=True, return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad():
            outputs = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, output_hidden_states=True)
        return torch.stack(outputs.hidden_states, dim=-1).numpy(), inputs.attention_mask.numpy()

    return encode


def check(found, expected) -> None:
    (states, mask), (expected_states, expected_mask) = found, expected
    np.testing.assert_array_equal(mask, expected_mask)
    assert states.shape == expected_states.shape
    for row, kept in enumerate(mask == 1):
        for layer in range(states.shape[-1]):
            ours, theirs = states[row, kept][..., layer], expected_states[row, kept][..., layer]
            assert relative_error(ours, theirs) <= TOLERANCE


def test_prompts(encoder, reference):
    found = encoder.encode(PROMPTS)
    check(found, reference(PROMPTS))
    counts = found[1].sum(1)
    assert 1 < counts[0] < 64 < counts[1]  # one more than the shortest program has


def test_one_program_gives_the_same(encoder, monkeypatch):
    apart, mask = encoder.encode(PROMPTS[0])
    monkeypatch.setattr(gemma3, "is_on_one_cpu", lambda params: False)
    lines = []
    whole, _ = dataclasses.replace(encoder, say=lines.append, _compiled={}).encode(PROMPTS[:1])
    assert relative_error(np.asarray(whole)[mask == 1], np.asarray(apart)[mask == 1]) <= TOLERANCE
    np.testing.assert_array_equal(np.asarray(whole)[:, : LENGTH - 64], 0)
    assert "1 prompt of up to 64 tokens" in lines[0]


def test_a_long_prompt_loses_its_end_aloud(encoder, reference):
    lines = []
    shorter = dataclasses.replace(encoder, max_length=9, say=lines.append)
    check(shorter.encode(PROMPTS[1:]), reference(PROMPTS[1:], 9))
    said = [line for line in lines if "longer than max_sequence_length=9" in line]
    assert len(said) == 1
    assert "two spaces" in said[0]


def test_the_dtype_follows_the_files(directory, encoder):
    assert encoder.dtype == jnp.float32
    half = Gemma3TextEncoder.from_directory(directory, dtype="bfloat16")
    assert half.max_length == 1024
    assert half.state_count == 4
    states, mask = dataclasses.replace(half, max_length=16).encode(PROMPTS[:1])
    assert states.dtype == jnp.bfloat16
    assert mask.shape == (1, 16)
    half.weights.free()
    assert not half.weights.loaded


def test_mistakes(directory, encoder, tmp_path):
    for prompts, part in (([""], "empty"), ([" \n"], "empty"), ([3], "int")):
        with pytest.raises(UserError, match=part):
            encoder.encode(prompts)
    with pytest.raises(UserError, match="float16"):
        Gemma3TextEncoder.from_directory(directory, dtype="float16")
    with pytest.raises(UserError, match="max_sequence_length 1 "):
        dataclasses.replace(encoder, max_length=1)
    # one that SANA's own pipelines ask for is Gemma-2
    with pytest.raises(UserError, match="gemma3"):
        load_text_encoder(directory / "text_encoder")
    (tmp_path / "tokenizer").symlink_to(directory / "tokenizer")
    (tmp_path / "text_encoder").mkdir()
    for file in (directory / "text_encoder").iterdir():
        (tmp_path / "text_encoder" / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "text_encoder" / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4
    config["text_config"]["layer_types"] = None
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.3"):
        Gemma3TextEncoder.from_directory(tmp_path)
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    with pytest.raises(UserError, match="gemma2"):
        Gemma3TextEncoder.from_directory(tmp_path)
