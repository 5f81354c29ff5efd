"""Gemma-2 as a text encoder: prompts, the instruction before them, and the last hidden state of their tokens."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Float, Int
from sana_jax.compilation import compile_ahead
from sana_jax.component_config import load_from_config
from sana_jax.dtypes import parse_dtype
from sana_jax.errors import UserError
from sana_jax.models.gemma import (
    Gemma,
    GemmaConfig,
    GemmaLayer,
    GemmaRMSNorm,
    embed_tokens,
    init_params,
    shared_by_layers,
    split_layers,
)
from sana_jax.quantization.trees import plain_dtypes
from sana_jax.text_encoders.base import check_max_length
from sana_jax.text_encoders.instructions import IMAGE_INSTRUCTION
from sana_jax.text_encoders.tokenizer import PromptTokenizer
from sana_jax.weights.components import CONVERTED, TRANSFORMERS_STEM, Resident, open_component
from sana_jax.weights.safetensors_files import SafetensorsSource, find_weights_file
from sana_jax.weights.tables.gemma import IGNORED, gemma_rules, name_prefix
from sana_jax.weights.trees import abstract_tree

CLASS_NAME = "Gemma2Model"
# The network runs on as many positions as the longest prompt has tokens, rounded up to this, so that prompts of all
# lengths share a few compiled programs.
LENGTH_MULTIPLE = 64
_FLOAT16 = {"float16": "Gemma-2's activations overflow in it and pictures turn out wrong; bfloat16 is recommended"}
_LONGEST_LOSS = 500  # characters of a lost text that are printed


@dataclasses.dataclass(frozen=True)
class GemmaTextEncoder:
    """Embeds prompts as SANA's weights were trained with them.

    A prompt is lower-cased and stripped, unless it is to stay as it is; the instruction is put before it; of the
    tokens, the first (the begin token) and the last ``max_length - 1`` positions of a padded text are kept, which drops
    the instruction but not its influence. Negative prompts have no instruction. Change a field with
    ``dataclasses.replace``; weights, tokenizer and compiled programs are shared with the original.

    Attributes:
        config: the network's shape.
        tokenizer: of the model directory.
        weights: the network's parameters, read at the first prompt; ``weights.free()`` lets go of them.
        dtype: ``float32`` or ``bfloat16``, of parameters and computation.
        max_length: L, tokens of an encoding, the begin token included; called ``max_sequence_length`` elsewhere.
        complex_human_instruction: lines that stand before a prompt; None for none.
        cleans_prompts: whether prompts are lower-cased and stripped; SANA-WM's are read as they are.
        say: prints a line.
    """

    config: GemmaConfig
    tokenizer: PromptTokenizer
    weights: Resident
    dtype: Any = jnp.bfloat16
    max_length: int = 300
    complex_human_instruction: tuple[str, ...] | None = IMAGE_INSTRUCTION
    cleans_prompts: bool = True
    say: Callable[[str], None] = print
    _compiled: dict[Any, Callable[[Any, np.ndarray], jax.Array]] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", parse_dtype(self.dtype, "text encoder dtype", _FLOAT16))
        check_max_length(self.max_length, 300)
        lines = self.complex_human_instruction
        if not lines:
            object.__setattr__(self, "complex_human_instruction", None)
        else:
            # A text instead of lines would be taken apart into letters.
            if not isinstance(lines, list | tuple) or not all(isinstance(line, str) for line in lines):
                raise UserError(
                    f"complex_human_instruction {lines!r} is not allowed; allowed is a list of lines, or None: put "
                    "a single line into a list"
                )
            object.__setattr__(self, "complex_human_instruction", tuple(lines))

    @classmethod
    def from_directory(
        cls, model_directory: str | os.PathLike[str], dtype: Any = None, variant: str | None = None
    ) -> GemmaTextEncoder:
        """The text encoder of a model directory: ``text_encoder`` and ``tokenizer`` in it; weights are read later.

        Args:
            model_directory: a published or converted model.
            dtype: ``"float32"`` or ``"bfloat16"``; None takes float32 where all weights are stored so, else bfloat16.
            variant: ``bf16``, ``fp16``, ... of the published files.

        Raises:
            FileNotFoundError: a file is missing.
            UserError: a configuration is damaged or not Gemma-2's, or a value is not allowed.
            CheckpointError: weights or tokenizer are damaged or do not fit.
        """
        directory = Path(model_directory) / "text_encoder"

        def load(config: dict[str, Any]) -> GemmaTextEncoder:
            return cls.from_config(config, directory, dtype=dtype, variant=variant)

        return load_from_config(directory, {CLASS_NAME: load, "gemma2": load})

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        directory: str | os.PathLike[str],
        *,
        dtype: Any = None,
        variant: str | None = None,
    ) -> GemmaTextEncoder:
        """As ``from_directory``, of a directory of weights that has the tokenizer's directory beside it."""
        directory = Path(os.path.abspath(directory))
        network = GemmaConfig.from_dict(dict(config))
        tokenizer = PromptTokenizer.from_directory(directory.parent / "tokenizer")
        weights, dtype = open_gemma(network, directory, dtype, variant)
        return cls(network, tokenizer, weights, dtype)

    @property
    def embedding_dim(self) -> int:
        """C, the size of a token's vector."""
        return self.config.hidden_size

    def encode(
        self, prompts: Sequence[str], *, negative: bool = False
    ) -> tuple[Float[np.ndarray, "B L C"], Int[np.ndarray, "B L"]]:
        """Embeddings (B, L, C) in float32, zero where padded, and mask (B, L) in int32, 1 where a token stands.

        A prompt that is too long loses its end, and a line says which words. With ``negative`` there is no instruction
        and a prompt may be empty.

        Raises:
            UserError: a prompt that is empty or no text.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = [_checked(prompt, allow_empty=negative) for prompt in prompts]
        if self.cleans_prompts:
            texts = [text.lower().strip() for text in texts]
        lines = None if negative else self.complex_human_instruction
        instruction = "\n".join(lines) if lines else ""
        # The instruction is counted with its begin token and its last space, which the prompt's own begin token and
        # first word take the place of.
        total = self.max_length + (self.tokenizer.count(instruction) - 2 if instruction else 0)
        first = total - self.max_length + 1  # position of the first kept token after the begin token
        if first < 0:
            raise UserError(
                f"complex_human_instruction {lines!r} has no tokens at all; allowed are lines of words, or None"
            )
        tokens = []
        for number, text in enumerate(texts):
            tokenized = self.tokenizer.encode(instruction + text, total)
            if tokenized.end is not None:
                lost = text[max(tokenized.end - len(instruction), 0) :]
                self.say(self._loss(number, len(texts), lost, tokenized.lost_tokens, negative))
            tokens.append(tokenized.ids)
        kept = np.array([0, *range(first, total)])
        lengths = np.array([len(ids) for ids in tokens], np.int64)
        mask = (kept < lengths[:, None]).astype(np.int32)
        embeddings = np.zeros((len(texts), self.max_length, self.embedding_dim), np.float32)
        if mask.any():
            hidden = self._hidden_states(tokens)
            there = kept < hidden.shape[1]
            embeddings[:, there] = hidden[:, kept[there]]
            embeddings[mask == 0] = 0
        return embeddings, mask

    def null_encoding(self) -> tuple[Float[np.ndarray, "1 L C"], Int[np.ndarray, "1 L"]]:
        """The encoding of an empty text: embeddings (1, L, C) and mask (1, L)."""
        return self.encode([""], negative=True)

    def to_config(self) -> dict[str, Any]:
        """What ``text_encoder/config.json`` holds."""
        return {"_class_name": CLASS_NAME, **self.config.to_dict(), "dtype": jnp.dtype(self.dtype).name}

    def _hidden_states(self, tokens: list[list[int]]) -> Float[np.ndarray, "B P C"]:
        """The last hidden state of each text's tokens, on as many positions as the longest text needs."""
        longest = max(map(len, tokens))
        ids = np.zeros((len(tokens), -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE), np.int32)
        for row, numbers in enumerate(tokens):
            ids[row, : len(numbers)] = numbers
        if ids.max() >= self.config.vocab_size:
            raise UserError(
                f"{self.tokenizer.location} gives the token {ids.max()}, and the text encoder has vocab_size "
                f"{self.config.vocab_size}; they do not belong together: take both from one model"
            )
        return np.asarray(self._program(*ids.shape)(self.weights.params, ids).astype(jnp.float32))

    def _program(self, batch: int, length: int) -> Callable[[Any, np.ndarray], jax.Array]:
        """The network compiled for a shape; it takes no mask, since padding stands to the right."""
        params = self.weights.params
        layer_by_layer = is_on_one_cpu(params)
        # Instances that differ in dtype share this dictionary too.
        key = (batch, length, jnp.dtype(self.dtype).name, layer_by_layer)
        if key not in self._compiled:
            make = _layer_by_layer_program if layer_by_layer else _whole_program
            name = f"{batch} prompt{'s' if batch > 1 else ''} of up to {length} tokens"
            self._compiled[key] = make(Gemma(self.config, dtype=self.dtype), params, batch, length, name, self.say)
        return self._compiled[key]

    def _loss(self, number: int, count: int, lost: str, tokens: int, negative: bool) -> str:
        words = " ".join(lost.split())
        if len(words) > _LONGEST_LOSS:
            words = f"{words[:_LONGEST_LOSS]} ... and {len(words) - _LONGEST_LOSS} characters more"
        which = f"{'negative ' if negative else ''}prompt{f' {number + 1} of {count}' if count > 1 else ''}"
        return (
            f"{which} is longer than max_sequence_length={self.max_length} tokens allow by {tokens}; lost at its end: "
            f"{words!r}"
        )


