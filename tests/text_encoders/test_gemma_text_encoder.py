"""The Gemma text encoder beside diffusers' SanaPipeline.encode_prompt, its tokenizer beside transformers', mistakes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from transformers import AutoTokenizer, Gemma2Config, Gemma2Model

from sana_jax.errors import CheckpointError, UserError
from sana_jax.models.gemma import Gemma, GemmaConfig, split_layers
from sana_jax.text_encoders import GemmaTextEncoder, load_text_encoder
from sana_jax.text_encoders import gemma as gemma_encoder
from sana_jax.text_encoders.instructions import IMAGE_INSTRUCTION
from sana_jax.text_encoders.tokenizer import PromptTokenizer
from sana_jax.weights import save_params
from tests.parity.gemma_oracle import relative_error
from tests.text_encoders import tiny_gemma

TOLERANCE = 2e-6
PROMPTS = ["A Red Panda reading", "  a cat\n", "a busy city street, 雨の夜 🌧️ with  two  spaces, at dusk " * 3]
TEXTS = [
    "", " ", "a cat", "A cat  sleeping ", "\n\nuser prompt: \n", "naïve café — 雨 🌧️", "<bos> and <unk> and <0x41>",
    "▁▁ marks", "zebra quilt", "\x00\u200b", "a" * 70, "User Prompt: ",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_gemma.save_model_directory(path)
    return path


@pytest.fixture(scope="module")
def encoder(directory):
    return GemmaTextEncoder.from_directory(directory)


@pytest.fixture(scope="module")
def reference(directory):
    return reference_pipeline(directory)


def reference_pipeline(directory) -> SanaPipeline:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    network = Gemma2Model.from_pretrained(
        directory / "text_encoder", attn_implementation="eager", dtype=torch.float32
    ).eval()
    return SanaPipeline(tokenizer, network, None, None, None)


def reference_encoding(pipeline: SanaPipeline, prompts, instruction, max_length=300, negative_prompt=None):
    """(embeddings, mask) of the prompts, or of the negative prompts where these are given."""
    with torch.no_grad():
        embeds, mask, negative, negative_mask = pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=negative_prompt is not None,
            negative_prompt=negative_prompt,
            device=torch.device("cpu"),
            max_sequence_length=max_length,
            complex_human_instruction=None if instruction is None else list(instruction),
        )
    if negative_prompt is not None:
        embeds, mask = negative, negative_mask
    return embeds.numpy(), mask.numpy()


def assert_same(found, expected) -> None:
    (embeds, mask), (expected_embeds, expected_mask) = found, expected
    assert embeds.dtype == np.float32
    assert mask.dtype == np.int32
    np.testing.assert_array_equal(mask, expected_mask)
    assert embeds.shape == expected_embeds.shape
    np.testing.assert_array_equal(embeds[mask == 0], 0.0)
    for row, kept in enumerate(mask == 1):
        if kept.any():
            assert relative_error(embeds[row][kept], expected_embeds[row][kept]) <= TOLERANCE


# --- beside the reference -------------------------------------------------------------------------------------------


def test_the_instruction_is_the_published_one():
    default = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    assert list(IMAGE_INSTRUCTION) == default


@pytest.mark.parametrize("max_length", [300, 40])
@pytest.mark.parametrize("instruction", [IMAGE_INSTRUCTION, None, ("Two lines.", "User Prompt: "), ("x",)])
def test_prompts(encoder, reference, instruction, max_length):
    changed = dataclasses.replace(encoder, complex_human_instruction=instruction, max_length=max_length)
    found = changed.encode(PROMPTS)
    assert_same(found, reference_encoding(reference, PROMPTS, instruction, max_length))
    counts = found[1].sum(1)
    assert counts[1] < counts[0] < counts[2]


@pytest.mark.parametrize("negative", [["blurry", "", "Bad Anatomy, watermark"], [""] * 3])
def test_negative_prompts(encoder, reference, negative):
    expected = reference_encoding(reference, PROMPTS, IMAGE_INSTRUCTION, negative_prompt=negative)
    assert_same(encoder.encode(negative, negative=True), expected)


def test_null_encoding_is_the_begin_token_alone(encoder, reference):
    embeds, mask = encoder.null_encoding()
    assert mask.sum() == 1
    expected = reference_encoding(reference, ["a"], None, negative_prompt=[""])
    assert_same((embeds, mask), expected)


def test_prompts_that_are_too_long(encoder, reference, capsys):
    prompt = "a cat sleeping on a warm windowsill, surrounded by pots and a double-decker bus"
    for instruction in (IMAGE_INSTRUCTION, None):
        changed = dataclasses.replace(encoder, complex_human_instruction=instruction, max_length=8)
        capsys.readouterr()
        found = changed.encode([prompt, "a dog", f"{prompt} at night"])
        lines = [line for line in capsys.readouterr().out.splitlines() if "lost" in line]
        assert_same(found, reference_encoding(reference, [prompt, "a dog", f"{prompt} at night"], instruction, 8))
        assert [line.split(" is longer")[0] for line in lines] == ["prompt 1 of 3", "prompt 3 of 3"]
        for line, text in zip(lines, (prompt, f"{prompt} at night")):
            lost = line.split("lost at its end: ")[1].strip("'")
            assert text.endswith(lost)
            # what is left is what the tokens say, neither more nor less
            kept = text.removesuffix(lost)
            whole = changed.tokenizer.encode(("\n".join(instruction) if instruction else "") + kept, 10_000).ids
            total = 8 if instruction is None else changed.tokenizer.count("\n".join(instruction)) + 6
            assert len(whole) == total
    changed.encode([prompt], negative=True)
    assert "negative prompt is longer" in capsys.readouterr().out


def test_tokenizer_without_begin_token(tmp_path):
    tiny_gemma.save_model_directory(tmp_path, begin_token=False)
    encoder, reference = GemmaTextEncoder.from_directory(tmp_path), reference_pipeline(tmp_path)
    for instruction in (IMAGE_INSTRUCTION, None):
        changed = dataclasses.replace(encoder, complex_human_instruction=instruction)
        assert_same(changed.encode(PROMPTS), reference_encoding(reference, PROMPTS, instruction))
    # no token at all: nothing is computed, all is padding
    embeds, mask = encoder.null_encoding()
    assert mask.sum() == 0
    assert not embeds.any()


# --- shapes, programs, dtypes ---------------------------------------------------------------------------------------


def test_kept_positions_equal_the_whole_padded_computation(encoder):
    instruction = "\n".join(IMAGE_INSTRUCTION)
    total = encoder.tokenizer.count(instruction) + 298
    ids = encoder.tokenizer.encode(instruction + "a red panda reading", total).ids
    padded = np.zeros((1, total), np.int32)
    padded[0, : len(ids)] = ids
    gemma = Gemma(encoder.config)
    mask = (np.arange(total) < len(ids)).astype(np.int32)[None]
    whole = np.asarray(jax.jit(gemma.apply)({"params": encoder.weights.params}, padded, mask))
    selected = whole[:, [0, *range(total - 299, total)]]
    embeds, kept = encoder.encode(["A red panda reading"])
    assert kept.sum() > 4
    assert relative_error(embeds[kept == 1], selected[kept == 1]) <= TOLERANCE


def test_few_programs_each_announced_once(directory, capsys):
    encoder = dataclasses.replace(GemmaTextEncoder.from_directory(directory), complex_human_instruction=None)
    for prompt in ("a cat", "a red panda", "a cat sleeping on a windowsill"):
        encoder.encode([prompt])
    dataclasses.replace(encoder, max_length=20).encode(["a cat"])
    out = capsys.readouterr().out
    assert out.count("compiled the text encoder's layer for 1 prompt of up to 64 tokens") == 1
    encoder.encode(["a cat " * 40])
    assert "up to 128 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_whole_program_equals_the_one_layer_by_layer(directory, monkeypatch, capsys, dtype):
    # on a CPU the layers run one by one; elsewhere in one program
    encoder = GemmaTextEncoder.from_directory(directory, dtype)
    by_layers, mask = encoder.encode(PROMPTS)
    assert "text encoder's layer" in capsys.readouterr().out
    monkeypatch.setattr(gemma_encoder, "is_on_one_cpu", lambda params: False)
    whole, _ = encoder.encode(PROMPTS)
    assert "text encoder for 3 prompts" in capsys.readouterr().out
    assert relative_error(by_layers[mask == 1], whole[mask == 1]) <= (TOLERANCE if dtype == "float32" else 0.01)


def test_split_layers_takes_no_memory():
    stacked = {"kernel": jnp.arange(3 * 64 * 32, dtype=jnp.float32).reshape(3, 64, 32)}
    layers = split_layers(stacked)
    for index, layer in enumerate(layers):
        np.testing.assert_array_equal(layer["kernel"], stacked["kernel"][index])
        offset = layer["kernel"].unsafe_buffer_pointer() - stacked["kernel"].unsafe_buffer_pointer()
        assert offset == index * 64 * 32 * 4


def test_weights_are_read_at_the_first_prompt_and_can_be_freed(directory):
    encoder = GemmaTextEncoder.from_directory(directory)
    assert not encoder.weights.loaded
    first, _ = encoder.encode(["a cat"])
    assert encoder.weights.loaded
    encoder.weights.free()
    assert not encoder.weights.loaded
    again, _ = encoder.encode(["a cat"])
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.float32, None, "float32"),
        (torch.bfloat16, None, "bfloat16"),
        (torch.bfloat16, "float32", "float32"),
        (torch.float32, jnp.bfloat16, "bfloat16"),
        (torch.float16, None, "bfloat16"),
    ],
)
def test_dtypes(tmp_path, capsys, stored, asked, expected):
    tiny_gemma.save_model_directory(tmp_path, dtype=stored)
    encoder = load_text_encoder(tmp_path / "text_encoder", dtype=asked)
    assert jnp.dtype(encoder.dtype).name == expected
    assert ("float16" in capsys.readouterr().out) == (stored == torch.float16)
    leaf = jax.tree.leaves(encoder.weights.params)[0]
    assert leaf.dtype.name == expected
    assert encoder.weights.num_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(encoder.weights.params))
    exact = reference_encoding(reference_pipeline(tmp_path), ["a cat"], None)
    embeds, mask = dataclasses.replace(encoder, complex_human_instruction=None).encode(["a cat"])
    assert embeds.dtype == np.float32
    assert relative_error(embeds[mask == 1], exact[0][mask == 1]) < (TOLERANCE if expected == "float32" else 0.05)


def test_converted_directory(directory, encoder, tmp_path):
    shutil.copytree(directory / "tokenizer", tmp_path / "tokenizer")
    save_params(tmp_path / "text_encoder" / "params", encoder.weights.params)
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(encoder.to_config()))
    converted = load_text_encoder(tmp_path / "text_encoder")
    assert converted.config == encoder.config
    assert converted.dtype == jnp.float32
    for found, expected in zip(converted.encode(["a cat"]), encoder.encode(["a cat"])):
        np.testing.assert_array_equal(found, expected)


# --- the tokenizer --------------------------------------------------------------------------------------------------

TOKENIZERS = {
    "words": (tiny_gemma.word_tokenizer, {}),
    "bytes, no begin token": (lambda: tiny_gemma.gemma_like_tokenizer(begin_token=False), {}),
    "begin token": (lambda: tiny_gemma.gemma_like_tokenizer(begin_token=True), {}),
    "as Gemma is published": (
        lambda: tiny_gemma.gemma_like_tokenizer(begin_token=True),
        {"published_as_gemma": True},
    ),
    "asks for a begin token that it does not add": (
        lambda: tiny_gemma.gemma_like_tokenizer(begin_token=False),
        {"add_bos_token": True},
    ),
    "asks for none and adds it": (
        lambda: tiny_gemma.gemma_like_tokenizer(begin_token=True),
        {"add_bos_token": False},
    ),
    "splits special tokens": (
        lambda: tiny_gemma.gemma_like_tokenizer(begin_token=True),
        {"split_special_tokens": True},
    ),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_token_ids(tmp_path, capsys, kind):
    make, config = TOKENIZERS[kind]
    tiny_gemma.save_tokenizer(make(), tmp_path, **config)
    ours, theirs = PromptTokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ("add_bos_token" in capsys.readouterr().out) == ("begin token that" in kind or "asks for none" in kind)
    for text in TEXTS:
        assert ours.encode(text, 1000).ids == theirs(text).input_ids, text
        assert ours.count(text) == len(theirs.encode(text))
        for limit in (1, 5):
            cut = ours.encode(text, limit)
            assert cut.ids == theirs(text, truncation=True, max_length=limit).input_ids
            assert len(cut.ids) + cut.lost_tokens == len(theirs(text).input_ids)
            assert (cut.end is None) == (cut.lost_tokens == 0)


def test_stored_truncation_and_padding_are_not_used(tmp_path):
    tokenizer = tiny_gemma.gemma_like_tokenizer(begin_token=True)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(direction="left", length=12)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(PromptTokenizer.from_directory(tmp_path).encode("a cat sleeping", 100).ids) > 3
    assert PromptTokenizer.from_directory(tmp_path).encode("", 100).ids == [2]


def test_the_last_space_of_the_instruction_merges_with_the_prompt(encoder):
    alone = encoder.tokenizer.encode("user prompt: ", 100).ids
    together = encoder.tokenizer.encode("user prompt: cat", 100).ids
    assert alone[:-1] == together[: len(alone) - 1]
    assert alone[-1] != together[len(alone) - 1]


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "  \n", None, 3, b"a", "a \ud800"])
def test_prompts_that_are_not_allowed(encoder, prompt):
    with pytest.raises(UserError, match="prompt"):
        encoder.encode(["a cat", prompt])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_length", 1),
        ("max_length", 2.5),
        ("max_length", True),
        ("complex_human_instruction", "one text"),
        ("complex_human_instruction", ("line", 3)),
        ("complex_human_instruction", True),
        ("dtype", "float16"),
        ("dtype", "int8"),
        ("dtype", "nonsense"),
    ],
)
def test_settings_that_are_not_allowed(encoder, field, value):
    with pytest.raises(UserError) as caught:
        dataclasses.replace(encoder, **{field: value})
    assert str(value) in str(caught.value)


def test_no_instruction_in_several_spellings(encoder):
    for nothing in (None, [], (), False):
        assert dataclasses.replace(encoder, complex_human_instruction=nothing).complex_human_instruction is None


def damage_tokenizer(path) -> dict:
    """How files of a tokenizer directory can be wrong: name -> (change, error, part of the message)."""
    file, config = path / "tokenizer.json", path / "tokenizer_config.json"
    whole = json.loads(file.read_text()) if file.is_file() else {}

    def write(**changes):
        file.write_text(json.dumps({**whole, **changes}))

    def configure(content):
        config.write_text(content if isinstance(content, str) else json.dumps(content))

    return {
        "missing": (lambda: file.unlink(), FileNotFoundError, "tokenizer.json is missing"),
        "old format": (
            lambda: (file.unlink(), (path / "tokenizer.model").write_bytes(b"x")),
            FileNotFoundError,
            "save_pretrained",
        ),
        "empty": (lambda: file.write_bytes(b""), CheckpointError, "not a tokenizer"),
        "cut": (lambda: file.write_bytes(file.read_bytes()[:300]), CheckpointError, "not a tokenizer"),
        "nested": (lambda: file.write_text("[" * 100_000), CheckpointError, "not a tokenizer"),
        "binary": (lambda: file.write_bytes(b"\x80\x02c__builtin__\neval\n"), CheckpointError, "not a tokenizer"),
        "pointer": (
            lambda: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            CheckpointError,
            "git lfs pull",
        ),
        "types": (lambda: write(model=[1]), CheckpointError, "not a tokenizer"),
        "merges": (
            lambda: write(model={**whole["model"], "merges": [["no", "such"]]}),
            CheckpointError,
            "not a tokenizer",
        ),
        "dropout": (lambda: write(model={**whole["model"], "dropout": 0.5}), UserError, "dropout"),
        "config": (lambda: configure("{"), CheckpointError, "tokenizer_config.json is damaged"),
        "config list": (lambda: configure([]), CheckpointError, "list"),
        "config nested": (lambda: configure("[" * 100_000), CheckpointError, "tokenizer_config.json is damaged"),
        "cut from the left": (lambda: configure({"truncation_side": "left"}), UserError, "left"),
        "other tokens": (
            lambda: configure({"added_tokens_decoder": {"7": {"content": "<bos>"}}}),
            CheckpointError,
            "'<bos>' as 7",
        ),
        "tokens as text": (lambda: configure({"added_tokens_decoder": "x"}), CheckpointError, "added_tokens_decoder"),
    }


@pytest.mark.parametrize("damage", damage_tokenizer(Path("nowhere")))
def test_damaged_tokenizers(directory, tmp_path, damage):
    shutil.copytree(directory / "tokenizer", tmp_path / "tokenizer")
    change, error, part = damage_tokenizer(tmp_path / "tokenizer")[damage]
    change()
    with pytest.raises(error) as caught:
        PromptTokenizer.from_directory(tmp_path / "tokenizer")
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tokenizers_library_is_missing(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        PromptTokenizer.from_directory(directory / "tokenizer")


def test_tokens_that_the_network_does_not_have(encoder):
    smaller = dataclasses.replace(encoder.config, vocab_size=50)
    with pytest.raises(UserError, match="vocab_size 50"):
        dataclasses.replace(encoder, config=smaller).encode(["a cat"])


def test_model_directories_that_are_not_allowed(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "model")
    path = tmp_path / "model" / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    for changes, part in (
        ({"model_type": "t5"}, "model_type 't5'"),
        ({"model_type": ["gemma2"]}, "model_type"),
        ({"hidden_size": "24"}, "hidden_size='24'"),
        ({"intermediate_size": 65}, "does not fit"),
    ):
        path.write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError) as caught:
            load_text_encoder(path.parent)
        assert part in str(caught.value)
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="float16"):
        load_text_encoder(path.parent, dtype="float16")
    with pytest.raises(FileNotFoundError, match="fp16"):
        load_text_encoder(path.parent, variant="fp16")
    (path.parent / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_text_encoder(path.parent)


def test_an_option_that_would_not_be_used(tmp_path):
    words = {"_class_name": "WordEncoder", "vocabulary": ["a"], "embedding_dim": 4, "max_length": 3, "seed": 0}
    (tmp_path / "config.json").write_text(json.dumps(words))
    for options in ({"dtype": "float32"}, {"variant": "bf16"}):
        with pytest.raises(UserError, match="no weights"):
            load_text_encoder(tmp_path, **options)


def test_configuration_of_the_published_encoder():
    assert GemmaConfig.from_dict(json.loads(json.dumps(GemmaConfig().to_dict()))) == GemmaConfig()
    assert GemmaConfig.from_dict(Gemma2Config().to_dict()) == GemmaConfig()
