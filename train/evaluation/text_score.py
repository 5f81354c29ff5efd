"""How well pictures fit their texts, by SigLIP: the cosine of their vectors, and the probability that they belong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kernels.typing import Float
from sana_jax.errors import UserError
from sana_jax.image_encoders import SiglipImageEncoder
from sana_jax.text_encoders.siglip import SiglipTextEncoder
from train.evaluation.features import FeatureFunction
from train.evaluation.similarity import cosine_similarity

if TYPE_CHECKING:
    from PIL import Image

_NAMED = 3  # pictures that an error names


class Scores(NamedTuple):
    """Of each picture with its text."""

    cosine: Float[np.ndarray, " N"]
    probability: Float[np.ndarray, " N"]
    """sigmoid(exp(logit_scale)·cosine + logit_bias): SigLIP's own, that picture and text belong together."""


@dataclass(frozen=True)
class TextScorer:
    """Both towers of a SigLIP, in float32.

    Attributes:
        images: the vision tower.
        texts: the text tower.
    """

    images: SiglipImageEncoder
    texts: SiglipTextEncoder

    @classmethod
    def from_directory(cls, directory: str) -> TextScorer:
        """Opens both; weights are read when they are needed.

        Raises:
            FileNotFoundError, UserError, CheckpointError: something of the directory is missing or does not fit.
        """
        texts = SiglipTextEncoder.from_directory(directory)
        images = SiglipImageEncoder.from_directory(directory)
        sizes = images.embedding_dim, texts.config.projection_size
        if sizes[0] != sizes[1]:
            raise UserError(
                f"{directory}: pictures become vectors of {sizes[0]} numbers and texts of {sizes[1]}, which do not "
                "compare; take both towers from one model"
            )
        return cls(images, texts)

    @property
    def name(self) -> str:
        """Which model it is: changes with everything that changes the scores."""
        return f"siglip {self.images.id} {self.texts.id}"

    def encode_pictures(self, pictures: Iterable[Image.Image]) -> Float[np.ndarray, "N D"]:
        """One vector for each picture."""
        return FeatureFunction(self.name, self.images.encode)(pictures)

    def score(self, vectors: Float[np.ndarray, "N D"], texts: Sequence[str]) -> Scores:
        """Compares each picture's vector with its own text, each different text encoded once."""
        different = list(dict.fromkeys(texts))
        encoded = dict(zip(different, self.texts.encode(different), strict=True))
        cosine = cosine_similarity(vectors, np.stack([encoded[text] for text in texts]))
        scale, bias = self.scale_and_bias
        return Scores(cosine, 1 / (1 + np.exp(-(scale * cosine + bias))))

    @property
    def scale_and_bias(self) -> tuple[float, float]:
        """What a cosine is multiplied with, and what is added, before the sigmoid."""
        scale, bias = (np.asarray(self.texts.weights.params[name], np.float64)[0] for name in _OF_THE_LOSS)
        return float(np.exp(scale)), float(bias)


_OF_THE_LOSS = ("logit_scale", "logit_bias")


def texts_of_pictures(paths: Sequence[Path]) -> list[str]:
    """The text of each picture: of the ``.txt`` file beside it, or the prompt that a PNG drawn here carries.

    Raises:
        UserError: pictures without a text.
    """
    texts = [_text_of(path) for path in paths]
    if without := [str(path) for path, text in zip(paths, texts) if not text]:
        others = f" and {len(without) - _NAMED} more" if len(without) > _NAMED else ""
        raise UserError(
            f"{len(without)} of {len(paths)} pictures have no text, neither in a .txt file of the same name nor as the "
            f"prompt in a PNG that was drawn here: {', '.join(without[:_NAMED])}{others}; write their texts beside them"
        )
    return texts


def _text_of(path: Path) -> str:
    beside = path.with_suffix(".txt")
    if beside.is_file():
        return beside.read_text("utf-8", errors="replace").strip()
    if path.suffix.lower() != ".png":
        return ""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return getattr(picture, "text", {}).get("prompt", "").strip()
    except (OSError, ValueError, SyntaxError):
        return ""  # the picture itself is named where it is read