def open_gemma(
    network: GemmaConfig,
    directory: Path,
    dtype: Any,
    variant: str | None,
    ignored: Sequence[str] = IGNORED,
    warnings: Mapping[str, str] = _FLOAT16,
) -> tuple[Resident, Any]:
    """A Gemma's weights, read later, and the dtype that they will have: a given one, or what fits the stored ones.

    ``ignored`` are patterns of tensors that belong to other parts; ``warnings`` say why a dtype is not allowed.

    Raises:
        FileNotFoundError: there are no weights.
        UserError: a dtype that is not allowed.
        CheckpointError: weights that do not fit.
    """
    if dtype is not None:
        dtype = parse_dtype(dtype, "text encoder dtype", warnings)
    prefix = ""
    if not (directory / CONVERTED).is_dir():
        source = SafetensorsSource(find_weights_file(directory, TRANSFORMERS_STEM, variant))
        prefix = name_prefix(source.tensors)
        stored = {info.dtype.name for name, info in source.tensors.items() if name.startswith(prefix)}
    elif dtype is None:
        stored = _converted_dtypes(directory / CONVERTED)
    if dtype is None:
        dtype = jnp.float32 if stored == {"float32"} else jnp.bfloat16
        if "float16" in stored:
            print(
                f"{directory} is stored in float16, in which Gemma overflows; it runs in bfloat16. dtype='float32' "
                "keeps every bit"
            )
    weights = open_component(
        directory,
        gemma_rules(network, prefix),
        abstract_params(network, dtype),
        stem=TRANSFORMERS_STEM,
        variant=variant,
        ignored=ignored,
    )
    return weights, dtype


