"""The handwritten digits of scikit-learn, as latents and encoded captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from configs.schema import DigitsDataConfig
from kernels.typing import Float, Int
from sana_jax.autoencoders import PixelAutoencoder
from sana_jax.errors import UserError
from sana_jax.text_encoders import WordEncoder
from train.batch import Batch

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def load_images(digits: tuple[int, ...]) -> tuple[Float[np.ndarray, "S 8 8 1"], Int[np.ndarray, " S"]]:
    """Pictures in [-1, 1] and which digit each shows.

    Raises:
        UserError: no digits, or something that is not a digit.
    """
    from sklearn.datasets import load_digits

    check_digits(digits)
    source = load_digits()
    chosen = np.isin(source.target, digits)
    images = (source.images[chosen].astype(np.float32) / 8.0 - 1.0)[..., None]
    return images, source.target[chosen].astype(np.int32)


def check_digits(digits: tuple[int, ...]) -> None:
    """Raises ``UserError`` for no digits, or something that is not a digit."""
    if not digits or not set(digits) <= set(range(10)):
        raise UserError(
            f"--data.digits {' '.join(map(str, digits)) or '(none)'}: the data would be empty or unknown; "
            "name one or more of 0 to 9"
        )


@dataclass(frozen=True)
class DigitsData:
    """All samples in memory; the autoencoder and the text encoder belong to the data they have prepared."""

    config: DigitsDataConfig

    def __post_init__(self):
        check_digits(self.config.digits)
        caption, most = self.config.caption, self.config.max_words
        try:
            shown = caption.format(digit=NAMES[0])
        except (LookupError, ValueError):
            shown = caption
        if "{digit}" not in caption or shown == caption:
            raise UserError(
                f"--data.caption {caption!r} must have {{digit}}, which becomes the digit's name, and no other braces; "
                "write it like 'a handwritten {digit}'"
            )
        if len(shown.split()) > most:
            raise UserError(
                f"--data.caption {caption!r} has {len(shown.split())} words, --data.max-words allows {most}; shorten "
                "the one or raise the other"
            )

    @cached_property
    def _samples(self) -> tuple[np.ndarray, np.ndarray]:
        images, labels = load_images(self.config.digits)
        return np.asarray(self.autoencoder.encode(images), np.float32), labels

    @property
    def autoencoder(self) -> PixelAutoencoder:
        """Latents are the pixels."""
        return PixelAutoencoder(channels=1)

    @cached_property
    def text_encoder(self) -> WordEncoder:
        """Knows the captions' words."""
        return WordEncoder.of_captions(self.captions, self.config.embedding_dim, self.config.max_words + 1)

    @property
    def captions(self) -> list[str]:
        """The distinct captions, in the digits' order: what previews draw."""
        return [self.config.caption.format(digit=NAMES[digit]) for digit in sorted(set(self.config.digits))]

    @property
    def preview_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a sample."""
        return (8, 8, 1)

    @property
    def buckets(self) -> dict[tuple[int, int, int], np.ndarray]:
        """All samples have one shape."""
        return {self.preview_shape: np.arange(len(self))}

    @property
    def validation(self) -> None:
        """Nothing is held out."""
        return None

    def caption_of(self, index: int) -> str:
        """A sample's caption."""
        return self.config.caption.format(digit=NAMES[self._samples[1][index]])

    def encode(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings and masks of captions."""
        return self.text_encoder.encode(captions)

    def null_encoding(self) -> tuple[np.ndarray, np.ndarray]:
        """The encoding of no text."""
        return self.text_encoder.null_encoding()

    def __len__(self) -> int:
        return len(self._samples[0])

    def batch(self, indices: Int[np.ndarray, " B"], choices: Float[np.ndarray, "B 2"] | None = None) -> Batch:
        """The samples of these indices, as arrays. There is nothing to choose."""
        latents, labels = self._samples
        embeds, mask = self.text_encoder.encode(self.captions)
        caption = np.searchsorted(sorted(set(self.config.digits)), labels[indices])
        return Batch(latents[indices], embeds[caption], mask[caption])

    def describe(self) -> str:
        """One line for the start of a run."""
        return (
            f"{len(self)} handwritten digits (scikit-learn), 8x8 gray, {len(self.captions)} captions such as "
            f"{self.captions[0]!r}"
        )
