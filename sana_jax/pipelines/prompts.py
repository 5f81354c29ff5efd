"""Prompts to conditions: one text or several, or embeddings that were made before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax.errors import UserError
from sana_jax.pipelines.checks import as_numbers, check_finite
from sana_jax.pipelines.sampling_function import Encoded

# (texts, negative) -> (embeds, mask)
EncodeFunction = Callable[[Sequence[str], bool], tuple[np.ndarray, np.ndarray]]


def encode_positive(
    encode: EncodeFunction, channels: int, texts: Any, embeds: Any, mask: Any, num_images_per_prompt: int
) -> Encoded:
    """Conditions of ``num_images_per_prompt`` pictures of every prompt; one prompt's pictures stand side by side.

    Embeddings and masks are repeated alike. (diffusers repeats the masks in another order than the embeddings, so that
    several prompts of different length with several pictures each get one another's masks.)

    Raises:
        UserError: neither or both of texts and embeddings, an empty list, or arrays of a wrong shape.
    """
    encoded = _encode(encode, channels, "prompt", texts, embeds, mask, negative=False)
    return jax.tree.map(lambda array: jnp.repeat(array, num_images_per_prompt, axis=0), encoded)


def encode_negative(
    encode: EncodeFunction, channels: int, texts: Any, embeds: Any, mask: Any, positive: Encoded, repeats: int
) -> Encoded:
    """Negative conditions for ``positive``, in which every prompt stands ``repeats`` times.

    Raises:
        UserError: as ``encode_positive``; or another number of prompts, or another padded length.
    """
    encoded = _encode(
        encode, channels, "negative_prompt", None if embeds is not None else texts, embeds, mask, negative=True
    )
    count, prompts = encoded.embeds.shape[0], positive.embeds.shape[0] // repeats
    if count not in (1, prompts):
        raise UserError(f"{count} negative prompts for {prompts} prompts; allowed is one for all or one each")
    if encoded.embeds.shape[1] != positive.embeds.shape[1]:
        raise UserError(
            f"negative prompt of {encoded.embeds.shape[1]} tokens and prompt of {positive.embeds.shape[1]}; both must "
            "be padded to one length: give negative_prompt_embeds of the prompt's length"
        )
    return jax.tree.map(lambda array: jnp.repeat(array, positive.embeds.shape[0] // count, axis=0), encoded)


def _encode(
    encode: EncodeFunction, channels: int, name: str, texts: Any, embeds: Any, mask: Any, *, negative: bool
) -> Encoded:
    if (texts is None) == (embeds is None):
        given = "neither" if texts is None else "both"
        raise UserError(f"{name} and {name}_embeds: {given} given; exactly one is allowed: give one of them")
    if (embeds is None) != (mask is None):
        raise UserError(f"{name}_embeds and {name}_attention_mask belong together; allowed is both or neither")
    if embeds is None:
        if not isinstance(texts, Iterable):
            raise UserError(f"{name} {texts!r} is not allowed; allowed is a text, or a list of texts: give one")
        texts = np.ravel(texts).tolist() if isinstance(texts, np.ndarray) else texts
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise UserError(f"{name} is an empty list; allowed is one text or more: give one")
        if wrong := [text for text in texts if not isinstance(text, str)]:  # such as the nan of a table's empty cell
            raise UserError(f"{name} {wrong[0]!r} is not a text; allowed is a text, or a list of texts: give one")
        embeds, mask = encode(texts, negative)
    embeds, mask = as_numbers(f"{name}_embeds", embeds), as_numbers(f"{name}_attention_mask", mask)
    if embeds.ndim != 3 or embeds.shape[-1] != channels or mask.shape != embeds.shape[:2] or 0 in mask.shape:
        raise UserError(
            f"{name}_embeds {embeds.shape} with mask {mask.shape}; allowed are (B, L, {channels}) and (B, L): encode "
            "the prompts with this model's text encoder"
        )
    check_finite("text encoding", embeds)
    if not ((mask == 0) | (mask == 1)).all():  # such as 0 and -10000, which other code adds to scores
        raise UserError(
            f"{name}_attention_mask has other values than 0 and 1; allowed is 1 where a token counts, 0 elsewhere"
        )
    return Encoded(embeds, mask.astype(jnp.int32))
