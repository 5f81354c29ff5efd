"""What a pipeline and a trainer ask of a text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from kernels.typing import Float, Int
from sana_jax.errors import UserError


class TextEncoder(Protocol):
    """Prompts in, one vector per token out, padded to one length L.

    ``embedding_dim`` is C, what the transformer's ``caption_channels`` must be; ``max_length`` is L.
    """

    embedding_dim: int
    max_length: int

    def encode(
        self, prompts: Sequence[str], *, negative: bool = False
    ) -> tuple[Float[np.ndarray, "B L C"], Int[np.ndarray, "B L"]]:
        """Embeddings (B, L, C) in float32 and mask (B, L), 1 where a token counts.

        ``negative`` says that these are what the picture should not be: the one place where an empty text is allowed,
        and where an encoder adds no instruction of its own.
        """
        ...

    def null_encoding(self) -> tuple[Float[np.ndarray, "1 L C"], Int[np.ndarray, "1 L"]]:
        """Embeddings (1, L, C) and mask (1, L) of no text: for caption dropout and the unconditional branch."""
        ...

    def to_config(self) -> dict[str, Any]:
        """What ``text_encoder/config.json`` holds, ``_class_name`` included."""
        ...


def check_max_length(value: Any, published: int) -> None:
    """Raises ``UserError`` where ``value`` is no number of tokens that an encoding may have."""
    if type(value) is not int or value < 2:
        raise UserError(
            f"max_sequence_length {value!r} is not allowed; allowed is a whole number from 2 (the begin token and one "
            f"more): {published} is the published one"
        )
