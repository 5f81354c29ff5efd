"""SigLIP's text tower as a text encoder: texts in, one vector each out, to be compared with pictures' vectors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Float, Int
from sana_jax.compilation import compile_ahead
from sana_jax.dtypes import parse_dtype
from sana_jax.errors import CheckpointError, UserError, reason_of
from sana_jax.files import read_json
from sana_jax.models.siglip_text import SiglipTextConfig, SiglipTextModel, init_params
from sana_jax.weights.components import CONVERTED, KEPT, TRANSFORMERS_STEM, Resident, open_tensors
from sana_jax.weights.identity import weights_id
from sana_jax.weights.safetensors_files import SafetensorsSource, find_weights_file
from sana_jax.weights.tables.siglip import TEXT_IGNORED, TEXT_PREFIX, siglip_text_rules
from sana_jax.weights.trees import abstract_tree

# Either makes a tokenizer; the first two are read by tokenizers, the others by sentencepiece.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model")
_CHOOSE = "choose a whole SigLIP, such as google/siglip-base-patch16-224"


@dataclasses.dataclass(frozen=True)
class SiglipTextEncoder:
    """Embeds texts with the text tower of a whole SigLIP.

    Attributes:
        config: the network's shape.
        tokenizer: texts to token ids (B, L), padded as SigLIP was trained with.
        weights: ``text``, the network's parameters, and ``logit_scale`` and ``logit_bias``; read when first needed.
        weights_id: a short name for the bytes of the directory's weights.
        dtype: ``float32`` or ``bfloat16``, of parameters and computation.
        batch_size: texts that go through the network at once.
        say: prints a line.
    """

    config: SiglipTextConfig
    tokenizer: SiglipTokenizer
    weights: Resident
    weights_id: str
    dtype: Any = jnp.float32
    batch_size: int = 64
    say: Callable[[str], None] = print

    @classmethod
    def from_directory(
        cls,
        directory: str | os.PathLike[str],
        *,
        dtype: Any = "float32",
        batch_size: int = 64,
        say: Callable[[str], None] = print,
    ) -> SiglipTextEncoder:
        """The text encoder of a published or converted SigLIP with both towers; weights are read later.

        Args:
            directory: with ``config.json``, the weights and the tokenizer's files.
            dtype: ``"float32"`` or ``"bfloat16"``.
            batch_size: texts that go through the network at once.
            say: prints a line.

        Raises:
            FileNotFoundError: a file is missing, the tokenizer's included.
            UserError: no text tower, a damaged configuration, a value that is not allowed, or transformers is missing.
            CheckpointError: weights or tokenizer are damaged or do not fit.
        """
        directory = Path(os.path.abspath(directory))
        path = directory / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {_CHOOSE}")
        dtype = parse_dtype(dtype, "text tower dtype")
        try:
            config = SiglipTextConfig.from_dict(read_json(path))
        except UserError as error:
            raise UserError(f"{directory} has no text tower that can be read: {error}; {_CHOOSE}") from error
        source = _open_tensors(directory)
        network = SiglipTextModel(config)
        shapes = jax.eval_shape(lambda key: init_params(network, key), jax.random.key(0))
        number = jax.ShapeDtypeStruct((1,), jnp.float32)
        abstract = {"text": abstract_tree(shapes, dtype), "logit_scale": number, "logit_bias": number}
        weights = open_tensors("text tower", source, siglip_text_rules(), abstract, TEXT_IGNORED)
        tokenizer = SiglipTokenizer(directory, config, say)
        return cls(config, tokenizer, weights, weights_id(directory), dtype, batch_size, say)

    @property
    def id(self) -> str:
        """Changes with everything that changes the result."""
        described = [self.weights_id, dataclasses.asdict(self.config), jnp.dtype(self.dtype).name, self.tokenizer.id]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "B P"]:
        """One vector for each text, float32.

        Raises:
            UserError: no texts.
        """
        if not texts:
            raise UserError("no texts to encode; give one or more")
        ids = self.tokenizer(texts)
        size = min(self.batch_size, len(ids))
        network, params = SiglipTextModel(self.config, dtype=self.dtype), self.weights.params["text"]

        def run(params, ids):
            return network.apply({"params": params}, ids).astype(jnp.float32)

        name = f"the text tower for {size} text{'s' if size > 1 else ''}"
        shape = jax.ShapeDtypeStruct((size, ids.shape[1]), jnp.int32)
        program = compile_ahead(name, jax.jit(run), params, shape, say=self.say, identity=network)
        vectors = []
        for begin in range(0, len(ids), size):
            part = ids[begin : begin + size]
            filled = np.concatenate([part, np.zeros((size - len(part), ids.shape[1]), np.int32)])
            vectors.append(np.asarray(program(params, filled))[: len(part)])
        return np.concatenate(vectors)

    def free(self) -> None:
        """Lets go of the weights; the next text reads them again."""
        self.weights.free()


class SiglipTokenizer:
    """Texts to ids (B, L): the directory's own tokenizer, by transformers, cut and padded to ``L`` tokens.

    SigLIP was trained on lower-cased texts. Its own tokenizers do that themselves; a directory of SigLIP 2 names
    Gemma's, which does not, so it is done for it.
    """

    def __init__(self, directory: Path, config: SiglipTextConfig, say: Callable[[str], None] = print) -> None:
        if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
            raise FileNotFoundError(
                f"{directory} has no tokenizer, one of {', '.join(_TOKENIZER_FILES)}; download it beside the weights"
            )
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise UserError(
                "reading texts for SigLIP needs the package transformers; install it: pip install transformers "
                "sentencepiece protobuf"
            ) from error
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
        except ImportError as error:
            raise UserError(
                f"the tokenizer in {directory} needs a package that is not installed ({reason_of(error)}); install "
                "it: pip install sentencepiece protobuf"
            ) from error
        except Exception as error:  # damaged files raise anything
            raise CheckpointError(
                f"the tokenizer in {directory} can't be read ({reason_of(error)}); download it again"
            ) from error
        self._directory, self._config, self._say = directory, config, say
        self._lowers_itself = type(self._tokenizer).__name__.lower().startswith("siglip")
        if self._tokenizer.pad_token_id is None:
            raise CheckpointError(f"the tokenizer in {directory} has no padding token; download it again")

    @property
    def id(self) -> str:
        """A short name of the tokenizer's files."""
        digest = hashlib.sha256(type(self._tokenizer).__name__.encode())
        for name in (*_TOKENIZER_FILES, "tokenizer_config.json"):
            if (self._directory / name).is_file():
                digest.update(name.encode() + (self._directory / name).read_bytes())
        return digest.hexdigest()[:12]

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "B L"]:
        """Token ids; texts that are too long are cut, and counted in a printed line.

        Raises:
            CheckpointError: ids that the network does not know.
        """
        length = self._config.max_position_embeddings
        texts = list(texts) if self._lowers_itself else [text.lower() for text in texts]
        cut = sum(len(ids) > length for ids in self._tokenizer(texts, verbose=False)["input_ids"])
        if cut:
            self._say(f"{cut} of {len(texts)} texts are longer than the text tower's {length} tokens and are cut there")
        encoded = self._tokenizer(texts, padding="max_length", truncation=True, max_length=length)
        ids = np.asarray(encoded["input_ids"], np.int32)
        if ids.max() >= self._config.vocab_size:
            raise CheckpointError(
                f"the tokenizer in {self._directory} gives the id {ids.max()}, and the text tower knows ids up to "
                f"{self._config.vocab_size - 1}: they belong to different models; download both again"
            )
        return ids


def _open_tensors(directory: Path) -> SafetensorsSource:
    """The file that has the text tower: a converted SigLIP keeps it beside its vision tower, as it was published."""
    if not (directory / CONVERTED).is_dir():
        source = SafetensorsSource(find_weights_file(directory, TRANSFORMERS_STEM))
    elif (directory / KEPT).is_file():
        source = SafetensorsSource(directory / KEPT)
    else:
        raise UserError(f"{directory} was converted from a vision tower alone, without a text tower; {_CHOOSE}")
    if not any(name.startswith(TEXT_PREFIX) for name in source.tensors):
        raise UserError(f"{source.location} has no text tower (no tensor {TEXT_PREFIX}...); {_CHOOSE}")
    return source
