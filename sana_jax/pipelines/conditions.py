"""Condition tokens on a pipeline: encoders that training has made, and the conditions of a call."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from kernels.typing import Float
from sana_jax.condition_tokens_files import (
    TOKENS,
    SavedTokens,
    has_condition_tokens,
    load_condition_tokens,
    tokens_from_dict,
)
from sana_jax.errors import CheckpointError, UserError
from sana_jax.models.condition_tokens import ConditionTokens, TokenEncoderConfig, apply_tokens, null_tokens
from sana_jax.pipelines.base_model_file import NAME as BASE_MODEL_FILE

_IMAGE_ENCODER_OPTIONS = ("dtype", "features", "normalize")


class ConditionsPipeline:
    """What a pipeline does with condition tokens (see ``sana_jax.models.condition_tokens``)."""

    transformer: Any
    residency: str

    # replaced, never changed in place, so that they may stand on the class
    condition_tokens: SavedTokens | None = None
    image_encoder: Any = None  # a directory, or a SiglipImageEncoder

    @classmethod
    def _from_model(cls, model: Any, *arguments: Any, **networks: Any) -> Any:
        """The pipeline of an opened model, with its token encoders: of a run those of the checkpoint's step."""
        pipeline = super()._from_model(model, *arguments, **networks)
        described = {} if model.trained_from is None else model.trained_from.settings
        if TOKENS in described:
            encoders, image_encoders = tokens_from_dict(described[TOKENS], f"{model.path / BASE_MODEL_FILE}: {TOKENS}")
            pipeline.load_condition_tokens(SavedTokens(encoders, model.trained[TOKENS], image_encoders))
        elif has_condition_tokens(model.path):
            pipeline.load_condition_tokens(model.path)
        return pipeline

    def load_condition_tokens(self, path: str | os.PathLike[str] | SavedTokens, *, image_encoder: Any = None) -> None:
        """Takes trained token encoders; calls then take ``conditions``. Prints what they are.

        Args:
            path: a directory with ``condition_tokens.safetensors`` and ``condition_tokens.json``; or what they hold.
            image_encoder: a ``SiglipImageEncoder``, or the directory of one, for conditions that are given as
                pictures; None takes the directory that training used, if it is there.

        Raises:
            FileNotFoundError: a file is missing.
            UserError, CheckpointError: damaged files, or encoders that were made for another transformer.
        """
        saved = path if isinstance(path, SavedTokens) else load_condition_tokens(path)
        config, encoders = self.transformer.config, saved.encoders
        widths = (encoders.caption_channels, encoders.inner_dim)
        if widths != (config.caption_channels, config.inner_dim):
            raise CheckpointError(
                f"condition tokens for a transformer of caption_channels {widths[0]} and width {widths[1]}; this one "
                f"has {config.caption_channels} and {config.inner_dim}: use the one that they were trained with"
            )
        self.condition_tokens, self.image_encoder = saved, image_encoder
        print(f"conditions: {'; '.join(describe_encoder(name, saved) for name in encoders.encoders)}")

    def unload_condition_tokens(self) -> None:
        """Forgets them; the transformer is as it was before, to the bit."""
        self.condition_tokens = self.image_encoder = None

    def embed_pictures(self, conditions: Mapping[str, Any]) -> dict[str, Any]:
        """Conditions with vectors in place of pictures, for calls that share them: pictures are embedded once.

        Raises:
            FileNotFoundError, UserError, CheckpointError: as calls with these conditions.
        """
        known = {} if self.condition_tokens is None else self.condition_tokens.encoders.encoders
        ready = dict(conditions)
        for name, value in conditions.items():
            if name in known and value is not None and read_numbers(name, value, known[name]) is None:
                ready[name] = self._embed(name, known[name], value)
        return ready

    def _tokens_of_call(
        self, conditions: Mapping[str, Any] | None, prompts: int, repeats: int, guided: bool
    ) -> tuple[ConditionTokens | None, ConditionTokens | None]:
        """Tokens of ``repeats`` pictures of each prompt, and the null tokens that guidance holds against them."""
        saved = self.condition_tokens
        if saved is None:
            if conditions:
                raise UserError(
                    f"conditions {', '.join(conditions)} would not be used: this model has no token encoders; load "
                    "them with load_condition_tokens, or leave conditions out"
                )
            return None, None
        encoders, count = saved.encoders, prompts * repeats
        conditions = dict(conditions or {})
        if unknown := [name for name in conditions if name not in encoders.encoders]:
            raise UserError(
                f"unknown conditions {', '.join(unknown)}; this model's are {', '.join(encoders.encoders)}: choose "
                "from those"
            )
        arrays, dropped = {}, {}
        for name, config in encoders.encoders.items():
            value = conditions.get(name)
            dropped[name] = jnp.full(count, value is None)
            if value is None:
                print(f"condition {name} is not given; the model draws as it has learned to without it")
                array = np.zeros((1,) if config.kind == "scalar" else (1, config.width), np.float32)
            else:
                array = self._read(name, config, value, prompts)
            repeated = np.repeat(array, repeats, axis=0) if len(array) > 1 else np.repeat(array, count, axis=0)
            arrays[name] = jnp.asarray(repeated)
        positive = apply_tokens(encoders, saved.params, arrays, dropped)
        return positive, null_tokens(encoders, saved.params, 1) if guided else None

    def _read(self, name: str, config: TokenEncoderConfig, value: Any, prompts: int) -> Float[np.ndarray, "P *X"]:
        """A condition's array, of one value for all prompts or of one for each."""
        array = read_numbers(name, value, config)
        if array is None:
            array = self._embed(name, config, value)
        given = array.shape
        if array.ndim == (0 if config.kind == "scalar" else 1):
            array = array[None]
        shape = "a number" if config.kind == "scalar" else f"a vector of {config.width} numbers"
        if array.ndim != (1 if config.kind == "scalar" else 2) or array.shape[1:] != (
            () if config.kind == "scalar" else (config.width,)
        ):
            raise UserError(f"condition {name} has the shape {given}; allowed is {shape}, for all prompts or each")
        if len(array) not in (1, prompts):
            raise UserError(f"{len(array)} values of condition {name} for {prompts} prompts; give one for all or each")
        if not np.isfinite(array).all():
            raise UserError(f"condition {name} has values that are not finite; allowed are finite numbers: mend it")
        if config.kind == "scalar":
            lowest, highest = config.bounds
            if outside := [float(v) for v in array if not lowest <= v <= highest]:
                print(
                    f"condition {name}={', '.join(f'{v:g}' for v in outside)} is outside {lowest:g} to {highest:g}, "
                    "which is all that training has seen; what comes of it is a guess"
                )
        return array

    def _embed(self, name: str, config: TokenEncoderConfig, pictures: Any) -> Float[np.ndarray, "P D"]:
        """Embeddings of pictures, by the image encoder that training used."""
        if config.kind != "vector":
            raise UserError(f"condition {name}={pictures!r} is not allowed; allowed is a number, such as 0.5")
        recorded = self.condition_tokens.image_encoders.get(name, {})
        encoder = self._open_image_encoder(name, recorded)
        if recorded.get("id") not in (None, encoder.id):
            raise CheckpointError(
                f"the image encoder has the id {encoder.id}, and condition {name} was trained with {recorded['id']} "
                f"({recorded.get('directory', 'unknown')}); name that one's directory as image_encoder"
            )
        if encoder.shape != (config.width,):
            raise UserError(
                f"the image encoder gives {encoder.shape} for each picture, and condition {name} takes "
                f"({config.width},): name the one that it was trained with"
            )
        vectors = encoder.encode(pictures if isinstance(pictures, list | tuple) else [pictures])
        if self.residency != "all":
            encoder.free()
        return vectors

    def _open_image_encoder(self, name: str, recorded: Mapping[str, Any]) -> Any:
        from sana_jax.image_encoders import SiglipImageEncoder

        given = self.image_encoder
        if given is not None and not isinstance(given, str | os.PathLike):
            return given
        directory = given if given is not None else recorded.get("directory")
        if directory is None or not pathlib.Path(directory).is_dir():
            raise UserError(
                f"condition {name} is given as a picture, and the image encoder that training used "
                f"({directory or 'not recorded'}) is not here; name its directory as image_encoder (--image-encoder), "
                "or give the vector"
            )
        options = {key: recorded[key] for key in _IMAGE_ENCODER_OPTIONS if key in recorded}
        self.image_encoder = SiglipImageEncoder.from_directory(directory, **options)
        return self.image_encoder


