"""Pictures and prompts through a model's autoencoder and text encoder, and what their numbers are a function of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs.data import ImageDataConfig
from kernels.typing import Float, UInt8
from sana_jax.autoencoders import Autoencoder, VideoAutoencoder
from sana_jax.autoencoders.base import latent_frames
from sana_jax.autoencoders.dc_autoencoder import LARGEST_UNTILED
from sana_jax.pipelines.model_directory import ModelDirectory
from sana_jax.text_encoders import TextEncoder
from sana_jax.weights.identity import weights_id
from train.data.decoding import BadPicture

Say = Callable[[str], None]
LATENT_NAMES = ("z", "npy")
_MOST_PICTURES = 64  # of one batch
_MOST_CLIPS = 16
_LARGEST_AT_ONCE = 2**21  # pixels of the clips that go through an autoencoder without networks together
_MOST_PROMPTS = 8
_LOSSES_SHOWN = 3  # prompts that are too long: so many are printed, the rest counted
_TOO_LONG = "is longer than max_sequence_length"


class EncodedPrompt(NamedTuple):
    """A text's encoding without padding: ``tokens`` (n, C)."""

    text: str
    tokens: Float[np.ndarray, "n C"]


class PictureEncoder:
    """Pictures to latents, with one compiled program for each size.

    Args:
        autoencoder: the model's; its weights are read at the first picture.
    """

    def __init__(self, autoencoder: Autoencoder):
        self.autoencoder = autoencoder

    def batch_size(self, height: int, width: int, count: int) -> int:
        """How many pictures of a size, of which there are ``count``, go through the network at once."""
        most = max(1, min(_MOST_PICTURES, LARGEST_UNTILED // (height * width)))
        return min(most, 1 << max(count - 1, 0).bit_length())

    def __call__(self, pictures: UInt8[np.ndarray, "B H W C"]) -> Float[jax.Array, "B h w c"]:
        """Latents; on the device, and perhaps still being computed."""
        return self.autoencoder.encode(to_network_range(pictures))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, c) of the latents of pictures of this size."""
        factor = self.autoencoder.spatial_factor
        return height // factor, width // factor, self.autoencoder.latent_channels

    def free(self) -> None:
        """Lets go of the weights, and of programs, which are for the one device that has computed here."""
        if hasattr(self.autoencoder, "weights"):
            self.autoencoder.free()
            self.autoencoder.programs.clear()


class ClipEncoder(PictureEncoder):
    """Clips to latents, with one compiled program for each size.

    Args:
        autoencoder: the model's; its weights are read at the first clip.
        frames: of every clip; 1 for pictures as clips.

    Raises:
        UserError: a number of frames that the autoencoder does not take.
    """

    def __init__(self, autoencoder: VideoAutoencoder, frames: int):
        super().__init__(autoencoder)
        self.frames = frames
        self._latent_frames = latent_frames(frames, autoencoder.temporal_factor)

    def batch_size(self, height: int, width: int, count: int) -> int:
        """How many clips of a size, of which there are ``count``, go through the network at once."""
        largest = getattr(self.autoencoder, "largest_at_once", _LARGEST_AT_ONCE)
        most = max(1, min(_MOST_CLIPS, largest // (height * width * self.frames)))
        return min(most, 1 << max(count - 1, 0).bit_length())

    def __call__(self, clips: UInt8[np.ndarray, "B *F H W C"]) -> Float[jax.Array, "B T h w c"]:
        """Latents of clips, or of pictures (B, H, W, C) as clips of one frame."""
        return super().__call__(clips[:, None] if clips.ndim == 4 else clips)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(T, h, w, c) of the latents of clips of this size."""
        return self._latent_frames, *super().latent_shape(height, width)


def to_network_range(pictures: UInt8[np.ndarray, "*B H W C"]) -> Float[np.ndarray, "*B H W C"]:
    """Bytes to numbers in [-1, 1]."""
    return pictures.astype(np.float32) / 127.5 - 1.0


def latents_of_features(key: str, arrays: Mapping[str, np.ndarray], channels: int) -> Float[np.ndarray, "h w C"]:
    """Latents that the data holds instead of a picture, as the original trainer stores them: (C, h, w), scaled.

    Args:
        key: of the sample, for messages.
        arrays: what was stored; the latents are ``z`` of an .npz file, or an .npy file.
        channels: C.

    Raises:
        BadPicture: there are none, or they are no latents of this model.
    """
    name = next((name for name in LATENT_NAMES if name in arrays), None)
    if name is None:
        raise BadPicture(
            key, f"has the arrays {', '.join(arrays) or '(none)'}; latents are called z, or are an .npy file"
        )
    latents = arrays[name]
    if latents.ndim == 4 and len(latents) == 1:
        latents = latents[0]
    if latents.ndim != 3 or latents.shape[0] != channels or latents.dtype.kind != "f":
        raise BadPicture(
            key,
            f"has {name} of shape {arrays[name].shape} and {latents.dtype}; latents are ({channels}, h, w), of floats",
        )
    return latents.transpose(1, 2, 0).astype(np.float32)


def latent_dtype(data: ImageDataConfig, autoencoder: Autoencoder) -> str:
    """The dtype that latents are kept in: bfloat16 for networks, float32 for pixels, unless the configuration says."""
    if data.latent_dtype != "auto":
        return data.latent_dtype
    return "bfloat16" if hasattr(autoencoder, "weights") else "float32"


def prompt_dtype(text_encoder: TextEncoder) -> str:
    """The dtype that encoded prompts are kept in: the one that they are computed in, so that nothing is lost."""
    return jnp.dtype(getattr(text_encoder, "dtype", jnp.float32)).name


def encode_prompts(text_encoder: TextEncoder, texts: Sequence[str], say: Say) -> Iterator[list[EncodedPrompt]]:
    """Encodings of texts, batch by batch; short texts first, so that a batch's texts are of like length.

    The order, and which texts share a batch, is a function of the texts alone. Texts that are too long lose their end:
    the first few are printed, all are counted.

    Raises:
        UserError: a text that the encoder does not take.
    """
    lost: list[str] = []

    def hear(line: str) -> None:
        if _TOO_LONG not in line:
            say(line)
            return
        lost.append(line)
        if len(lost) <= _LOSSES_SHOWN:
            say(line)

    if hasattr(text_encoder, "say"):
        text_encoder = dataclasses.replace(text_encoder, say=hear)
    ordered = sorted(texts, key=lambda text: (len(text), text))
    # What does not fill a batch goes one by one: a program for every number of texts would have to be compiled.
    whole = len(ordered) // _MOST_PROMPTS * _MOST_PROMPTS
    batches = [ordered[first : first + _MOST_PROMPTS] for first in range(0, whole, _MOST_PROMPTS)]
    for batch in [*batches, *([text] for text in ordered[whole:])]:
        embeds, mask = text_encoder.encode(batch)
        yield [EncodedPrompt(text, unpadded(*row)) for text, row in zip(batch, zip(embeds, mask))]
    if len(lost) > _LOSSES_SHOWN:
        say(f"{len(lost)} prompts are too long and lose their end, of which {_LOSSES_SHOWN} are shown above")


def unpadded(embeds: Float[np.ndarray, "L C"], mask: np.ndarray) -> Float[np.ndarray, "n C"]:
    """The tokens that count, which come first."""
    count = int(mask.sum())
    if not mask[:count].all():
        raise AssertionError("a text encoder that pads elsewhere than at the end can't be cached")
    return embeds[:count]


def count_tokens(text_encoder: TextEncoder, texts: Sequence[str]) -> int:
    """About how many tokens the texts' encodings have together, from a sample of them."""
    if not texts:
        return 0
    sample = texts[:: max(1, len(texts) // 500)]
    tokenizer = getattr(text_encoder, "tokenizer", None)
    if tokenizer is None:
        counts = [1 + len(text.split()) for text in sample]
    else:
        counts = [tokenizer.count(text.lower().strip()) for text in sample]
    longest = text_encoder.max_length
    return round(sum(min(count, longest) for count in counts) / len(sample) * len(texts))


def autoencoder_identity(model: ModelDirectory) -> dict[str, Any]:
    """What latents are a function of, beside the pictures; flat, names begin with ``autoencoder.``."""
    autoencoder = model.autoencoder
    fields = dict(_without_names(autoencoder.to_config()))
    if hasattr(autoencoder, "weights"):
        tiles, videos = autoencoder.tiles, hasattr(autoencoder, "temporal_factor")
        limit = {"pixels_at_once": autoencoder.largest_at_once} if videos else {"untiled_pixels": LARGEST_UNTILED}
        fields |= {
            "weights": weights_id(_home(model) / "vae"),
            "dtype": jnp.dtype(autoencoder.dtype).name,
            "tiling": autoencoder.tiling,
            **limit,
            "tiles": [*tiles.size, *tiles.stride],
        }
    return {f"autoencoder.{name}": value for name, value in fields.items()}


def text_encoder_identity(model: ModelDirectory) -> dict[str, Any]:
    """What encodings are a function of, beside the texts; flat, names begin with ``text_encoder.``."""
    encoder = model.text_encoder
    fields = dict(_without_names(encoder.to_config()))
    fields["max_length"] = encoder.max_length
    if hasattr(encoder, "weights"):
        lines = encoder.complex_human_instruction
        fields |= {
            "weights": weights_id(_home(model) / "text_encoder"),
            "dtype": jnp.dtype(encoder.dtype).name,
            "instruction": None if lines is None else _digest("\n".join(lines).encode()),
            "tokenizer": _digest(Path(encoder.tokenizer.location).read_bytes()),
        }
    return {f"text_encoder.{name}": value for name, value in fields.items()}


def _home(model: ModelDirectory) -> Path:
    """Where the encoders' weights lie: a training run leaves them to the model that it started from."""
    while model.base is not None:
        model = model.base
    return model.path


def _without_names(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """A configuration's fields, the class as ``class``; without what libraries note about themselves."""
    for name, value in config.items():
        if name == "_class_name":
            yield "class", value
        elif not name.startswith("_"):
            # a vocabulary of thousands of words is told apart as well by its hash
            text = json.dumps(value)
            yield name, value if len(text) < 1000 else _digest(text.encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
