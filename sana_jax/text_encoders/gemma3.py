"""Gemma-3 as LTX-2's text encoder: prompts in, the hidden states of all its layers out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float, Int
from sana_jax.compilation import compile_ahead
from sana_jax.component_config import load_from_config
from sana_jax.dtypes import parse_dtype
from sana_jax.errors import UserError
from sana_jax.models.gemma import (
    Gemma,
    GemmaLayer,
    GemmaRMSNorm,
    embed_tokens,
    empty_states,
    pack_state,
    shared_by_layers,
    split_layers,
)
from sana_jax.models.gemma3_config import Gemma3Config
from sana_jax.text_encoders.base import check_max_length
from sana_jax.text_encoders.gemma import LENGTH_MULTIPLE, is_on_one_cpu, open_gemma
from sana_jax.text_encoders.tokenizer import PromptTokenizer
from sana_jax.weights.components import Resident
from sana_jax.weights.tables.gemma import IGNORED, IMAGE_TOWER
from sana_jax.weights.trees import abstract_tree

CLASS_NAMES = ("Gemma3ForConditionalGeneration", "Gemma3TextModel", "gemma3", "gemma3_text")
_FLOAT16 = {"float16": "Gemma-3's activations overflow in it; bfloat16 is recommended"}
_LONGEST_LOSS = 500  # characters of a lost text that are printed


@dataclasses.dataclass(frozen=True)
class Gemma3TextEncoder:
    """Hidden states of a prompt's tokens in all layers, as LTX-2's connectors were trained with them.

    A prompt is stripped, begins with the begin token and is padded on the left to ``max_length`` positions. Padding is
    not attended to, so the network runs on the last positions alone, on as many as the longest prompt needs. Change a
    field with ``dataclasses.replace``; weights, tokenizer and compiled programs are shared with the original.

    Attributes:
        config: the network's shape.
        tokenizer: of the model directory.
        weights: the network's parameters, read at the first prompt; ``weights.free()`` lets go of them.
        dtype: ``float32`` or ``bfloat16``, of parameters and computation.
        max_length: L, tokens of an encoding, the begin token included; called ``max_sequence_length`` elsewhere.
        say: prints a line.
    """

    config: Gemma3Config
    tokenizer: PromptTokenizer
    weights: Resident
    dtype: Any = jnp.bfloat16
    max_length: int = 1024
    say: Callable[[str], None] = print
    _compiled: dict[Any, Callable[[Any, np.ndarray, np.ndarray], jax.Array]] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", parse_dtype(self.dtype, "text encoder dtype", _FLOAT16))
        check_max_length(self.max_length, 1024)

    @classmethod
    def from_directory(
        cls, model_directory: str | os.PathLike[str], dtype: Any = None, variant: str | None = None
    ) -> Gemma3TextEncoder:
        """The text encoder of a model directory: ``text_encoder`` and ``tokenizer`` in it; weights are read later.

        Args:
            model_directory: a published or converted model.
            dtype: ``"float32"`` or ``"bfloat16"``; None takes float32 where all weights are stored so, else bfloat16.
            variant: ``bf16``, ``fp16``, ... of the published files.

        Raises:
            FileNotFoundError: a file is missing.
            UserError: a configuration is damaged or not Gemma-3's, or a value is not allowed.
            CheckpointError: weights or tokenizer are damaged or do not fit.
        """
        directory = Path(model_directory) / "text_encoder"

        def load(config: dict[str, Any]) -> Gemma3TextEncoder:
            return cls.from_config(config, directory, dtype=dtype, variant=variant)

        return load_from_config(directory, dict.fromkeys(CLASS_NAMES, load))

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        directory: str | os.PathLike[str],
        *,
        dtype: Any = None,
        variant: str | None = None,
    ) -> Gemma3TextEncoder:
        """As ``from_directory``, of a directory of weights that has the tokenizer's directory beside it.

        Of a model with an image tower, the text tower alone is read.
        """
        directory = Path(os.path.abspath(directory))
        network = Gemma3Config.from_dict(dict(config))
        tokenizer = PromptTokenizer.from_directory(directory.parent / "tokenizer")
        weights, dtype = open_gemma(network, directory, dtype, variant, (*IGNORED, *IMAGE_TOWER), _FLOAT16)
        return cls(network, tokenizer, weights, dtype)

    @property
    def embedding_dim(self) -> int:
        """C, the size of a token's vector in each layer."""
        return self.config.hidden_size

    @property
    def state_count(self) -> int:
        """States of a token: what goes into every layer, and the last one's output after the final norm."""
        return self.config.num_hidden_layers + 1

    def encode(self, prompts: Sequence[str]) -> tuple[Float[Array, "B L C layers1"], Int[np.ndarray, "B L"]]:
        """All layers' states (B, L, C, layers + 1) on the device, and mask (B, L) in int32, 1 where a token stands.

        Flattened, the last two axes have index ``channel * (layers + 1) + layer``; the last layer's state is after the
        final norm. Padding stands on the left; what is there is not to be read. A prompt that is too long loses its
        end, and a line says which words.

        Raises:
            UserError: a prompt that is empty or no text.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        tokens = [self._tokens(number, len(prompts), prompt) for number, prompt in enumerate(prompts)]
        lengths = np.array([len(ids) for ids in tokens], np.int64)
        run = min(-(-int(lengths.max()) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, self.max_length)
        ids = np.zeros((len(tokens), run), np.int32)
        for row, numbers in enumerate(tokens):
            ids[row, run - len(numbers) :] = numbers
        if ids.max() >= self.config.vocab_size:
            raise UserError(
                f"{self.tokenizer.location} gives the token {ids.max()}, and the text encoder has vocab_size "
                f"{self.config.vocab_size}; they do not belong together: take both from one model"
            )
        mask = (np.arange(self.max_length) >= self.max_length - lengths[:, None]).astype(np.int32)
        program = self._program(*ids.shape)
        return program(self.weights.params, ids, mask[:, self.max_length - run :]), mask

    def to_config(self) -> dict[str, Any]:
        """What ``text_encoder/config.json`` holds."""
        return {"_class_name": "Gemma3TextModel", **self.config.to_dict(), "dtype": jnp.dtype(self.dtype).name}

    def _tokens(self, number: int, count: int, prompt: Any) -> list[int]:
        if not isinstance(prompt, str):
            raise UserError(f"prompt {prompt!r} is a {type(prompt).__name__}; allowed is text: give a string")
        text = prompt.strip()
        if not text:
            raise UserError(f"prompt {prompt!r} is empty; allowed is any other text: write what the video shows")
        tokenized = self.tokenizer.encode(text, self.max_length)
        if tokenized.end is not None:
            words = " ".join(text[tokenized.end :].split())
            if len(words) > _LONGEST_LOSS:
                words = f"{words[:_LONGEST_LOSS]} ... and {len(words) - _LONGEST_LOSS} characters more"
            self.say(
                f"prompt{f' {number + 1} of {count}' if count > 1 else ''} is longer than max_sequence_length="
                f"{self.max_length} tokens allow by {tokenized.lost_tokens}; lost at its end: {words!r}"
            )
        return tokenized.ids

    def _program(self, batch: int, length: int) -> Callable[[Any, np.ndarray, np.ndarray], jax.Array]:
        """(params, token ids, mask) -> all states, compiled for a shape."""
        params = self.weights.params
        layer_by_layer = is_on_one_cpu(params)
        key = (batch, length, self.max_length, jnp.dtype(self.dtype).name, layer_by_layer)
        if key not in self._compiled:
            make = _layer_by_layer_program if layer_by_layer else _whole_program
            name = f"{batch} prompt{'s' if batch > 1 else ''} of up to {length} tokens"
            gemma = Gemma(self.config, dtype=self.dtype)
            self._compiled[key] = make(gemma, params, (batch, length, self.max_length), name, self.say)
        return self._compiled[key]


def _whole_program(
    gemma: Gemma, params: Any, shape: tuple[int, int, int], name: str, say: Callable[[str], None]
) -> Callable[[Any, np.ndarray, np.ndarray], jax.Array]:
    """(params, token ids, mask) -> all states, in one program; ``shape`` is prompts, tokens run, tokens in all."""
    batch, length, total = shape
    integers = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return compile_ahead(
        f"the text encoder for {name}",
        jax.jit(lambda params, ids, mask: gemma.apply({"params": params}, ids, mask, packed_length=total)),
        abstract_tree(params),
        integers,
        integers,
        say=say,
        identity=(gemma, total),
    )


def _layer_by_layer_program(
    gemma: Gemma, params: Any, shape: tuple[int, int, int], name: str, say: Callable[[str], None]
) -> Callable[[Any, np.ndarray, np.ndarray], jax.Array]:
    """The same by a program of one layer that is run for each: see ``split_layers``."""
    config, dtype, (batch, length, total) = gemma.config, gemma.dtype, shape
    layer, norm = GemmaLayer(config, dtype), GemmaRMSNorm(config.rms_norm_eps)

    def one_layer(own, carry, mask, sliding, index):
        x, packed = carry
        shared = shared_by_layers(config, length, mask, total - length)
        return layer.apply({"params": own}, x, sliding, *shared), pack_state(packed, x, index)

    def empty():
        return empty_states(config, batch, total, dtype)

    run_layer = compile_ahead(
        f"the text encoder's layer for {name}",
        jax.jit(one_layer, donate_argnums=1),
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params["layers"]),
        (jax.ShapeDtypeStruct((batch, length, config.hidden_size), dtype), jax.eval_shape(empty)),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.bool_),
        jax.ShapeDtypeStruct((), jnp.int32),
        say=say,
        identity=(layer, total),
    )
    embed = jax.jit(lambda table, ids: embed_tokens(config, table, ids, dtype))
    finish = jax.jit(
        lambda own, x, packed: pack_state(packed, norm.apply({"params": own}, x), config.num_hidden_layers),
        donate_argnums=2,
    )

    def run(params: Any, ids: np.ndarray, mask: np.ndarray) -> jax.Array:
        carry = (embed(params["embed_tokens"], ids), jax.jit(empty)())
        own_layers = zip(split_layers(params["layers"]), config.sliding_layers, strict=True)
        for index, (own, sliding) in enumerate(own_layers):
            carry = run_layer(own, carry, mask, np.bool_(sliding), np.int32(index))
        return finish(params["norm"], *carry)

    return run
