"""SigLIP's text tower against transformers, its texts' tokens, and the scores of pictures with texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, SiglipConfig, SiglipModel, SiglipTextConfig
from transformers import SiglipTextModel as TorchTextModel

from convert.main import main as convert
from sana_jax.errors import CheckpointError, UserError
from sana_jax.models.siglip_text import SiglipTextConfig as OurConfig
from sana_jax.models.siglip_text import SiglipTextModel, init_params
from sana_jax.text_encoders.siglip import SiglipTextEncoder
from sana_jax.weights.rules import TreeSource, read_params
from sana_jax.weights.tables.siglip import siglip_text_rules
from sana_jax.weights.trees import abstract_tree
from tests.parity.gemma_oracle import StateDict, relative_error, to_numpy
from tests.parity.test_siglip import PREPROCESSOR, photographs, randomise
from tests.parity.test_siglip import TINY as VISION
from train.evaluation.text_score import TextScorer

torch.set_num_threads(1)
TOLERANCE = 2e-6
WORDS = ("a", "red", "panda", "handwritten", "three", "seven", "on", "the", "grass", "reading")
SPECIAL = ("<pad>", "</s>", "<unk>")
TINY = {
    "vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 36, "intermediate_size": 60, "num_hidden_layers": 3,
    "num_attention_heads": 3, "max_position_embeddings": 9, "projection_size": 48,
}  # fmt: skip
VARIANTS = {"projected": {}, "as wide as the tower": {"projection_size": None, "num_attention_heads": 6}}
TEXTS = ("A red panda reading", "three", "a handwritten seven on the grass, on the red grass")


@pytest.fixture(scope="module", autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def write_tokenizer(directory: Path) -> None:
    """Words to ids, with an end token, as transformers reads it; it does not lower-case."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex("[,.]"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def whole_siglip(directory: Path) -> SiglipModel:
    """Writes both towers and a tokenizer as published; returns transformers' model of them."""
    text = SiglipTextConfig(**TINY).to_dict()
    model = randomise(SiglipModel(SiglipConfig(vision_config=VISION, text_config=text)), 11)
    with torch.no_grad():
        model.logit_scale.fill_(1.3)
        model.logit_bias.fill_(-0.7)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    write_tokenizer(directory)
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("siglip") / "whole"
    return directory, whole_siglip(directory)


def abstract(config: OurConfig) -> dict:
    network = jax.eval_shape(lambda: init_params(SiglipTextModel(config), jax.random.key(0)))
    number = jax.ShapeDtypeStruct((1,), np.float32)
    return {"text": abstract_tree(network), "logit_scale": number, "logit_bias": number}


@pytest.mark.parametrize("variant", VARIANTS)
def test_output(variant):
    values = {**TINY, **VARIANTS[variant]}
    model = TorchTextModel(SiglipTextConfig(**values, attn_implementation="eager"))
    randomise(model, list(VARIANTS).index(variant))
    ids = np.random.default_rng(0).integers(0, TINY["vocab_size"], (3, 9)).astype(np.int32)
    with torch.no_grad():
        expected = to_numpy(model(torch.from_numpy(ids).long()).pooler_output)
    one = {"logit_scale": torch.ones(1), "logit_bias": torch.zeros(1)}
    state = StateDict({f"text_model.{name}": array for name, array in model.state_dict().items()} | one)
    config = OurConfig.from_dict(values)
    params = read_params(state, siglip_text_rules(), abstract(config))
    for scan_blocks in (True, False):
        network = SiglipTextModel(config, scan_blocks=scan_blocks)
        found = jax.jit(network.apply)({"params": params["text"]}, ids)
        assert found.shape == (3, config.projection_size)
        assert relative_error(found, expected) <= TOLERANCE
    other = jax.jit(network.apply)({"params": params["text"]}, ids[:, ::-1])
    assert relative_error(other, expected) > 1e-2
    out = TreeSource(params, siglip_text_rules())
    assert set(out.tensors) == set(state.tensors)
    for name in out.tensors:
        np.testing.assert_array_equal(out.read(name), state.read(name))
    with pytest.raises(UserError, match="10 tokens"):
        jax.eval_shape(network.apply, {"params": params["text"]}, np.zeros((1, 10), np.int32))


