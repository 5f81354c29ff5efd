"""Tiny tokenizers and text encoders as files, in the layouts that are published."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from sana_jax.text_encoders.instructions import IMAGE_INSTRUCTION
from tests.parity import gemma_oracle

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
TEXTS = [*IMAGE_INSTRUCTION, "a red panda reading a book under a tree, watercolour", "user prompt: a cat"]


def gemma_like_tokenizer(*, begin_token: bool) -> Tokenizer:
    """Byte-fallback BPE over pieces that begin with the space's mark, as Gemma's; about 400 pieces."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator([f" {text}" for text in TEXTS] * 2, trainers.BpeTrainer(vocab_size=250))
    model = json.loads(trained.to_str())["model"]
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    # Gemma's own has pieces for runs of line ends, which are added tokens too
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    if begin_token:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
        )
    return tokenizer


def word_tokenizer() -> Tokenizer:
    words = sorted({word for text in TEXTS for word in text.lower().split()})
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, *, published_as_gemma: bool = False, **config) -> None:
    """Writes the files as transformers does; Gemma's with the configuration that its checkpoints have."""
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    if published_as_gemma:
        added = {
            number: {
                "content": token.content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                "special": token.special,
            }
            for number, token in tokenizer.get_added_tokens_decoder().items()
        }  # fmt: skip
        published = {
            "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": added, **names,
            "clean_up_tokenization_spaces": False, "model_max_length": 1000000000000000019884624838656,
            "padding_side": "left", "sp_model_kwargs": {}, "spaces_between_special_tokens": False,
            "tokenizer_class": "GemmaTokenizer", "use_default_system_prompt": False,
        }  # fmt: skip
        path.write_text(json.dumps(published))
    if config:
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def save_model_directory(directory: Path, *, begin_token: bool = True, dtype: torch.dtype = torch.float32) -> None:
    """``text_encoder`` and ``tokenizer`` of a model directory, every weight random."""
    tokenizer = gemma_like_tokenizer(begin_token=begin_token)
    save_tokenizer(tokenizer, directory / "tokenizer", published_as_gemma=begin_token)
    config = Gemma2Config(
        **{**gemma_oracle.TINY, "vocab_size": tokenizer.get_vocab_size()}, attn_implementation="eager"
    )
    model = gemma_oracle.randomise(Gemma2Model(config), 11)
    model.to(dtype).save_pretrained(directory / "text_encoder")