def describe_encoder(name: str, saved: SavedTokens) -> str:
    """One encoder in words."""
    config = saved.encoders.encoders[name]
    tokens = f"{config.num_tokens} token{'s' if config.num_tokens > 1 else ''} {config.inject} the caption projection"
    if config.kind == "scalar":
        lowest, highest = config.bounds
        return f"{name} (a number from {lowest:g} to {highest:g}, {tokens})"
    pictures = " or a picture" if name in saved.image_encoders else ""
    return f"{name} (a vector of {config.width}{pictures}, {tokens})"


def read_numbers(name: str, value: Any, config: TokenEncoderConfig) -> Float[np.ndarray, "*shape"] | None:
    """A condition's numbers: as they are, or from a ``.npy`` file; None for what is pictures.

    Raises:
        FileNotFoundError, UserError: a file that is missing or damaged, or a text that is no number.
    """
    if isinstance(value, str | os.PathLike):
        path = pathlib.Path(value)
        if path.suffix == ".npy":
            if not path.is_file():
                raise FileNotFoundError(f"condition {name}: {path} is not a file; name a .npy file or a picture")
            try:
                return np.asarray(np.load(path, allow_pickle=False), np.float32)
            except (ValueError, OSError, EOFError, TypeError) as error:
                raise UserError(f"condition {name}: {path} can't be read ({error}); save it again") from error
        if config.kind == "scalar":
            try:
                return np.asarray(float(value), np.float32)
            except (TypeError, ValueError) as error:
                raise UserError(f"condition {name}={value!r} is no number; write {name}=0.5") from error
        return None
    try:
        array = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        return None
    is_picture = hasattr(value, "getexif") or array.ndim >= 3
    return None if is_picture else array
