"""Checks that pipelines share: arguments before any work is done, values before they become pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Shaped
from sana_jax.errors import UserError, reason_of
from sana_jax.pipelines.sampling_function import is_guided

OUTPUT_TYPES = ("pil", "np", "latent")


def check_options(
    output_type: str,
    num_images_per_prompt: int,
    seed: int,
    latents: Any,
    scale: float,
    negatives: tuple[Any, Any, Any],
    interval: tuple[float, float] | None,
    unused_without_guidance: Mapping[str, bool] | None = None,
    counted: str = "num_images_per_prompt",
) -> None:
    """Raises ``UserError`` for a value that is not allowed, and for arguments that would not be used.

    ``negatives`` are the negative prompt, its embeddings and their mask; ``unused_without_guidance`` are further
    arguments and whether they are given; ``counted`` is what the number per prompt is called.
    """
    check_common_options(output_type, num_images_per_prompt, seed, counted)
    if latents is not None and seed != 0:
        raise UserError(f"seed {seed} would not be used, since latents are given; leave one of them out")
    text, embeds, mask = negatives
    texts = list(text) if isinstance(text, list | tuple | np.ndarray) else [text]
    empty = all(each is None or (isinstance(each, str) and not each) for each in texts)
    if not empty and embeds is not None:
        raise UserError("negative_prompt and negative_prompt_embeds: only one is allowed; leave one of them out")
    if interval is not None and np.shape(interval) != (2,):
        raise UserError(f"guidance_interval {interval!r} is not allowed; give the lowest and the highest noise level")
    if is_guided(scale):
        return
    unused = {
        "negative_prompt": not empty,
        "negative_prompt_embeds": embeds is not None,
        "negative_prompt_attention_mask": mask is not None,
        "guidance_interval": interval is not None,
        **(unused_without_guidance or {}),
    }
    if any(unused.values()):
        names = ", ".join(name for name, given in unused.items() if given)
        raise UserError(
            f"{names} would not be used with guidance_scale {scale:g}; guidance acts above 1: raise guidance_scale or "
            f"leave {names} out"
        )


def check_common_options(
    output_type: str, num_images_per_prompt: int, seed: int, counted: str = "num_images_per_prompt"
) -> None:
    """Raises ``UserError`` for a value that no pipeline allows."""
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type {output_type!r} is not allowed; choose one of {', '.join(OUTPUT_TYPES)}")
    if not isinstance(num_images_per_prompt, int | np.integer) or num_images_per_prompt < 1:
        raise UserError(f"{counted} {num_images_per_prompt!r} is not allowed; choose a whole number, 1 or more")
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise UserError(f"seed {seed} is not allowed; choose a whole number from 0 to {2**32 - 1}")


def finite_scale(guidance_scale: Any) -> float:
    """A guidance scale; raises ``UserError`` for what is no finite number."""
    try:
        scale = float(guidance_scale)
    except (TypeError, ValueError):  # such as an array, for a scale of every step
        scale = math.nan
    if not math.isfinite(scale):
        raise UserError(f"guidance_scale {guidance_scale!r} is not allowed; choose one finite number")
    return scale


def check_text_options(
    max_sequence_length: Any, complex_human_instruction: Any, encodes_prompt: bool, encodes_negative: bool = False
) -> None:
    """Raises ``UserError`` for settings of the text encoder where it is given nothing to encode."""
    unused = []
    if complex_human_instruction is not None and not encodes_prompt:
        unused.append("complex_human_instruction")
    if max_sequence_length is not None and not (encodes_prompt or encodes_negative):
        unused.append("max_sequence_length")
    if unused:
        raise UserError(f"{' and '.join(unused)} would not be used, since embeddings are given; leave it out")


def as_array(name: str, values: Any, read: Callable[[Any], Any] = np.asarray) -> Any:
    """What ``read`` makes of the values, NumPy's array if not told otherwise; raises ``UserError`` where it can't."""
    try:
        return read(values)
    except Exception as error:  # each kind of object fails in its own way: torch's bfloat16, ragged lists, texts
        raise UserError(
            f"{name} can't be read as an array ({reason_of(error)}); give a NumPy or JAX array, of a torch tensor "
            ".detach().float().numpy()"
        ) from error


def as_numbers(name: str, values: Any) -> Array:
    """The values as an array; raises ``UserError`` for what is none of real numbers.

    What lies on one device goes to wherever the networks are; what is spread over several stays so.
    """
    spread = isinstance(values, jax.Array) and len(values.devices()) > 1
    array = values if spread else as_array(name, values, lambda given: jnp.asarray(np.asarray(given)))
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        raise UserError(f"{name} of {array.dtype} is not allowed; give an array of real numbers")
    return array


def check_multiple(name: str, value: int, multiple: int) -> None:
    """Raises ``UserError`` with the nearest allowed sizes unless ``value`` pixels are a multiple of ``multiple``."""
    if value >= multiple and value % multiple == 0:
        return
    below = value // multiple * multiple
    nearest = [str(size) for size in (below, below + multiple) if size > 0]
    raise UserError(
        f"{name} {value} is not allowed; it must be a multiple of {multiple} (the autoencoder's factor times the "
        f"transformer's patch size): the nearest is {' or '.join(nearest) if value > 0 else multiple}"
    )


def check_finite(stage: str, values: Shaped[Array, "B *X"], made: str = "pictures") -> None:
    """Raises ``UserError`` naming the stage if any value is infinite or not a number; ``made`` is what is counted."""
    finite = np.asarray(jnp.isfinite(values))
    if not finite.all():
        raise not_finite(stage, finite.reshape(finite.shape[0], -1).all(axis=1), made)


def not_finite(stage: str, good: Shaped[Array, " B"], made: str = "pictures") -> UserError:
    """The error for a stage after which not all that are ``made`` are ``good``."""
    good = np.asarray(good)
    return UserError(
        f"{stage} gave values that are not finite in {int((~good).sum())} of {good.size} {made}; nothing is drawn "
        "from them: try dtype float32, another guidance_scale, or an earlier checkpoint"
    )