def test_scores_of_pictures_with_texts(whole, capsys):
    directory, model = whole
    scorer = TextScorer.from_directory(directory)
    pictures = photographs()
    lowered = [text.lower() for text in TEXTS]
    tokens = AutoTokenizer.from_pretrained(directory)(
        lowered, padding="max_length", truncation=True, max_length=9, return_tensors="pt"
    )["input_ids"]
    pixels = torch.from_numpy(scorer.images.preprocessing(pictures).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        expected = model(input_ids=tokens, pixel_values=pixels)
    found = scorer.texts.encode(TEXTS)
    length = np.linalg.norm(found, axis=1, keepdims=True)
    assert relative_error(found / length, to_numpy(expected.text_embeds)) <= TOLERANCE
    assert "1 of 3 texts are longer than the text tower's 9 tokens" in capsys.readouterr().out
    vectors = scorer.encode_pictures(pictures)
    for shift in range(3):
        texts = [TEXTS[(index + shift) % 3] for index in range(3)]
        scores = scorer.score(vectors, texts)
        logits = [float(expected.logits_per_image[index, (index + shift) % 3]) for index in range(3)]
        np.testing.assert_allclose(scores.probability, 1 / (1 + np.exp(-np.array(logits))), rtol=1e-5)
        np.testing.assert_allclose(scores.cosine, (np.array(logits) + 0.7) / np.exp(1.3), atol=1e-6)
    assert scorer.name == TextScorer.from_directory(directory).name
    # a last part that is smaller is filled up
    parts = SiglipTextEncoder.from_directory(directory, batch_size=2).encode(TEXTS)
    np.testing.assert_allclose(parts, found, rtol=1e-5, atol=1e-6)


def test_a_converted_siglip_scores_the_same(whole, tmp_path):
    directory, _ = whole
    assert convert(["import", str(directory), str(tmp_path / "ours")]) in (0, None)
    expected = SiglipTextEncoder.from_directory(directory).encode(TEXTS)
    np.testing.assert_array_equal(SiglipTextEncoder.from_directory(tmp_path / "ours").encode(TEXTS), expected)
    (tmp_path / "ours" / "kept_tensors.safetensors").unlink()
    with pytest.raises(UserError, match="without a text tower"):
        SiglipTextEncoder.from_directory(tmp_path / "ours")


def test_directories_that_cannot_score(whole, tmp_path):
    directory, model = whole
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        SiglipTextEncoder.from_directory(copy)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="can't be read"):
        SiglipTextEncoder.from_directory(copy)
    write_tokenizer(copy)
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["vocab_size"] = 5
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"token_embedding\.weight"):
        SiglipTextEncoder.from_directory(copy)
    model.vision_model.save_pretrained(tmp_path / "alone")
    with pytest.raises(UserError, match="without its text tower"):
        SiglipTextEncoder.from_directory(tmp_path / "alone")
    shutil.copy(directory / "config.json", tmp_path / "alone" / "config.json")
    with pytest.raises(UserError, match="has no text tower"):
        SiglipTextEncoder.from_directory(tmp_path / "alone")


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"model_type": "clip"}, "siglip_text_model"),
        ({"hidden_act": "gelu"}, "gelu_pytorch_tanh"),
        ({"num_attention_heads": 7}, "a divisor of 768"),
        ({"vocab_size": 10**9}, "vocab_size"),
        ({"projection_size": 0}, "projection_size"),
        ({"model_type": "siglip", "text_config": [1]}, "text_config"),
        ({"rope_theta": 3}, "rope_theta"),
    ],
)
def test_bad_configurations(values, part):
    with pytest.raises(UserError, match=part):
        OurConfig.from_dict(values)
