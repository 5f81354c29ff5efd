"""A text encoder without weights: one fixed random vector per word. The embedded default reads its captions with it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kernels.typing import Float, Int
from sana_jax.errors import UserError

# angle brackets keep it apart from every word that a caption can hold
_BEGIN = "<bos>"
_MOST_SHOWN = 100  # characters of a prompt in a message


@functools.lru_cache(maxsize=4096)
def _word_vector(seed: int, word: str, embedding_dim: int) -> np.ndarray:
    # RandomState's streams are frozen for good, so a checkpoint finds the vectors it was trained with
    digest = hashlib.sha256(f"{seed}:{word}".encode()).digest()
    vector = np.random.RandomState(np.frombuffer(digest, dtype="<u4")).standard_normal(embedding_dim)
    vector = vector.astype(np.float32)
    vector.setflags(write=False)
    return vector


@dataclasses.dataclass(frozen=True)
class WordEncoder:
    """A begin token and one token per word, each a fixed vector with entries of unit variance.

    A word's vector depends on ``seed`` and the word alone: a vocabulary may grow or be reordered.

    Args:
        vocabulary: the words that prompts may use, lower case.
        embedding_dim: C, the size of a vector.
        max_length: L, tokens of a prompt, the begin token included.
        seed: another seed gives other vectors.

    Raises:
        UserError: an empty or repeated vocabulary, a word that is not one lower-case word, sizes that are too small.
    """

    vocabulary: tuple[str, ...]
    embedding_dim: int
    max_length: int
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary", tuple(self.vocabulary))
        for word in self.vocabulary:
            if word != word.lower() or len(word.split()) != 1 or word == _BEGIN:
                raise UserError(
                    f"vocabulary word {word!r} is not allowed; a word is lower case and without spaces: write "
                    f"{' '.join(word.lower().split()) or 'a word'!r} as words of their own"
                )
        repeated = sorted({word for word in self.vocabulary if self.vocabulary.count(word) > 1})
        if repeated or not self.vocabulary:
            raise UserError(
                f"vocabulary {' repeats ' + ', '.join(repeated) if repeated else 'is empty'}; allowed is one or more "
                "different words: mend the list"
            )
        if self.embedding_dim < 1 or self.max_length < 2:
            raise UserError(
                f"embedding_dim {self.embedding_dim} and max_length {self.max_length}; allowed are embedding_dim >= 1 "
                "and max_length >= 2 (the begin token and a word): raise them"
            )

    @classmethod
    def of_captions(cls, captions: Sequence[str], embedding_dim: int, max_length: int) -> WordEncoder:
        """An encoder that knows the words of these captions; the other arguments are the constructor's."""
        words = dict.fromkeys(word for caption in captions for word in caption.lower().split())
        return cls(tuple(words), embedding_dim, max_length)

    def encode(
        self, prompts: Sequence[str], *, negative: bool = False
    ) -> tuple[Float[np.ndarray, "B L C"], Int[np.ndarray, "B L"]]:
        """Embeddings (B, L, C) in float32, zero where padded, and mask (B, L) in int32, 1 where a token stands.

        Prompts are lower-cased and stripped. With ``negative``, a prompt may be empty.

        Raises:
            UserError: an empty prompt, more words than fit, or a word outside the vocabulary.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        embeddings = np.zeros((len(prompts), self.max_length, self.embedding_dim), np.float32)
        mask = np.zeros((len(prompts), self.max_length), np.int32)
        for row, prompt in enumerate(prompts):
            words = self._words(prompt, allow_empty=negative)
            mask[row, : 1 + len(words)] = 1
            for position, word in enumerate([_BEGIN, *words]):
                embeddings[row, position] = _word_vector(self.seed, word, self.embedding_dim)
        return embeddings, mask

    def null_encoding(self) -> tuple[Float[np.ndarray, "1 L C"], Int[np.ndarray, "1 L"]]:
        """The encoding of no words, the begin token alone: embeddings (1, L, C) and mask (1, L)."""
        return self.encode([""], negative=True)

    def to_config(self) -> dict[str, Any]:
        """What ``text_encoder/config.json`` holds."""
        return {"_class_name": "WordEncoder", **dataclasses.asdict(self), "vocabulary": list(self.vocabulary)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> WordEncoder:
        """The inverse of ``to_config``.

        Raises:
            UserError: a missing or unknown field.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        given = set(config) - {"_class_name"}
        if given - fields or fields - given:
            raise UserError(
                f"WordEncoder configuration lacks {sorted(fields - given) or 'nothing'} and has unknown "
                f"{sorted(given - fields) or 'nothing'}; allowed are {sorted(fields)}: mend its config.json"
            )
        return cls(**{name: config[name] for name in fields})

    def _words(self, prompt: str, *, allow_empty: bool) -> list[str]:
        words = prompt.lower().split()
        prompt = prompt if len(prompt) <= _MOST_SHOWN else f"{prompt[:_MOST_SHOWN]}..."
        allowed = ", ".join(self.vocabulary)
        if not words and not allow_empty:
            raise UserError(f"prompt {prompt!r} is empty; allowed are the words {allowed}: write at least one of them")
        unknown = list(dict.fromkeys(word for word in words if word not in self.vocabulary))[:8]
        if unknown:
            raise UserError(
                f"prompt {prompt!r} has {', '.join(map(repr, unknown))}, which this model has not been trained on; "
                f"allowed are the words {allowed}: write the prompt in these"
            )
        limit = self.max_length - 1
        if len(words) > limit:
            raise UserError(
                f"prompt {prompt!r} has {len(words)} words; at most {limit} are allowed, and "
                f"{words[limit]!r} and what follows does not fit: shorten the prompt"
            )
        return words
