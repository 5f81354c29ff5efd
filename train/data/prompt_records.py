"""Encoded prompts as records of a cache: those that are missing, encoded; and those that are there, read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kernels.typing import Float, Int
from sana_jax.errors import UserError
from sana_jax.text_encoders import TextEncoder
from train.data.cache import PROMPTS, CacheReader, CacheWriter, Name, Place
from train.data.cache_plan import NULL_PROMPT
from train.data.encoding import EncodedPrompt, Say, encode_prompts, prompt_dtype, unpadded
from train.data.progress import Meter
from train.data.shard_filler import ShardFiller
from train.preemption import StopRequest


def add_prompts(
    cache: CacheWriter,
    encoder: TextEncoder,
    texts: Sequence[str],
    say: Say,
    stop: StopRequest | None = None,
    negative_prompt: str = "",
) -> None:
    """Encodes texts into new shards, and no text and a negative prompt if they are missing; the encoder's weights stay
    in memory.

    Raises:
        UserError: a text that the encoder does not take, or whose encoding is not finite.
        StoppedError: someone asked the process to stop.
    """
    meter = Meter("prompts", len(texts), say)
    with ShardFiller(cache, PROMPTS, stop) as filler:
        there = cache.present(PROMPTS)
        if NULL_PROMPT not in there:
            filler.add(NULL_PROMPT, null_record(encoder))
            filler.batch_ends()
        if (name := negative_name(negative_prompt)) not in {*there, NULL_PROMPT}:
            filler.add(name, negative_record(encoder, negative_prompt))
            filler.batch_ends()
        for batch in encode_prompts(encoder, texts, say):
            for prompt in batch:
                filler.add(*text_record(encoder, prompt))
            meter.advance(len(batch))
            filler.batch_ends()
    meter.close()


def null_record(encoder: TextEncoder) -> dict[str, np.ndarray]:
    """The arrays of the record of no text."""
    embeds, mask = encoder.null_encoding()
    return {"tokens": unpadded(np.asarray(embeds[0]), np.asarray(mask[0])).astype(prompt_dtype(encoder))}


def negative_name(text: str) -> Name:
    """The name of a negative prompt's record, whose encoding is another than that of the same text as a prompt."""
    return ("negative", text) if text.strip() else NULL_PROMPT


def negative_record(encoder: TextEncoder, text: str) -> dict[str, np.ndarray]:
    """The arrays of the record of a negative prompt.

    Raises:
        UserError: a text that the encoder does not take, or values that are not finite.
    """
    embeds, mask = encoder.encode([text], negative=True)
    return _finite(encoder, EncodedPrompt(text, unpadded(np.asarray(embeds[0]), np.asarray(mask[0]))))


def text_record(encoder: TextEncoder, prompt: EncodedPrompt) -> tuple[Name, dict[str, np.ndarray]]:
    """The name and the arrays of a text's record.

    Raises:
        UserError: values that are not finite.
    """
    return ("text", prompt.text), _finite(encoder, prompt)


def _finite(encoder: TextEncoder, prompt: EncodedPrompt) -> dict[str, np.ndarray]:
    if not np.isfinite(prompt.tokens).all():
        raise UserError(f"the prompt {prompt.text[:80]!r} encodes to values that are not finite; see --model")
    return {"tokens": prompt.tokens.astype(prompt_dtype(encoder))}


def free(part: Any) -> None:
    """Lets go of a network's weights, where it has any."""
    if hasattr(part, "weights"):
        part.weights.free()


class PromptRecords:
    """The encoded prompts of a cache; any number of threads may read at once."""

    def __init__(self, reader: CacheReader):
        self._reader = reader
        self._places = reader.places(PROMPTS)
        self._length = int(reader.identity.fields["text_encoder.max_length"])

    def missing(self, texts: Iterable[str]) -> list[str]:
        """Those of the texts that it does not have, each once."""
        return [text for text in dict.fromkeys(texts) if self._name(text) not in self._places]

    def encode(self, texts: Sequence[str]) -> tuple[Float[np.ndarray, "B L C"], Int[np.ndarray, "B L"]]:
        """Embeddings and masks of texts that it has.

        Raises:
            UserError: a text that it does not have.
            CheckpointError: the cache is damaged.
        """
        if lost := self.missing(texts):
            raise UserError(
                f"the prompt {lost[0][:80]!r} is not in the cache {self._reader.directory}, and no text encoder is in "
                "memory; name it in --preview.prompts and start again, which adds it"
            )
        return padded([self._tokens(self._places[self._name(text)]) for text in texts], self._length)

    def null_encoding(self) -> tuple[Float[np.ndarray, "1 L C"], Int[np.ndarray, "1 L"]]:
        """The encoding of no text."""
        return self.encode([""])

    def has_negative(self, text: str) -> bool:
        """Whether it has a negative prompt."""
        return negative_name(text) in self._places

    def negative_encoding(self, text: str) -> tuple[Float[np.ndarray, "1 L C"], Int[np.ndarray, "1 L"]]:
        """The encoding of a negative prompt that it has; of no text where that is empty."""
        return padded([self._tokens(self._places[negative_name(text)])], self._length)

    @property
    def shape(self) -> tuple[int, int]:
        """(L, C) of an encoded prompt, padding included."""
        return self._length, self._reader.layout(self._places[NULL_PROMPT]).arrays[0][2][-1]

    def _tokens(self, place: Place) -> np.ndarray:
        return self._reader.read(place)["tokens"]

    @staticmethod
    def _name(text: str) -> Name:
        return ("text", text) if text.strip() else NULL_PROMPT


def padded(
    tokens: Sequence[Float[np.ndarray, "n C"]], length: int
) -> tuple[Float[np.ndarray, "B L C"], Int[np.ndarray, "B L"]]:
    """Encodings of one length, zero where padded, and their masks."""
    embeds = np.zeros((len(tokens), length, tokens[0].shape[-1]), tokens[0].dtype)
    mask = np.zeros((len(tokens), length), np.int32)
    for row, own in enumerate(tokens):
        embeds[row, : len(own)] = own
        mask[row, : len(own)] = 1
    return embeds, mask