def _whole_program(
    gemma: Gemma, params: Any, batch: int, length: int, name: str, say: Callable[[str], None]
) -> Callable[[Any, np.ndarray], jax.Array]:
    """(params, token ids) -> the last hidden state, in one program."""
    return compile_ahead(
        f"the text encoder for {name}",
        jax.jit(lambda params, ids: gemma.apply({"params": params}, ids)),
        abstract_tree(params),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        say=say,
        identity=gemma,
    )


def _layer_by_layer_program(
    gemma: Gemma, params: Any, batch: int, length: int, name: str, say: Callable[[str], None]
) -> Callable[[Any, np.ndarray], jax.Array]:
    """The same by a program of one layer that is run for each: see ``split_layers``."""
    config, dtype = gemma.config, gemma.dtype
    layer, norm = GemmaLayer(config, dtype), GemmaRMSNorm(config.rms_norm_eps)
    run_layer = compile_ahead(
        f"the text encoder's layer for {name}",
        jax.jit(lambda own, x, sliding: layer.apply({"params": own}, x, sliding, *shared_by_layers(config, length))),
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params["layers"]),
        jax.ShapeDtypeStruct((batch, length, config.hidden_size), dtype),
        jax.ShapeDtypeStruct((), jnp.bool_),
        say=say,
        identity=layer,
    )
    embed = jax.jit(lambda table, ids: embed_tokens(config, table, ids, dtype))
    finish = jax.jit(lambda own, x: norm.apply({"params": own}, x))

    def run(params: Any, ids: np.ndarray) -> jax.Array:
        x = embed(params["embed_tokens"], ids)
        for own, sliding in zip(split_layers(params["layers"]), config.sliding_layers, strict=True):
            x = run_layer(own, x, np.bool_(sliding))
        return finish(params["norm"], x)

    return run


def is_on_one_cpu(params: Any) -> bool:
    """Whether a network's layers are to be run one by one: see ``split_layers``."""
    devices = jax.tree.leaves(params)[0].devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def abstract_params(config: GemmaConfig, dtype: Any) -> Any:
    """The network's parameters as shapes of one dtype."""
    shapes = jax.eval_shape(lambda key: init_params(Gemma(config), key), jax.random.key(0))
    return abstract_tree(shapes, parse_dtype(dtype, "text encoder dtype", _FLOAT16))


def _converted_dtypes(directory: Path) -> set[str]:
    from sana_jax.weights.converted import lazy_saved_tree

    return plain_dtypes(lazy_saved_tree(directory))


def _checked(prompt: Any, *, allow_empty: bool) -> str:
    if not isinstance(prompt, str):
        raise UserError(f"prompt {prompt!r} is a {type(prompt).__name__}; allowed is text: give a string")
    if not prompt.strip() and not allow_empty:
        raise UserError(f"prompt {prompt!r} is empty; allowed is any other text: write what the picture should show")
    return prompt
